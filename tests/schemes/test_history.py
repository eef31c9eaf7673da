"""Schemes that read earlier outputs, against their papers' equations written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import skipway as sw
from skipway.errors import SkipwayError
from skipway.nn import AttentionExit, AttentionRead, Residual
from skipway.schemes import parse_scheme
from skipway.studies.chains import block_chain

VIT = {"depth": 3, "dim": 8, "heads": 2, "patch": 8, "image": 16, "classes": 3}
FAMILIES = {
    "resnet-cifar": {"depth": 14, "width": 4, "stem_width": 4, "placement": "preactivation"},  # padded shortcuts
    "se-resnet": {"depth": 26, "width": 8, "stem_width": 8, "block": "bottleneck", "placement": "preactivation"},
    "vit-tiny-16": VIT,
    "cait-xxs24": {"depth": 1, "dim": 8, "heads": 2, "patch": 8, "image": 16},
    "convnext": {"depth": 6, "width": 8},
    "swin-tiny": {"dim": 8, "heads": 2, "blocks": (2, 2), "window": 2, "image": 16},
}
SCHEMES = [
    "attentionresiduals",
    "attentionresiduals(blocks=None)",
    "attentionresiduals(blocks=2)",
    "denseformer",
    "denseformer(dilation=2, period=2)",
    "mudd",
    "x0residual",
    "valueresiduals(first=0.0)",
]


def randomise_(module: nn.Module, *names: str) -> nn.Module:
    """Random numbers in the parameters whose name holds one of the names, or in all."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not names or any(each in name for each in names):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_start_is_the_plain_network(name, scheme):
    """Sec. 5 of "Attention Residuals" with w = 0; (0, …, 0, 1) of DenseFormer and MUDD; r = 1, m = 0; λ = (0, 1)."""
    options = {**FAMILIES[name], "classes": 3}
    if "value" in scheme and name not in ("vit-tiny-16", "cait-xxs24"):
        with pytest.raises(SkipwayError, match="values"):
            sw.build(name, scheme=scheme, **options)
        return
    plain, ours = (sw.build(name, scheme=each, **options).double() for each in ("identity", scheme))
    assert not ours.load_state_dict(randomise_(plain).state_dict(), strict=False).unexpected_keys
    side = 16 if name == "vit-tiny-16" else 64
    x = torch.randn(3, 3, side, side, dtype=torch.float64)
    for network in (plain, ours):
        nn.functional.cross_entropy(network(x), torch.arange(3)).backward()
    theirs = dict(plain.named_parameters())
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None, key
        if (other := theirs.pop(key, None)) is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-6, atol=1e-9, msg=key)
    assert not theirs
    for map, other in zip(sw.stage_features(ours, x), sw.stage_features(plain, x), strict=True):
        torch.testing.assert_close(map, other, rtol=1e-6, atol=1e-9)


def branches(network: nn.Module) -> list[nn.Module]:
    return [nn.Sequential(c.residual.pre, c.residual.branch) for c in sw.chain(network)]


def attend(query: torch.Tensor, sources: list[torch.Tensor], rescale: bool) -> torch.Tensor:
    """Eq. 2-4 for each token."""
    out = torch.zeros_like(sources[0])
    for place in torch.cartesian_prod(*map(torch.arange, sources[0].shape[:-1])).tolist():
        values = torch.stack([source[tuple(place)] for source in sources])
        keys = values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        weights = torch.exp(keys @ query)
        out[tuple(place)] = (weights / weights.sum()) @ values * (len(sources) if rescale else 1)
    return out


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("blocks", [None, 3, 2])
def test_attention_residuals_are_the_papers_equations(blocks, rescale):
    """Eq. 1 for all sources; eq. 5 and 6 for blocks, of two and of three branches here."""
    network = sw.build("vit-tiny-16", scheme=f"attentionresiduals(blocks={blocks}, rescale={rescale})", **VIT).eval()
    randomise_(network)
    size = 1 if blocks is None else -(-6 // blocks)
    with torch.no_grad():
        x = torch.randn(2, 3, 16, 16)
        done, partial = [network.stem(x)], None
        queries = [c.residual.streams.read for c in sw.chain(network)]
        for index, (branch, read) in enumerate(zip(branches(network), queries, strict=True)):
            sources = done if partial is None else [*done, partial]
            h = sources[0] if read is None else attend(read.query, sources, rescale)
            out = branch(h)
            partial = out if partial is None else partial + out
            if (index + 1) % size == 0:
                done, partial = [*done, partial], None
        last = attend(network.head.close.read.query, done if partial is None else [*done, partial], rescale)
        expected = nn.Sequential(*list(network.head)[1:])(last)
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)


def test_what_is_read_is_no_larger_than_the_largest_source():
    """A convex combination, for any query."""
    read = AttentionRead(8, spatial=0, rescale=False)
    nn.init.normal_(read.query, std=3)
    sources = tuple(torch.randn(2, 5, 8) * 10**power for power in range(-2, 3))
    assert (read(sources).norm(dim=-1) <= torch.stack(sources).norm(dim=-1).amax(0) * (1 + 1e-5)).all()


@pytest.mark.parametrize("spatial", [0, 2])
def test_queries_weigh_by_direction_alone(spatial):
    """Keys are normalised: a source ten times as large has the same weight."""
    read = AttentionRead(4, spatial=spatial, rescale=False)
    nn.init.normal_(read.query)
    shape = (2, 4, 3, 3) if spatial else (2, 3, 4)
    a, b = torch.randn(2, *shape)
    weight = (read((a, b)) - b).norm() / (a - b).norm()
    larger = (read((10 * a, b)) - b).norm() / (10 * a - b).norm()
    torch.testing.assert_close(weight, larger, rtol=0.1, atol=0)


@pytest.mark.parametrize(("dilation", "period"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_denseformer_is_the_papers_average(dilation, period):
    """X_i = B_i(Y_(i-1)), Y_i = Σ α_ij X_j over j ≡ i mod dilation, after every period-th block."""
    scheme = f"denseformer(dilation={dilation}, period={period})"
    network = randomise_(sw.build("vit-tiny-16", scheme=scheme, **{**VIT, "depth": 5}), "weights").eval()
    with torch.no_grad():
        x = torch.randn(2, 3, 16, 16)
        y = network.stem(x)
        outputs, parts = [y], branches(network)
        for block in range(1, 6):
            for branch in parts[2 * block - 2 : 2 * block]:
                y = y + branch(y)
            outputs.append(y)
            weights = sw.chain(network)[2 * block - 1].residual.streams.weights
            if block % period:
                assert weights is None
                continue
            read = [j for j in range(block + 1) if (block - j) % dilation == 0]
            y = sum(weight * outputs[j] for weight, j in zip(weights, read, strict=True))
        torch.testing.assert_close(network(x), nn.Sequential(*list(network.head)[1:])(y), rtol=1e-4, atol=1e-5)


def test_mudd_is_the_papers_equations():
    """Eq. 5 and 6 of Xiao et al. 2025, the mixture for the stream."""
    network = randomise_(sw.build("vit-tiny-16", scheme="mudd", **VIT), "streams").eval()
    with torch.no_grad():
        x = torch.randn(2, 3, 16, 16)
        y = network.stem(x)
        outputs, parts = [y], branches(network)
        for block in range(1, 4):
            for branch in parts[2 * block - 2 : 2 * block]:
                y = y + branch(y)
            outputs.append(y)
            mixing = sw.chain(network)[2 * block - 1].residual.streams
            normed = y / (y.square().mean(-1, keepdim=True) + torch.finfo(y.dtype).eps).sqrt()
            weights = F.gelu(normed @ mixing.hidden.weight.T) @ mixing.out.weight.T + mixing.weights
            y = sum(weights[..., j, None] * outputs[j] for j in range(block + 1))
        torch.testing.assert_close(network(x), nn.Sequential(*list(network.head)[1:])(y), rtol=1e-4, atol=1e-5)


def test_x0residual_mixes_before_each_block():
    network = sw.build("vit-tiny-16", scheme="x0residual(resid=1.1, x0=0.2)", **VIT).eval()
    with torch.no_grad():
        x = torch.randn(2, 3, 16, 16)
        y = first = network.stem(x)
        for index, branch in enumerate(branches(network)):
            y = 1.1 * y + 0.2 * first if index % 2 == 0 else y
            y = y + branch(y)
        torch.testing.assert_close(network(x), nn.Sequential(*list(network.head)[1:])(y), rtol=1e-4, atol=1e-5)


def test_values_of_the_first_attention_are_mixed_into_all_others():
    network = randomise_(sw.build("vit-tiny-16", scheme="valueresiduals(first=0.3)", **VIT)).eval()
    with torch.no_grad():
        x = torch.randn(2, 3, 16, 16)
        y, first = network.stem(x), None
        for index, connection in enumerate(sw.chain(network)):
            branch, streams, h = connection.residual.branch, connection.residual.streams, connection.residual.pre(y)
            if index % 2:
                y = y + branch(h)
                continue
            q, k, v = branch.qkv(h).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            first = v if first is None else first
            v = v if index == 0 else streams.first.gain * first + streams.own.gain * v
            out = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
            y = y + branch.proj(out.transpose(1, 2).flatten(2))
        torch.testing.assert_close(network(x), nn.Sequential(*list(network.head)[1:])(y), rtol=1e-4, atol=1e-5)


def test_halved_values_halve_the_variance_of_what_attention_mixes():
    """Independent values, λ = ½: Var(½ v₁ + ½ v) = ½ Var(v)."""
    torch.manual_seed(0)
    first, own = torch.randn(2, 4, 2, 50, 64)
    streams = sw.ValueResiduals().streams(sw.Site(dim=128, index=2, since=2, depth=4, kind="attention", spatial=0))
    kept: list[torch.Tensor] = []

    def branch(h: torch.Tensor, mixed) -> torch.Tensor:
        kept.append(mixed(own))
        return h

    streams.call(branch, torch.zeros(1), (first,))
    torch.testing.assert_close(kept[0].var() / own.var(), torch.tensor(0.5), rtol=0.05, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_reach_every_parameter_within_two_steps(scheme):
    network = sw.build("vit-tiny-16", scheme=scheme, **VIT)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    reached = set()
    for _ in range(2):
        network.zero_grad()
        nn.functional.cross_entropy(network(torch.randn(3, 3, 16, 16)), torch.arange(3)).backward()
        reached |= {name for name, each in network.named_parameters() if bool((each.grad != 0).any())}
        optimizer.step()
    assert reached == {name for name, _ in network.named_parameters()}


def saved_bytes(network: nn.Module, x: torch.Tensor) -> int:
    """Memory of what a forward pass keeps for the gradient."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(x)
    del out
    return sum(storages.values())


@pytest.mark.parametrize("scheme", ["attentionresiduals(blocks=None)", "denseformer", "mudd"])
def test_memory_grows_in_proportion_to_depth(scheme):
    """L sources are kept, though L² / 2 are read."""
    options = {**VIT, "dim": 64, "patch": 4}
    x = torch.randn(2, 3, 16, 16)
    few, many = (saved_bytes(sw.build("vit-tiny-16", scheme=scheme, **{**options, "depth": d}), x) for d in (4, 16))
    assert many / few < 4.8


def test_slots_that_do_not_fit_are_refused():
    with pytest.raises(SkipwayError, match="ScaledShortcut changes the skip"):
        sw.build("vit-tiny-16", scheme="keel + attentionresiduals", **VIT)
    with pytest.raises(SkipwayError, match="LayerNorm follows the addition"):
        Residual(nn.Identity(), post=nn.LayerNorm(4), streams=sw.AttentionResiduals().streams(sw.Site(dim=4)))
    with pytest.raises(SkipwayError, match="keep one"):
        sw.schemes.parse_scheme("denseformer + hyperconnections(2)")
    with pytest.raises(SkipwayError, match="blocks=0"):
        sw.schemes.parse_scheme("attentionresiduals(blocks=0)")


class ParallelBlock(nn.Module):
    """y = x + (attention + MLP): one connection per block, of kind attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Linear(8, 8)

    def forward(self, x):
        h = self.norm(x)
        return x + (self.attention(h, h, h, need_weights=False)[0] + self.mlp(h))


@pytest.mark.parametrize("scheme", ["denseformer", "mudd", "x0residual"])
def test_branches_that_make_no_blocks_of_attention_and_mlp_are_not_miscounted(scheme):
    """A chain of MLPs, or a second attention, is refused; in a network that exists each block is counted as one."""
    with pytest.raises(SkipwayError, match=r"kind='mlp' behind 0 branches .* attention and the MLP after it"):
        block_chain(scheme, 2, width=4)
    with pytest.raises(SkipwayError, match=r"kind='attention' behind 1 branch "):
        parse_scheme(scheme).streams(sw.Site(dim=8, index=1, since=1, depth=3, kind="attention", spatial=0))
    torch.manual_seed(0)
    model, x = nn.Sequential(*(ParallelBlock() for _ in range(3))).eval(), torch.randn(2, 4, 8)
    expected = model(x)
    sw.rescheme(model, x, scheme)
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    mixing = [p for name, p in model.named_parameters() if "residual_" in name and p.numel() and p.grad is not None]
    assert any(bool(parameter.grad.any()) for parameter in mixing)
    layers = [nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True, norm_first=True) for _ in range(3)]
    model = nn.Sequential(*layers).eval()
    expected = model(x)
    operation = sw.rescheme(model, x, scheme)
    assert operation.touched["1:1"] == "1.norm1 to 1.dropout1"  # branch by branch, where blocks are as they are counted
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_networks_are_exported_whole(scheme):
    network, x = randomise_(sw.build("vit-tiny-16", scheme=scheme, **VIT)).eval(), torch.randn(2, 3, 16, 16)
    exported = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(exported(x), network(x), rtol=1e-4, atol=1e-5)


def test_a_read_of_one_source_is_that_source():
    x = torch.randn(2, 5, 4)
    assert AttentionExit(4, spatial=0)(x) is x
