"""Joins that see both skip and branch, against their papers' equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.nn import Carry, GRUGate, HighwayGate, OrthogonalSum, Residual
from skipway.zoo.sources import import_library

VIT = {"depth": 2, "dim": 8, "heads": 2, "patch": 8, "image": 16, "classes": 3}


@pytest.mark.parametrize("over", ["feature", "sample"])
@pytest.mark.parametrize(("spatial", "shape"), [(0, (2, 5, 8)), (2, (2, 8, 3, 4))])
def test_orthogonal_sum_is_pythagorean(over, spatial, shape):
    x, f = torch.randn(2, *shape, dtype=torch.float64)
    y = OrthogonalSum(spatial=spatial, over=over)(x, f)
    channel = -1 - spatial
    axes = (channel,) if over == "feature" else (1, 2, 3)[: x.ndim - 1]
    added = y - x
    assert (added * x).sum(axes).abs().max() < 1e-4  # ε |f| / |x|
    torch.testing.assert_close(y.square().sum(axes), (x.square() + added.square()).sum(axes), rtol=1e-5, atol=1e-5)
    if over == "feature":  # written out for one token or pixel
        place = (1, slice(None), 2, 1) if spatial else (1, 2)
        a, b = x[place], f[place]
        torch.testing.assert_close(y[place], a + b - a * (a @ b) / (a @ a + 1e-6))


@pytest.mark.parametrize("name", ["vit-tiny-16", "resnetv2", "convnext"])
def test_the_stream_never_gets_smaller(name):
    options = VIT if name.startswith("vit") else {"width": 8, "classes": 3, "depth": 14}
    model = sw.build(name, scheme="orthogonal", **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    growth = []

    def compare(module: Residual, args: tuple[torch.Tensor], y: torch.Tensor) -> None:
        channel = -1 - module.site.spatial
        growth.append((y.norm(dim=channel) / args[0].norm(dim=channel)).detach())

    for module in model.modules():
        if isinstance(module, Residual) and isinstance(module.shortcut, Carry):
            module.register_forward_hook(compare)
    side = 16 if name.startswith("vit") else 32
    model(torch.randn(2, 3, side, side))
    assert len(growth) > 2
    assert min(float(each.min()) for each in growth) > 1 - 1e-4
    assert max(float(each.max()) for each in growth) > 1.01


def test_two_joins_are_refused():
    with pytest.raises(sw.SkipwayError, match="keep one"):
        sw.schemes.parse_scheme("orthogonal + orthogonal")
    with pytest.raises(sw.SkipwayError, match="no other join"):
        sw.build("vit-tiny-16", scheme="orthogonal + hyperconnections(2)", **VIT)


def test_another_join_is_refused_from_outside():
    model = torch.nn.Sequential(*(torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True) for _ in range(2)))
    with pytest.raises(sw.SkipwayError, match="another join"):
        sw.rescheme(model, torch.randn(3, 2, 8), "orthogonal")


def at_token(x: torch.Tensor, spatial: int) -> torch.Tensor:
    """The channels of one token or pixel."""
    return x[1, :, 2, 1] if spatial else x[1, 2]


def randomise_(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module


LAYOUTS = [(0, (2, 5, 8)), (2, (2, 8, 3, 4))]


@pytest.mark.parametrize(("spatial", "shape"), LAYOUTS)
@pytest.mark.parametrize(("rank", "total"), [(3, None), (0, 1.0), (3, 1.0), (3, 2.0)])
def test_laurel_is_equations_3_and_5(rank, total, spatial, shape):
    """Menghani et al. 2025: x + f + B A x (eq. 3), α f + β (B A x + x) (eq. 5), α and β a softmax (sec. 2.1)."""
    join = randomise_(sw.LAuReL(rank=rank, total=total).join(sw.Site(dim=8, spatial=spatial))).double()
    x, f = torch.randn(2, *shape, dtype=torch.float64)
    y = at_token(join(x, f), spatial)
    x, f = at_token(x, spatial), at_token(f, spatial)
    weights = torch.ones(2) if total is None else total * join.logits.exp() / join.logits.exp().sum()
    alpha, beta = weights.tolist()
    skip = x if rank == 0 else x + join.map.up.weight @ (join.map.down.weight @ x)
    torch.testing.assert_close(y, alpha * f + beta * skip)


def test_laurel_starts_a_as_the_paper_says():
    """Sec. 3.3: Xavier for convolutions, A[i, j] = 1 / √(rD) where i mod r = j for language models; B = 0."""
    tokens, maps = (sw.LAuReL(rank=2).join(sw.Site(dim=6, kind=kind)).map for kind in ("mlp", "conv"))
    expected = torch.tensor([[float(i % 2 == j) for i in range(6)] for j in range(2)]) / 12**0.5
    torch.testing.assert_close(tokens.down.weight, expected)
    assert not torch.equal(maps.down.weight, expected)
    assert not tokens.up.weight.any()
    assert not maps.up.weight.any()


def test_laurel_r_times_2c_plus_2_parameters_a_connection():
    """Sec. 2.4 and 3.2.1."""
    sizes = [
        sum(p.numel() for p in sw.build("vit-tiny-16", scheme=s, **VIT).parameters()) for s in ("plain", "laurel(4)")
    ]
    assert sizes[1] - sizes[0] == 4 * (2 * 4 * 8 + 2)


@pytest.mark.parametrize("scheme", ["laurel", "laurel(rank=0)", "laurel(total=None)"])
@pytest.mark.parametrize("name", ["vit-tiny-16", "resnet-cifar", "se-resnet", "convnext", "swin-tiny"])
def test_laurel_starts_as_the_family(name, scheme):
    options = {
        "vit-tiny-16": VIT,
        "swin-tiny": {"dim": 8, "heads": 2, "blocks": (2, 2), "window": 2, "image": 16, "classes": 3},
    }.get(name, {"depth": 4 if name == "convnext" else 14, "width": 8, "classes": 3})
    family, network = (sw.build(name, scheme=each, **options).eval() for each in ("identity", scheme))
    assert not network.load_state_dict(family.state_dict(), strict=False).unexpected_keys
    side = 32 if name == "convnext" else 16
    x = torch.randn(2, 3, side, side)
    torch.testing.assert_close(network(x), family(x), rtol=1e-5, atol=1e-6)


def test_gemma3n_adds_the_same_low_rank_map():
    """transformers' block is x + norm(B A x): ours where its norm is the identity."""
    pytest.importorskip("transformers")
    import_library("transformers")
    gemma = import_module("transformers.models.gemma3n.modeling_gemma3n")
    config = type("Config", (), {"hidden_size": 8, "laurel_rank": 3, "rms_norm_eps": 1e-6})()
    theirs = randomise_(gemma.Gemma3nTextLaurelBlock(config))
    theirs.post_laurel_norm = nn.Identity()
    join = sw.LAuReL(rank=3, total=None).join(sw.Site(dim=8, spatial=0, kind="mlp"))
    join.map.down.load_state_dict(theirs.linear_left.state_dict())
    join.map.up.load_state_dict(theirs.linear_right.state_dict())
    x, f = torch.randn(2, 2, 5, 8)
    torch.testing.assert_close(join(x, f), f + theirs(x))


@pytest.mark.parametrize(("spatial", "shape"), LAYOUTS)
def test_highway_is_equation_3(spatial, shape):
    """Srivastava et al. 2015: y = H T + x (1 - T), T = σ(Wᵀ x + b)."""
    join = randomise_(HighwayGate(8, bias=-1.0, spatial=spatial)).double()
    x, h = torch.randn(2, *shape, dtype=torch.float64)
    y = at_token(join(x, h), spatial)
    x, h = at_token(x, spatial), at_token(h, spatial)
    t = torch.sigmoid(join.map.weight @ x + join.bias)
    torch.testing.assert_close(y, h * t + x * (1 - t))


@pytest.mark.parametrize(("spatial", "shape"), LAYOUTS)
def test_gru_gate_is_the_papers_equations(spatial, shape):
    """Parisotto et al. 2020, sec. 3.2, "GRU-type gating", with b_g = -b."""
    join = randomise_(GRUGate(8, bias=-2.0, spatial=spatial)).double()
    x, y = torch.randn(2, *shape, dtype=torch.float64)
    out = at_token(join(x, y), spatial)
    x, y = at_token(x, spatial), at_token(y, spatial)
    (w_r, u_r), (w_z, u_z) = (rows.split(8, dim=1) for rows in join.gates.weight.split(8))
    w_g, u_g = join.candidate.weight.split(8, dim=1)
    r = torch.sigmoid(w_r @ y + u_r @ x)
    z = torch.sigmoid(w_z @ y + u_z @ x + join.bias)
    h = torch.tanh(w_g @ y + u_g @ (r * x))
    torch.testing.assert_close(out, (1 - z) * x + z * h)


@pytest.mark.parametrize(("scheme", "passed"), [("highway", 24), ("gtrxl", 24), ("highway('depth')", 12)])
def test_gates_keep_what_their_bias_says(scheme, passed):
    """At the start every gate is σ(b), whatever passes: the stem's share in the mixing matrix is (1 - σ(b))^L."""
    bias = -2.0 if passed == 24 else -math.log(11)
    kept = 1 - 1 / (1 + math.exp(-bias))
    options = VIT | {"depth": passed // 2, "dim": 32}
    model = sw.build("vit-tiny-16", scheme=scheme, **options)
    mixing = sw.depth_mixing(model, torch.randn(4, 3, 16, 16)).coefficients
    tolerance = 1e-4 if scheme.startswith("highway") else 0.03  # the candidate passes some of x, too
    assert float(mixing[-1, 0]) == pytest.approx(kept**passed, abs=tolerance)
    if scheme.startswith("highway"):
        steps = torch.arange(passed + 1)[:, None] - torch.arange(1, passed + 1)
        expected = ((1 - kept) * kept ** (steps.float())).where(steps >= 0, torch.zeros(()))
        torch.testing.assert_close(mixing[:, 1:], expected, rtol=1e-3, atol=1e-4)


def test_laurel_mixes_by_the_powers_of_beta():
    """M[l, i] = α β^(l - i), the stem's share β^l: with total = 1 both are ½ at the start."""
    model = sw.build("vit-tiny-16", scheme="laurel(total=1.0)", **VIT | {"depth": 3})
    mixing = sw.depth_mixing(model, torch.randn(2, 3, 16, 16)).coefficients
    expected = torch.tensor(
        [[0.5 ** (row - max(column - 1, 0)) if column <= row else 0.0 for column in range(7)] for row in range(7)]
    )
    torch.testing.assert_close(mixing, expected, rtol=1e-4, atol=1e-5)


def expectation(function: Callable[[torch.Tensor], torch.Tensor], variance: float) -> float:
    """E f(N(0, v)), by a sum over a fine grid."""
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2)
    return float((function(z * variance**0.5) * weight).sum() / weight.sum())


@pytest.mark.parametrize("scheme", ["laurel(rank=0, total=1.0)", "laurel", "highway(-1.0)", "gtrxl(-1.0)"])
def test_the_streams_variance_is_what_the_theory_says(scheme):
    """Branches of unit variance, independent of the stream."""
    dim, depth = 256, 8
    dressing = sw.schemes.parse_scheme(scheme)
    x, variance, t = torch.randn(512, dim), 1.0, torch.sigmoid(torch.tensor(-1.0)).item()
    with torch.no_grad():
        for index in range(depth):
            join = dressing.join(sw.Site(dim=dim, index=index, depth=depth, spatial=0, kind="mlp"))
            x = join(x, torch.randn(512, dim))
            if scheme == "laurel":
                variance += 1
            elif scheme.startswith("laurel"):
                variance = (variance + 1) / 4
            elif scheme.startswith("highway"):
                variance = (1 - t) ** 2 * variance + t**2
            else:  # W_g | U_g from U(-1/√(2C), 1/√(2C)), r = ½
                inner = (1 + variance / 4) / 6
                variance = (1 - t) ** 2 * variance + t**2 * expectation(lambda s: torch.tanh(s).square(), inner)
            assert float(x.var()) == pytest.approx(variance, rel=0.1)


def test_gates_are_not_decayed_but_their_maps_are():
    for scheme, names in (
        ("laurel", {"logits": False, "map.down.weight": True, "map.up.weight": True}),
        ("highway", {"bias": False, "map.weight": True}),
        ("gtrxl", {"bias": False, "gates.weight": True, "candidate.weight": True}),
    ):
        model = sw.build("vit-tiny-16", scheme=scheme, **VIT)
        groups = sw.param_groups(model, lr=1.0, weight_decay=0.1)
        decayed = {id(p) for group in groups for p in group["params"] if group["weight_decay"]}
        join = sw.chain(model)[0].residual.join
        assert {name: id(p) in decayed for name, p in join.named_parameters()} == names


@pytest.mark.parametrize("scheme", ["laurel", "highway", "gtrxl"])
def test_joins_keep_the_type_under_autocast_and_in_bfloat16(scheme):
    model = sw.build("vit-tiny-16", scheme=scheme, **VIT).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.1)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_what_makes_no_sense_together_is_refused():
    with pytest.raises(sw.SkipwayError, match="keep one"):
        sw.schemes.parse_scheme("laurel + highway")
    with pytest.raises(sw.SkipwayError, match="the skip is cut"):
        sw.build("vit-tiny-16", scheme="plain + gtrxl", **VIT)
    with pytest.raises(sw.SkipwayError, match="rank=0"):
        sw.LAuReL(rank=0, total=None)


@pytest.mark.parametrize("scheme", ["orthogonal", "laurel(rank=2)", "laurel(rank=2, total=None)", "highway", "gtrxl"])
def test_a_watched_join_is_one_connection(scheme):
    model = sw.build("vit-tiny-16", scheme=scheme, **VIT)
    watched = sw.chain(model, torch.zeros(1, 3, 16, 16))
    assert [each.name for each in watched] == [each.name for each in sw.chain(model)]
    assert not [each for each in watched.refused if each.owner.startswith("blocks")]
