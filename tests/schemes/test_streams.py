"""Schemes that carry several streams, against their papers' equations written out token by token."""

from __future__ import annotations

import math
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.errors import SkipwayError
from skipway.nn import (
    AttentionRead,
    DynamicFracConnection,
    DynamicHyperConnection,
    GatedExit,
    GatedResidual,
    HyperConnection,
    ManifoldHyperConnection,
    Residual,
    StreamEntry,
    StreamExit,
)
from skipway.probes.features import features
from skipway.zoo.sources import import_library

FAMILIES = {
    "resnet-cifar": {"depth": 8, "width": 4, "stem_width": 4, "shortcut": "projection", "placement": "preactivation"},
    "se-resnet": {"depth": 10, "width": 8, "stem_width": 8, "squeeze": 4},
    "vit-tiny-16": {"depth": 2, "dim": 8, "heads": 2, "patch": 8, "image": 16},
    "cait-xxs24": {"depth": 1, "dim": 8, "heads": 2, "patch": 8, "image": 16},
    "convnext": {"depth": 4, "width": 8},
    "swin-tiny": {"dim": 8, "heads": 2, "blocks": (2, 2), "window": 2, "image": 16},
}


def randomise_(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def plain_and(name: str, scheme: str) -> tuple[nn.Module, nn.Module]:
    """The family's plain network and the one with several streams, with the same weights where both have them."""
    options = {"classes": 3, **FAMILIES[name]}
    plain, several = sw.build(name, scheme="identity", **options), sw.build(name, scheme=scheme, **options)
    assert not several.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    return plain, several


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scheme", ["hyperconnections(3)", "hyperconnections(2, dynamic=False)"])
@pytest.mark.parametrize("name", FAMILIES)
def test_hyperconnections_start_as_the_plain_network(name, scheme, training):
    """Zhu et al. 2025, eq. 14: streams that start equal stay equal, in outputs and in the gradients of the branches."""
    plain, several = (network.train(training) for network in plain_and(name, scheme))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(several(x), plain(x), rtol=1e-5, atol=1e-6)
    for network in (plain, several):
        network.zero_grad()
        nn.functional.cross_entropy(network(x), torch.arange(2)).backward()
    theirs = dict(plain.named_parameters())
    shared = [(name, p) for name, p in several.named_parameters() if name in theirs]
    assert len(shared) == len(theirs)
    for name, parameter in shared:
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5, msg=name)
    for ours, one in zip(sw.stage_features(several, x), sw.stage_features(plain, x), strict=True):
        torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-5)


def written_out(connection: HyperConnection, streams: torch.Tensor, branch: nn.Module) -> torch.Tensor:
    """Eq. 3-5 and 10-13 for one token H (n, d)."""
    a_m, a_r, b = connection.static.split((1, connection.count, 1), dim=1)
    if isinstance(connection, DynamicHyperConnection):
        w_m, w_r, w_b = connection.map.weight.T.split((1, connection.count, 1), dim=1)
        normed = connection.norm(streams)
        a_m = connection.mix_scale.gain * torch.tanh(normed @ w_m) + a_m  # eq. 12
        a_r = connection.mix_scale.gain * torch.tanh(normed @ w_r) + a_r  # eq. 13
        b = connection.write_scale.gain * torch.tanh(normed @ w_b) + b  # eq. 11
    h = a_m.T @ streams  # eq. 3
    return b @ branch(h) + a_r.T @ streams  # eq. 4 and 5


@pytest.mark.parametrize("spatial", [0, 2])
@pytest.mark.parametrize("kind", [HyperConnection, DynamicHyperConnection])
def test_hyperconnection_is_the_papers_equations(kind, spatial):
    dim = {"dim": 5} if kind is DynamicHyperConnection else {}
    connection = randomise_(kind(3, 1, spatial=spatial, **dim))
    map = nn.Linear(5, 5)
    branch = map if spatial == 0 else nn.Conv2d(5, 5, 1)
    if spatial:
        branch.load_state_dict({"weight": map.weight[..., None, None], "bias": map.bias})
    s = torch.randn(3, 2, 4, 5)  # n, N, tokens, d
    folded = s.flatten(0, 1)
    folded = folded if spatial == 0 else folded.unflatten(1, (2, 2)).movedim(-1, 1)
    out = Residual(branch, streams=connection)(folded)
    out = out if spatial == 0 else out.movedim(1, -1).flatten(1, 2)
    out = out.unflatten(0, (3, 2))
    for sample in range(2):
        for token in range(4):
            expected = written_out(connection, s[:, sample, token], map)
            torch.testing.assert_close(out[:, sample, token], expected, rtol=1e-4, atol=1e-5)


def test_where_a_branch_halves_the_map_weights_per_pixel_are_averaged():
    """Four pixels become one, and so do the weights that write it."""
    connection = randomise_(DynamicHyperConnection(2, 0, spatial=2, dim=4))
    branch, short = nn.Conv2d(4, 6, 2, 2), nn.Conv2d(4, 6, 2, 2)
    s = torch.randn(2 * 3, 4, 4, 4)
    x, carried, write = connection(s)
    out = Residual(branch, shortcut=sw.nn.Projection(short), streams=connection)(s).unflatten(0, (2, 3))
    pooled = write.unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).mean((-3, -1))
    expected = short(carried).unflatten(0, (2, 3)) + pooled * branch(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [(3, 8, 1), (3, 8, 2), (3, 1, 8), (3, 1, 1)])
@pytest.mark.parametrize("scheme", ["hyperconnections(2)", "mhc(n=2)", "gatedstreams(n=2)", "fracconnections"])
def test_maps_one_pixel_wide(scheme, side):
    """The ResNet takes any height and width, and weights per pixel follow the strided branch on both axes."""
    network = sw.build("resnet-cifar", depth=8, width=4, stem_width=4, classes=3, scheme=scheme)
    assert network(torch.randn(2, *side)).shape == (2, 3)


class Pooled(nn.Module):
    """A norm that counts its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        return x


@pytest.mark.parametrize(
    ("shortcut", "samples"),
    [
        (sw.nn.Carry(), 2),
        (sw.nn.ScaledShortcut(0.5, sw.nn.Carry()), 2),
        (sw.nn.Pad(0, 1), 2),
        (sw.nn.Projection(nn.Identity()), 2 + 3 * 2),
        (sw.nn.ScaledShortcut(0.5, sw.nn.Projection(nn.Identity())), 2 + 3 * 2),
    ],
)
def test_what_is_prepared_is_what_is_read(shortcut, samples):
    """Norms of `pre` take the N samples that the branch reads, and all n·N streams only where the shortcut reads h."""
    pre, connection = Pooled(), HyperConnection(3, 0, spatial=2)
    residual = Residual(nn.Identity(), pre=pre, shortcut=shortcut, streams=connection)
    s = torch.randn(3 * 2, 4, 2, 2)
    factor = getattr(shortcut, "factor", 1.0)
    expected = factor * s.unflatten(0, (3, 2)) + s[:2]
    torch.testing.assert_close(residual(s).unflatten(0, (3, 2)), expected)
    assert pre.seen == [samples]


def test_streams_do_not_stay_equal():
    """P38: equal streams with equal weights would stay equal for ever; reading them in turn breaks the tie."""
    _, several = plain_and("vit-tiny-16", "hyperconnections(4, dynamic=False)")
    optimizer = torch.optim.SGD(several.parameters(), lr=0.1)
    x = torch.randn(4, 3, 16, 16)
    for _ in range(2):
        nn.functional.cross_entropy(several(x), torch.arange(4) % 3).backward()
        optimizer.step()
    streams = features(several, x, ["-1:after"])["-1:after"].unflatten(0, (4, 4))
    assert all(not torch.allclose(streams[0], streams[other]) for other in (1, 2, 3))


def test_a_connection_learns_to_leave_the_identity_and_its_numbers_are_not_decayed():
    """P30: decay on A shrinks the skip at every connection."""
    network = sw.build("vit-tiny-16", scheme="hyperconnections", classes=3, **FAMILIES["vit-tiny-16"])
    groups = sw.param_groups(network, lr=1.0, weight_decay=0.1)
    decayed = {id(p) for group in groups for p in group["params"] if group["weight_decay"]}
    for module in network.modules():
        if isinstance(module, DynamicHyperConnection):
            assert {n: id(p) in decayed for n, p in module.named_parameters()} == {
                "static": False,
                "norm.weight": False,
                "norm.bias": False,
                "map.weight": True,
                "mix_scale.gain": False,
                "write_scale.gain": False,
            }


def test_widen_is_the_papers_factor_of_the_output_maps():
    """Sec. 4: √n on the last map of attention and MLP."""
    networks = []
    for widen in (False, True):
        torch.manual_seed(0)
        scheme = f"hyperconnections(4, widen={widen})"
        networks.append(sw.build("vit-tiny-16", scheme=scheme, **FAMILIES["vit-tiny-16"]))
    for plain, wide in zip(*map(sw.chain, networks), strict=True):
        torch.testing.assert_close(wide.path[-1].weight, 2 * plain.path[-1].weight)


@pytest.mark.parametrize("name", ["vit-tiny-16", "resnet-cifar"])
def test_operations_keep_several_streams(name):
    _, network = plain_and(name, "hyperconnections(2)")
    x = torch.randn(2, 3, 16, 16)
    expected = randomise_(network.eval())(x)
    torch.testing.assert_close(sw.fuse(network)(x), expected, rtol=1e-4, atol=1e-4)
    sw.accelerate(network, x)
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)


def test_stack_with_others_and_refusals():
    several = sw.build(
        "vit-tiny-16", scheme="hyperconnections(2) + layerscale + stochasticdepth(0.1)", image=32, depth=1
    )
    assert several(torch.randn(2, 3, 32, 32)).shape == (2, 1000)
    with pytest.raises(SkipwayError, match="each carry several streams"):
        sw.schemes.parse_scheme("hyperconnections(2) + hyperconnections(4)")
    with pytest.raises(SkipwayError, match="batch axis of 3.*multiple of 2.*StreamEntry"):
        Residual(nn.Identity(), streams=HyperConnection(2, 0, spatial=0))(torch.zeros(3, 4))
    with pytest.raises(SkipwayError, match="Cut leaves nothing of the streams"):
        sw.build("vit-tiny-16", scheme="plain + hyperconnections(2)", image=32, depth=1)
    with pytest.raises(SkipwayError, match="n=0"):
        sw.schemes.parse_scheme("hyperconnections(0)")
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).eval()
    with pytest.raises(SkipwayError, match="no block that adds to x itself"):
        sw.rescheme(layer, torch.randn(2, 5, 8), "hyperconnections")


def test_entry_and_exit_are_inverse():
    x = torch.randn(3, 4)
    torch.testing.assert_close(StreamExit(4)(StreamEntry(4)(x)), x)


# Against transformers -----------------------------------------------------------------------------------------------


def transformers_module(model: str) -> ModuleType:
    """The modules of a model of transformers, beside any torchvision."""
    pytest.importorskip("transformers")
    import_library("transformers")
    return import_module(f"transformers.models.{model}.modeling_{model}")


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(7)
    return torch.autograd.grad((output * torch.randn(output.shape)).sum(), inputs)


def assert_equal(ours, theirs) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_mhc_is_that_of_deepseek_v4():
    """Forward and gradients of the whole connection as its decoder layer joins it."""
    module = transformers_module("deepseek_v4")
    config = SimpleNamespace(hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6, hidden_size=6)
    theirs, ours, branch = (
        module.DeepseekV4HyperConnection(config),
        ManifoldHyperConnection(4, dim=6, spatial=0),
        nn.Linear(6, 6),
    )
    with torch.no_grad():
        theirs.fn.copy_(ours.map.weight.copy_(torch.randn_like(theirs.fn)))
        theirs.base.copy_(ours.base.copy_(torch.randn_like(theirs.base)))
        theirs.scale.copy_(ours.scale.copy_(torch.tensor([0.7, -0.5, 1.2])))
    s = torch.randn(2, 3, 4, 6, requires_grad=True)  # N, tokens, n, d
    post, comb, x = theirs(s)
    expected = post.unsqueeze(-1) * branch(x).unsqueeze(-2) + comb.transpose(-1, -2) @ s
    out = Residual(branch, streams=ours)(s.movedim(2, 0).flatten(0, 1)).unflatten(0, (4, 2)).movedim(0, 2)
    assert_equal([out], [expected])
    assert_equal(
        gradients(out, s, ours.map.weight, ours.base, ours.scale),
        gradients(expected, s, theirs.fn, theirs.base, theirs.scale),
    )


@pytest.mark.parametrize("last", [False, True])
def test_gated_streams_are_those_of_qwen4_exp(last):
    """Forward and gradients of a connection, and of the read before the classifier."""
    module = transformers_module("qwen4_exp")
    config = SimpleNamespace(hc_count=4, hidden_size=6, hc_lowrank=5, rms_norm_eps=1e-6)
    theirs, branch = module.Qwen4ExpTextGatedResidual(config, use_combine=not last), nn.Linear(6, 6)
    kind = GatedExit if last else GatedResidual
    ours = randomise_(kind(4, dim=6, rank=5, spatial=0))
    names = {"hc_norm": "read.gain", "input_mix_weight_down": "read.down", "input_mix_weight_up": "read.up"}
    names = {f"{key}.weight": value if value == "read.gain" else f"{value}.weight" for key, value in names.items()}
    names |= {} if last else {"block_inject_weight.weight": "inject.weight"}
    theirs.load_state_dict({key: ours.state_dict()[value] for key, value in names.items()})
    s = torch.randn(2, 3, 4 * 6, requires_grad=True)
    folded = s.unflatten(-1, (4, 6)).movedim(2, 0).flatten(0, 1)
    if last:
        out, expected = ours(folded), theirs(s)
    else:
        x, carried, weights = theirs(s)
        expected = carried + (branch(x).unsqueeze(-2) * weights.unsqueeze(-1)).flatten(-2)
        out = Residual(branch, streams=ours)(folded).unflatten(0, (4, 2)).movedim(0, 2).flatten(-2)
    assert_equal([out], [expected])
    assert_equal(
        gradients(out, s, *(ours.get_parameter(value) for value in names.values())),
        gradients(expected, s, *(theirs.get_parameter(key) for key in names)),
    )


# Theory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["mhc", "mhc(n=3, form='birkhoff')"])
@pytest.mark.parametrize("name", FAMILIES)
def test_mhc_starts_near_the_plain_network(name, scheme):
    """Exactly that where the map is 0: streams that are equal are read as one and mixed to themselves."""
    plain, several = (network.eval() for network in plain_and(name, scheme))
    x = torch.randn(2, 3, 32, 32)
    assert (several(x) - plain(x)).abs().max() < 0.1 * plain(x).abs().max()
    for module in several.modules():
        if isinstance(module, ManifoldHyperConnection):
            nn.init.zeros_(module.map.weight)
    torch.testing.assert_close(several(x), plain(x), rtol=1e-4, atol=1e-5)
    assert len(sw.stage_features(several, x)) == len(sw.stage_features(plain, x))


@pytest.mark.parametrize("form", ["sinkhorn", "birkhoff"])
def test_the_mixing_is_doubly_stochastic(form):
    """What each stream gets sums to 1; what it gives, too, in the permutations' form exactly (mHC-lite)."""
    torch.manual_seed(0)
    connection = randomise_(ManifoldHyperConnection(3, dim=4, spatial=0, form=form))
    matrix = connection.mixing(torch.randn(50, connection.sizes[-1]))
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(-2), torch.ones(50, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(50, 3), rtol=0, atol=1e-2 if form == "sinkhorn" else 1e-5)
    weights = connection.mixing(connection.base.split(connection.sizes)[-1])
    assert (
        connection.mixing(ManifoldHyperConnection(3, dim=4, spatial=0, form=form).base.split(connection.sizes)[-1])[
            0, 0
        ]
        > 0.7
    )
    assert weights.shape == (3, 3)


@pytest.mark.parametrize("form", ["sinkhorn", "birkhoff"])
def test_the_mixing_is_doubly_stochastic_under_autocast(form):
    """Weights are computed in float32, so that a product of many keeps the sum of the streams."""
    connection = ManifoldHyperConnection(3, dim=4, spatial=0, form=form)
    logits = torch.randn(50, connection.sizes[-1])
    with torch.autocast("cpu", torch.bfloat16):
        narrow = connection.mixing(logits)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, connection.mixing(logits), rtol=0, atol=0)


@pytest.mark.parametrize(
    "connection",
    [
        DynamicHyperConnection(2, 0, spatial=0, dim=8),
        DynamicFracConnection(2, spatial=0, dim=8),
        AttentionRead(8, spatial=0),
    ],
    ids=lambda each: type(each).__name__,
)
def test_autocast_leaves_the_weights_of_streams_alone(connection):
    """They are computed in the type of the streams, so that they are those of a pass without autocast, to the bit."""
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter.add_(torch.randn_like(parameter))
    s = torch.randn(4, 5, 8)
    s = (s, s.flip(0)) if isinstance(connection, AttentionRead) else s
    with torch.autocast("cpu", torch.bfloat16):
        narrow = connection(s)
    torch.testing.assert_close(narrow, connection(s), rtol=0, atol=0)


@pytest.mark.parametrize(
    "scheme",
    ["fracconnections(2)", "hyperconnections(2)", "mhc(n=2)", "mhc(n=2, form='birkhoff')", "gatedstreams(n=2)"],
)
def test_streams_run_on_the_meta_device(scheme):
    """Where shapes are asked for, and torch knows no autocast."""
    network = sw.build("vit-tiny-16", scheme=scheme, device="meta", classes=3, **FAMILIES["vit-tiny-16"])
    assert network(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 3)


def test_what_streams_differ_by_shrinks_by_lambda():
    """λ = (e^hold - 1) / (e^hold + n - 1), the second eigenvalue of the start."""
    connection = ManifoldHyperConnection(4, dim=4, spatial=0)
    values = torch.linalg.eigvalsh(connection.mixing(connection.base.split(connection.sizes)[-1]).detach())
    expected = (math.e**4 - 1) / (math.e**4 + 3)
    torch.testing.assert_close(values, torch.tensor([expected] * 3 + [1.0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gated_streams_start_with_an_identity_skip_and_half_the_normalised_stream(name):
    network = sw.build(name, scheme="gatedstreams", classes=3, **FAMILIES[name])
    assert not any(isinstance(c.residual.pre, nn.LayerNorm) for c in sw.chain(network))
    connection = sw.chain(network)[0].residual.streams
    assert isinstance(connection, GatedResidual)
    for linear in (connection.read.up, connection.inject):
        nn.init.zeros_(linear.weight)
    shape = (4 * 2, sw.chain(network)[0].site.entry, 3, 3)
    s = torch.randn(shape) if connection.channel == -3 else torch.randn(shape).movedim(1, -1)
    x, carried, write = connection(s)
    assert carried is s
    assert (write == 1).all()
    each = s.unflatten(0, (4, 2))
    half = 0.5 * each / each.square().mean(connection.channel, keepdim=True).sqrt()
    torch.testing.assert_close(x, half.mean(0), rtol=1e-4, atol=1e-5)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert len(sw.stage_features(network, torch.randn(2, 3, 32, 32))) == len(network.stage_maps())


def test_counts_that_the_forms_do_not_take_are_refused():
    with pytest.raises(SkipwayError, match="at least 2 streams"):
        sw.schemes.parse_scheme("mhc(n=1)")
    with pytest.raises(SkipwayError, match="n ≤ 5"):
        sw.schemes.parse_scheme("mhc(n=6, form='birkhoff')")


@pytest.mark.parametrize("scheme", ["hyperconnections(2)", "mhc(n=2)", "gatedstreams(n=2)"])
@pytest.mark.parametrize("name", ["vit-tiny-16", "convnext"])
def test_bfloat16_and_autocast_keep_type_and_value(name, scheme):
    network = sw.build(name, scheme=scheme, classes=3, **FAMILIES[name]).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(x)
    narrow = network.bfloat16()(x.bfloat16())
    assert narrow.dtype == mixed.dtype == torch.bfloat16
    for each in (mixed, narrow):  # 8 bits, and some ten maps in a row
        assert (each.float() - expected).abs().max() < 0.05 * expected.abs().max() + 1e-3
