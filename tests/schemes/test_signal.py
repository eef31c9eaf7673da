"""Forward and backward variance at initialisation against the theory in each scheme's docstring (within 10 % a branch).

The theory speaks of wide maps on large images. Here: 96 channels, averages over a stage of branches, and the share of
the taps that zero padding leaves to a 3×3 convolution on n×n pixels, ((3n - 2) / 3n)², in the expected values.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import skipway as sw

SIDE = 24
TAPS = ((3 * SIDE - 2) / (3 * SIDE)) ** 2
DEPTH = 6


@dataclass
class Signal:
    """Second moments around one connection, forward and backward."""

    entering: float
    branch: float
    leaving: float
    grad_leaving: float
    grad_entering: float
    grad_branch: float


def measure(scheme: str, placement: str = "preactivation") -> list[Signal]:
    """The chain of a one-stage network on unit Gaussian input and unit Gaussian output gradient."""
    config = sw.ResNetConfig(
        blocks=(DEPTH,), block="basic", width=96, stem="cifar", stem_width=96, placement=placement, classes=2
    )
    network = sw.models.ResNet(sw.models.family.replace(config, scheme=sw.schemes.parse_scheme(scheme)))
    sw.initialise_(network)
    x = torch.randn(8, 96, SIDE, SIDE, requires_grad=True)
    stream, branches, prepared = [x], [], []
    for connection in sw.chain(network):
        r = connection.residual
        inner = stream[-1] * 1.0  # the branch's own copy of the stream, to tell its gradient from the skip's
        inner.retain_grad()
        h = r.pre(inner)
        branch = r.drop(r.scale(r.branch(h)))
        y = r.post(r.shortcut(stream[-1], h) + branch)
        y.retain_grad()
        prepared.append(inner)
        branches.append(branch)
        stream.append(y)
    stream[-1].backward(torch.randn_like(stream[-1]))

    def moment(tensor: torch.Tensor) -> float:
        return tensor.detach().square().mean().item()

    return [
        Signal(moment(a), moment(b), moment(c), moment(c.grad), moment(a.grad), moment(p.grad))
        for a, b, c, p in zip(stream, branches, stream[1:], prepared, strict=False)
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def relative(values: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(value / target - 1) for value, target in zip(values, expected, strict=True))


# The branch with norm, relu(bn(x)) → conv → relu(bn(·)) → conv: bn-relu leaves a moment of ½, a map doubles it.
NORMED = TAPS
# The branch without norm, relu-conv-relu-conv: each relu halves, each map doubles what its taps see.
BARE = TAPS**2


@pytest.mark.parametrize(
    ("scheme", "per_branch"),
    [
        ("identity", 1.0),
        ("preactivation", 1.0),
        ("skipinit", 0.1**2),
        ("skipinit(init=1.0)", 1.0),
        ("skipinit(init='depth')", 1 / DEPTH),
        ("layerscale(init=0.3)", 0.3**2),
        ("depthscaled", 1 / DEPTH),
        ("depthscaled(how='init')", 1 / DEPTH),
        ("depthscaled(exponent=1.0)", 1 / DEPTH**2),
    ],
)
def test_with_norm_every_branch_adds_its_scale_squared(scheme, per_branch):
    """Var(x_l) = Var(x_0) + s² l, and every branch's own variance is s²."""
    signals = measure(scheme)
    expected = [per_branch * NORMED] * DEPTH
    assert relative([s.branch for s in signals], expected) < 0.1
    stream = [1 + per_branch * NORMED * (index + 1) for index in range(DEPTH)]
    assert relative([s.leaving for s in signals], stream) < 0.1


@pytest.mark.parametrize("size", [1.0, 10.0])
def test_perinorm_adds_one_per_branch_whatever_the_weights(size):
    """Var(x_l) = Var(x_0) + l (Kim et al. 2025, eq. 4)."""
    network = sw.build("vit-tiny-16", depth=3, dim=64, heads=2, patch=8, image=32, classes=2, scheme="perinorm")
    connections = sw.chain(network)
    variances = []
    for connection in connections:
        for each in connection.path:
            each.multiply_(size)
        connection.residual.register_forward_hook(lambda _, args, y: variances.append(y.detach().var().item()))
    network.stem.register_forward_hook(lambda _, args, y: torch.randn_like(y))
    network(torch.randn(4, 3, 32, 32))
    assert relative(variances, [1 + number for number in range(1, 7)]) < 0.1


@pytest.mark.parametrize(
    ("alpha", "kept"), [("depth", lambda v: 2.718281828 ** (-v / 64)), (1.0, lambda v: (1 + v) ** -16)]
)
@pytest.mark.parametrize("v", [1.0, 4.0])
def test_keel_keeps_the_gradient_of_its_skips(alpha, kept, v):
    """Along their skips L = 32 connections pass e^(-v / 2L) of the gradient; post-norm, α = 1, (1 + v)^(-L / 2)."""

    class Noise(torch.nn.Module):
        def forward(self, h):
            return torch.randn_like(h) * v**0.5

    scheme, depth, dim = sw.Keel(alpha=alpha), 32, 1024
    x = torch.nn.functional.layer_norm(torch.randn(8, 4, dim), (dim,)).requires_grad_()
    stream = x
    for index in range(depth):
        site = sw.Site(dim=dim, index=index, depth=depth, spatial=0, kind="mlp")
        norm = torch.nn.LayerNorm(dim, elementwise_affine=False)
        stream = sw.Residual(Noise(), shortcut=scheme.carry(site, None), post=norm)(stream)
    stream.backward(gradient := torch.randn_like(stream))
    assert relative([float(x.grad.norm() / gradient.norm())], [kept(v)]) < 0.1


def test_layernormscaling_grows_with_the_logarithm():
    """Var(x_L) = Var(x_0) + v Σ 1/b, for linear branches of v = 1: two to a block."""
    dim, blocks = 256, 16
    stream = torch.randn(64, 4, dim)
    norm = torch.nn.LayerNorm(dim, elementwise_affine=False)
    for index in range(2 * blocks):
        site = sw.Site(dim=dim, index=index, depth=2 * blocks, spatial=0, kind="mlp")
        branch = torch.nn.Linear(dim, dim, bias=False)
        torch.nn.init.normal_(branch.weight, std=dim**-0.5)
        pre = torch.nn.Sequential(norm, sw.LayerNormScaling().enter(site))
        stream = sw.Residual(branch, pre=pre)(stream)
    expected = 1 + 2 * sum(1 / block for block in range(1, blocks + 1))
    assert relative([stream.detach().var().item()], [expected]) < 0.1


def test_dyt_grows_geometrically_while_small_and_linearly_at_the_end():
    """A small stream grows by √(1 + α²) with every linear branch of gain 1; a large one by at most 1 in variance."""
    dim = 512

    def grow(stream):
        branch = torch.nn.Linear(dim, dim, bias=False)
        torch.nn.init.normal_(branch.weight, std=dim**-0.5)
        pre = sw.nn.DynamicTanh(dim, init=0.5)
        return (sw.Residual(branch, pre=pre)(stream).detach().var() - stream.var()).item()

    stream = torch.randn(64, dim)
    assert relative([grow(0.01 * stream)], [0.01**2 * 0.25]) < 0.1
    assert relative([grow(30.0 * stream)], [1.0]) < 0.2


@pytest.mark.parametrize(
    ("scheme", "per_branch"),
    [
        ("skipinit(init=1.0, norm='remove')", 1.0),
        ("skipinit(norm='remove')", 0.1**2),
        ("skipinit(init='depth', norm='remove')", 1 / DEPTH),
    ],
)
def test_without_norm_every_branch_multiplies(scheme, per_branch):
    """Var(x_l) = (1 + s²) Var(x_{l-1}), forward; and the gradient likewise on its way back (maps are square)."""
    runs = [measure(scheme) for _ in range(4)]  # one draw of 96 channels strays by some per cent
    signals = [signal for run in runs for signal in run]
    forward = [s.branch / s.entering for s in signals]
    backward = [s.grad_branch / s.grad_leaving for s in signals]
    assert relative([mean(forward)], [per_branch * BARE]) < 0.1
    assert relative([mean(backward)], [per_branch * BARE]) < 0.1
    assert relative([mean([s.leaving / s.entering for s in signals])], [1 + per_branch * BARE]) < 0.1
    total = [run[-1].leaving ** (1 / DEPTH) for run in runs]
    assert relative([mean(total)], [1 + per_branch * BARE]) < 0.1


def test_with_norm_the_branch_passes_the_gradient_divided_by_the_streams_variance():
    """∂BN(x)/∂x ≈ 1/σ, σ² the variance around the channel's mean. Behind a ReLU the mean takes 1/π of a map's second
    moment (Yang et al. 2019), so the branch's inner BN amplifies by π/(π-1), and the stream's divides by
    1 + (1 - 1/π) l. He's maps and ReLU keep the rest.
    """
    signals = measure("identity")
    backward = [s.grad_branch / s.grad_leaving for s in signals]
    share = 1 - 1 / torch.pi
    expected = [TAPS**2 / share / (1 + share * TAPS * index) for index in range(DEPTH)]
    assert relative(backward, expected) < 0.15
    assert relative([sum(backward)], [sum(expected)]) < 0.1
    own = [s.branch / s.leaving for s in signals]
    assert relative(own, [NORMED / (1 + NORMED * (index + 1)) for index in range(DEPTH)]) < 0.1


def test_normfree_follows_its_expected_variance():
    """Var(x_l) = 1 + α² l for g = 1, whatever the depth; the branch itself has variance α²."""
    signals = measure("normfree(gain=1.0, alpha=0.5)")
    # zero padding takes its share of the second moment at each map; standardised weights see no mean
    assert relative([s.branch / 0.5**2 for s in signals], [1.0] * DEPTH) < 0.1
    assert relative([s.leaving for s in signals], [1 + 0.25 * (i + 1) for i in range(DEPTH)]) < 0.1


@pytest.mark.parametrize(
    "scheme", ["zeroinit", "rezero", "fixup", "skipinit(init=0.0)", "layerscale(init=0.0)", "normfree"]
)
def test_silent_schemes_keep_stream_and_gradient_exactly(scheme):
    for s in measure(scheme):
        assert s.leaving == s.entering
        assert s.grad_entering == s.grad_leaving
        assert s.branch == 0.0


def test_deepnorm_shrinks_the_branch_by_beta_and_norms_the_sum():
    """In a ResNet BN hides β on all maps but the last: a branch has variance β² = (4L)^(-1/2)."""
    signals = measure("deepnorm", "original")
    assert relative([s.branch for s in signals], [(4 * DEPTH) ** -0.5 * NORMED] * DEPTH) < 0.1
    network = sw.build("resnet20", scheme="deepnorm")
    seen: list[float] = []  # measured in the hook: the activation behind works in place
    for connection in sw.chain(network):
        connection.residual.post.norm.register_forward_hook(lambda *args: seen.append(args[2].square().mean().item()))
    network(torch.randn(8, 3, 16, 16))
    assert relative(seen, [1.0] * 9) < 0.01


def test_plain_with_norm_keeps_forward_and_grows_backward():
    """Every branch has variance 1; the gradient grows by π/(π-1) a layer.

    Yang et al. 2019, "A Mean Field Theory of Batch Normalization": with BN and ReLU the gradient grows by
    π/(π-1) ≈ 1.467 for each layer, 2.15 for a branch of two.
    """
    signals = measure("plain")
    assert relative([s.branch for s in signals], [NORMED] * DEPTH) < 0.1
    growth = [s.grad_branch / s.grad_leaving for s in signals[1:]]
    assert (sum(growth) / len(growth)) == pytest.approx((torch.pi / (torch.pi - 1)) ** 2 * TAPS**2, rel=0.2)


def test_stochastic_depth_raises_the_variance_of_branch_l_by_one_over_its_keep_rate():
    """E[(m/(1-p))²] = 1/(1-p), with p_l = l/L · p_L; and the stream adds what is left of the branch."""
    config = sw.ResNetConfig(blocks=(DEPTH,), block="basic", width=8, stem="cifar", stem_width=8, classes=2)
    scheme = sw.schemes.parse_scheme("identity + stochasticdepth(0.5)")
    network = sw.initialise_(sw.models.ResNet(sw.models.family.replace(config, scheme=scheme))).train()
    x = torch.randn(4096, 8, 4, 4)  # the fraction that is kept strays by 1.6 % at p = 0.5
    ratios = []
    for connection in sw.chain(network):
        r = connection.residual
        with torch.no_grad():
            branch = r.scale(r.branch(r.pre(x)))
            ratios.append((r.drop(branch).square().mean() / branch.square().mean()).item())
    assert relative(ratios, [1 / (1 - 0.5 * index / DEPTH) for index in range(1, DEPTH + 1)]) < 0.1


@pytest.mark.parametrize("scheme", ["identity", "skipinit"])
def test_original_placement_doubles_without_norm(scheme):
    """Post-activation streams are already rectified, so their maps see the full second moment: a branch is 2 q s²."""
    alpha = 0.1 if scheme == "skipinit" else 1.0
    spec = f"skipinit(init={alpha}, norm='remove')"
    first = measure(spec, "original")[1]  # behind the first connection the stream is rectified
    assert first.branch / first.entering == pytest.approx(2 * alpha**2 * BARE, rel=0.15)
