"""Schemes of another structure on networks of others: what can be had from outside, and what is missing else."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from tests.surgery.test_depth import Net, X, state
from torch import Tensor, nn
from torch.nn.utils import prune

import skipway as sw
from skipway.nn import Gain
from skipway.surgery import fold_gains, remove_norm, rescheme


def without_norms(blocks: int = 4) -> Net:
    torch.manual_seed(0)
    net = Net(blocks).eval()
    remove_norm(net, X, how="fold")
    return net


def post_norm(layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


TOKENS = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))


def test_fixup_starts_as_its_rule_says():
    """Last maps and the classifier 0, the others He times L^(-1/(2m - 2)), scalars around them (P1)."""
    spread = {}
    for blocks in (2, 32):
        net = without_norms(blocks)
        operation = rescheme(net, X, "fixup", start="scheme")
        assert len(operation.touched) == blocks
        first = torch.stack([block.conv1.weight.detach() for block in net.blocks])
        assert not any(block.conv2.weight.any() or block.conv1.bias.any() for block in net.blocks)
        assert not net.head.weight.any()
        assert not net(X).any()
        spread[blocks] = float(first.std()) * (6 * 9 / 2) ** 0.5 * blocks**0.5  # m = 2: L^(-1/2)
        scalars = [name for name in net.state_dict() if name.startswith("blocks.0") and "residual_" in name]
        assert scalars == [
            "blocks.0.conv1.residual_entry.bias",
            "blocks.0.conv2.residual_entry.bias",
            "blocks.0.bn2.residual_scale.multiplier.gain",
            "blocks.0.bn2.residual_scale.bias.bias",
        ]
    assert all(abs(value - 1) < 0.15 for value in spread.values())
    net.train()(X).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("scheme", ["fixup", "normfree", "zeroinit", "fixup on buffers"])
def test_undo_puts_every_value_back(scheme):
    net, (scheme, *buffers) = without_norms(), scheme.split(" on ")
    for conv in [block.conv1 for block in net.blocks if buffers]:
        weight = conv.weight.detach()
        del conv.weight
        conv.register_buffer("weight", weight)
    keys, classes, before = state(net)
    values = {name: value.clone() for name, value in net.state_dict().items()}
    rescheme(net, X, scheme, start="identity" if scheme == "normfree" else "scheme").undo()
    assert state(net)[:2] == (keys, classes)
    assert torch.equal(state(net)[2], before)
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())


def test_fixup_around_trained_weights_changes_nothing():
    net = without_norms()
    before = net(X).detach()
    assert rescheme(net, X, "fixup").report["difference"] == 0
    assert torch.equal(net(X), before)


def test_without_norms_a_deep_net_stays_finite_under_fixup_only():
    """The variance of the stream does not grow with depth (Zhang et al. 2019, theorem 1)."""
    sizes = {}
    for name in ("as it was", "fixup"):
        net = without_norms(24)
        with torch.no_grad():
            for block in net.blocks:
                for conv in (block.conv1, block.conv2):
                    nn.init.kaiming_normal_(conv.weight)
        if name == "fixup":
            rescheme(net, X, "fixup", start="scheme")
        stream = net.stem(X)
        sizes[name] = float((net.blocks(stream).std() / stream.std()).detach())
    assert sizes["fixup"] == pytest.approx(1, rel=1e-5)
    assert sizes["as it was"] > 50


def test_deepnorm_scales_the_skip_and_starts_values_and_outputs_smaller():
    """norm(αx + F) = norm(x + F/α); Xavier's distribution times β on v, o and both maps of the MLP (P12)."""
    model = post_norm(8)
    operation = rescheme(model, TOKENS, "deepnorm", start="scheme")
    assert len(operation.touched) == 16
    alpha, beta = 16**0.25, (4 * 16) ** -0.25
    factors = {module.residual_scale.factor for module in model.modules() if hasattr(module, "residual_scale")}
    assert factors == {1 / alpha}
    layer = model.layers[0]
    x = TOKENS
    attended = layer.self_attn(x, x, x, need_weights=False)[0]
    x = layer.norm1(alpha * x + attended)
    expected = layer.norm2(alpha * x + layer.linear2(F.relu(layer.linear1(x))))
    torch.testing.assert_close(layer(TOKENS), expected, rtol=1e-4, atol=1e-4)
    rows = torch.cat([each.self_attn.in_proj_weight for each in model.layers], 1).detach().chunk(3)
    xavier = 32**-0.5  # √(2/(fan_in + fan_out)) of a square map
    for weight, factor in zip(rows, (1, 1, beta), strict=True):
        assert float(weight.std()) == pytest.approx(factor * xavier, rel=0.1)
    outer = torch.stack([each.linear1.weight for each in model.layers]).detach()
    assert float(outer.std()) == pytest.approx(beta * (2 / 96) ** 0.5, rel=0.1)


def test_deepnorm_needs_a_norm_behind_the_addition():
    layer = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True, norm_first=True).eval()
    with pytest.raises(sw.SkipwayError, match=r"norms or activations in other places \(pre → post\)"):
        rescheme(layer, TOKENS, "deepnorm", start="scheme")
    with pytest.raises(sw.SkipwayError, match="no norm after the addition rescales the sum"):
        rescheme(without_norms(), X, "deepnorm", start="scheme")


@pytest.mark.parametrize(
    ("scheme", "start", "reason"),
    [
        ("fixup", "scheme", "remove_norm takes BatchNorms out|in other places"),
        ("normfree", "identity", r"in other places \(inside\+end → pre\)"),
        ("preactivation", "identity", r"\+end → pre\): their order is written in the forward"),
    ],
)
def test_norms_stand_in_the_way_and_it_is_said(scheme, start, reason):
    net = Net().eval()
    keys, classes, before = state(net)
    with pytest.raises(sw.SkipwayError, match=reason):
        rescheme(net, X, scheme, start=start)
    assert state(net)[:2] == (keys, classes)
    assert torch.equal(state(net)[2], before)


def test_normfree_from_scratch_is_refused():
    with pytest.raises(sw.SkipwayError, match="factors on the activations"):
        rescheme(without_norms(), X, "normfree", start="scheme")


def test_a_step_over_the_whole_network_is_not_taken_over_a_part():
    """L is the number of all branches (P1), so that a branch out of reach stops it."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.weight = nn.Conv2d(6, 6, 1), nn.Parameter(torch.randn(6, 6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + F.conv2d(F.relu(self.conv(x)), self.weight)

    model = nn.Sequential(*without_norms(2).blocks, Functional()).eval()
    values = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(sw.SkipwayError, match="1 of 3 connections of Sequential cannot be dressed"):
        rescheme(model, torch.randn(2, 6, 5, 5), "fixup", start="scheme")
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))


def test_attention_whose_values_cannot_be_told_apart_is_refused():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out, self.norm = nn.Linear(32, 96), nn.Linear(32, 32), nn.LayerNorm(32)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.norm(x + self.out(F.scaled_dot_product_attention(q, k, v)))

    model = nn.Sequential(Packed(), Packed()).eval()
    values = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(sw.SkipwayError, match="which of its rows are values cannot be told"):
        rescheme(model, TOKENS, "deepnorm", start="scheme")
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))


def test_normfree_standardises_what_was_trained():
    """Ŵ = g (W − μ)/(σ√fan_in) + m: what is computed stays, and the weight's size and mean have no effect any more."""
    torch.manual_seed(0)
    net = Net().eval()
    before = net(X).detach()
    operation = remove_norm(net, X, how="normfree")
    assert operation.report["difference"] < 1e-5
    torch.testing.assert_close(net(X), before, rtol=1e-4, atol=1e-5)
    gains = [m for m in net.modules() if isinstance(m, Gain)]
    assert [(gain.factor, float(gain.gain.detach())) for gain in gains] == [(0.2, 5.0)] * 4
    entries = [block.conv1.residual_entry.factor for block in net.blocks]
    assert entries == pytest.approx([(1 + 0.04 * index) ** -0.5 for index in range(4)])
    with torch.no_grad():
        net.blocks[1].conv1.weight.mul_(3).add_(0.7)
    torch.testing.assert_close(net(X), before, rtol=1e-3, atol=1e-4)
    net.train()(X).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_how_is_one_of_three():
    with pytest.raises(sw.SkipwayError, match="how='norm-free'"):
        remove_norm(Net(), X, how="norm-free")  # type: ignore[arg-type]


def test_gains_are_folded_into_the_weights_in_front():
    torch.manual_seed(0)
    net = Net().eval()
    keys, classes, _ = state(net)
    rescheme(net, X, "layerscale + skipinit + stochasticdepth")
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, Gain):
                module.gain.add_(torch.randn_like(module.gain))
    dressed, before = list(net.state_dict()), net(X).detach()
    operation = fold_gains(net, X)
    assert operation.touched == {f"blocks.{n}.bn2.residual_scale": f"blocks.{n}.bn2" for n in range(4)}
    assert state(net)[:2] == (keys, classes)
    torch.testing.assert_close(net(X), before, rtol=1e-5, atol=1e-6)
    operation.undo()
    assert list(net.state_dict()) == dressed
    assert torch.equal(net(X), before)


def test_an_existing_bias_is_written_and_not_replaced():
    """An optimizer holds it; and frozen weights beside it do not freeze it."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).eval()
    x, bias = torch.randn(2, 3, 8), layer.linear2.bias
    layer.linear2.weight.requires_grad_(False)
    rescheme(layer, x, "skipinit")
    with torch.no_grad():
        layer.dropout2.residual_scale.gain.fill_(3)
    before = bias.detach().clone()
    operation = fold_gains(layer, x)
    assert layer.linear2.bias is bias
    assert bias.requires_grad
    assert not layer.linear2.weight.requires_grad
    torch.testing.assert_close(bias, 3 * before)
    operation.undo()
    assert layer.linear2.bias is bias
    assert torch.equal(bias, before)


def test_a_gain_behind_a_map_of_pruned_weights_stays():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).eval()
    x = torch.randn(2, 3, 8)
    prune.l1_unstructured(layer.linear2, "bias", 0.5)
    rescheme(layer, x, "skipinit")
    operation = fold_gains(layer, x)
    assert "computed from other parameters in every pass" in operation.refused["dropout2.residual_scale"]
    assert list(operation.touched) == ["dropout1.residual_scale"]


def test_what_normfree_put_in_is_folded_and_what_is_no_factor_stays():
    net = without_norms()
    keys, classes, before = state(net)
    rescheme(net, X, "normfree")
    assert len(fold_gains(net, X).touched) == 4 * 4
    assert state(net)[:2] == (keys, classes)
    torch.testing.assert_close(net(X), before, rtol=1e-4, atol=1e-5)
    rescheme(net, X, "fixup")
    operation = fold_gains(net, X)
    assert set(operation.refused.values()) == {"a shift before a map is none after it where the map pads"}
    assert len(operation.touched) == 4


def test_a_gain_behind_what_does_not_commute_stays():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.map, self.act = nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.act(self.map(self.norm(x)))

    torch.manual_seed(0)
    model = Gated().eval()
    rescheme(model, TOKENS, "skipinit(init=0.5)", start="scheme")
    before = model(TOKENS).detach()
    operation = fold_gains(model, TOKENS)
    assert list(operation.refused) == ["act.residual_scale"]
    assert "the output changes by" in operation.refused["act.residual_scale"]
    assert torch.equal(model(TOKENS), before)
    with pytest.raises(sw.SkipwayError, match="nothing to fold"):
        fold_gains(nn.Linear(3, 3), TOKENS)


def pre_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True, norm_first=True).eval()


def normed(f: Tensor, gain: float | Tensor) -> Tensor:
    """γ F / rms(F) (Zhang & Sennrich 2019)."""
    return gain * f / f.square().mean(-1, keepdim=True).sqrt()


def branches(layer: nn.Module, x: Tensor, after) -> Tensor:
    """A pre-norm layer whose branches pass through `after(number, F)`."""
    h = layer.norm1(x)
    x = x + after(0, nn.MultiheadAttention.forward(layer.self_attn, h, h, h, need_weights=False)[0])
    return x + after(1, layer.linear2(F.relu(layer.linear1(layer.norm2(x)))))


def test_perinorm_starts_at_the_branch_itself_and_ends_at_its_norm():
    """F + a (γ F / rms(F) − F): a = 0 is the trained branch, a = 1 Peri-LN's, with γ as large as F on the example."""
    layer, twin = pre_norm(), pre_norm()
    operation = rescheme(layer, TOKENS, "perinorm")
    assert torch.equal(layer(TOKENS), twin(TOKENS))
    assert operation.touched[":1"] == "dropout1, as F + a (norm(F) − F) with a = 0"
    ends = [layer.dropout1.residual_scale, layer.dropout2.residual_scale]
    outputs: list[Tensor] = []
    branches(twin, TOKENS, lambda _, f: outputs.append(f) or f)
    for end, f in zip(ends, outputs, strict=True):
        size = f.square().mean(-1).sqrt().mean()
        torch.testing.assert_close(end.weight, size.expand(32), rtol=1e-4, atol=1e-4)
        nn.init.ones_(end.share)
    gains = [end.weight.detach() for end in ends]
    expected = branches(twin, TOKENS, lambda number, f: normed(f, gains[number]))
    torch.testing.assert_close(layer(TOKENS), expected, rtol=1e-4, atol=1e-4)
    layer(TOKENS).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for end in ends for p in end.parameters())
    operation.undo(force=True)
    assert torch.equal(layer(TOKENS), twin(TOKENS))


def test_perinorm_from_scratch_is_the_papers_connection():
    """Kim et al. 2025, eq. 2: y = x + norm(F(norm(x))), γ = 1, of two parallel branches together."""
    layer, twin = pre_norm(), pre_norm()
    rescheme(layer, TOKENS, "perinorm", start="scheme")
    torch.testing.assert_close(layer(TOKENS), branches(twin, TOKENS, lambda _, f: normed(f, 1)), rtol=1e-4, atol=1e-4)

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.two = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return x + (self.one(h) + self.two(h).relu())

    model = nn.Sequential(Parallel(), Parallel())
    before = [block(TOKENS) - TOKENS for block in model[:1]]
    rescheme(model, TOKENS, "perinorm", start="scheme")
    torch.testing.assert_close(model[0](TOKENS) - TOKENS, normed(before[0], 1), rtol=1e-4, atol=1e-4)


def test_prores_on_a_trained_branch_stands_at_the_end_of_its_clock():
    """a = 1 leaves what was trained; step 0 would be the shortcuts alone (Chen et al. 2026, eq. 3)."""
    layer, twin = pre_norm(), pre_norm()
    for scheme in ("prores(10)", "prores(0.5, schedule='stagewise-0')"):
        operation = rescheme(layer, TOKENS, scheme)
        assert torch.equal(layer(TOKENS), twin(TOKENS))
        assert "at the end of its warm-up" in operation.touched[":1"]
        sw.set_step(layer, 0, 100)
        assert torch.equal(layer(TOKENS), TOKENS)
        operation.undo()
        assert torch.equal(layer(TOKENS), twin(TOKENS))


class Attention(nn.Module):
    """q, k and v by maps of their own; keys and values of a memory where one is given."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(memory), self.v(memory)))


class Gated(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """y = x + F(norm(x) · scale) for one, two or three branches."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.branches, self.scale = branches, 1.0
        self.norms = nn.ModuleList([nn.LayerNorm(8, elementwise_affine=False) for _ in range(branches)])
        self.attention, self.mlp = Attention(), Gated()
        self.cross = Attention() if branches == 3 else None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        h = self.norms[0](x) * self.scale
        if self.branches == 1:
            return x + (self.attention(h) + self.mlp(h))
        x = x + self.attention(h)
        if self.cross is not None:
            x = x + self.cross(self.norms[1](x) * self.scale, memory)
        return x + self.mlp(self.norms[-1](x) * self.scale)


class Layers(nn.Module):
    """Blocks of `branches` branches; of three behind an encoder of two."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.encoder = nn.ModuleList([Layer(2) for _ in range(3 if branches == 3 else 0)])
        self.layers = nn.ModuleList([Layer(branches) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        memory, y = x, self.embed(x)
        for layer in self.encoder:
            memory = layer(memory)
        for layer in self.layers:
            y = layer(y, memory)
        return self.head(y)


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_layernormscaling_scales_all_that_enters_by_the_blocks_number(branches):
    """y = x + F(norm(x) / √b) of Sun et al. 2025: for queries, keys and values alike, for gate and up, and with the
    number of the block, whether it has one connection, two, or three; a decoder's first block is its own b = 1.
    """
    torch.manual_seed(0)
    model, twin = Layers(branches).eval(), Layers(branches).eval()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 4, 8)
    torch.testing.assert_close(model(x), twin(x))
    for stack in (twin.encoder, twin.layers):
        for number, layer in enumerate(stack):
            layer.scale = (number + 1) ** -0.5
    assert not torch.allclose(model(x), twin(x), atol=1e-3)
    operation = rescheme(model, x, "layernormscaling", start="scheme")
    torch.testing.assert_close(model(x), twin(x))
    assert not operation.refused
    inserted = {name.removesuffix(".residual_entry") for name, _ in model.named_modules() if "residual_entry" in name}
    assert {name for names in operation.touched.values() for name in names.split(", ")} == inserted


class AsItIs(nn.Module):
    """F(h) = h σ(W h): one factor is h itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.map = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + h * self.map(h).sigmoid()


class LayerOfMlps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), Gated()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ((Layer(2), AsItIs()), "a part of which is multiplied, added or put out as it is"),
        ((LayerOfMlps(), LayerOfMlps()), "which connections of Sequential make one cannot be told: all branches are"),
        ((LayerOfMlps(), Layer(2)), "an MLP, stands before the first attention"),
        (
            (Layer(1), Layer(1), LayerOfMlps(), Layer(2)),
            "the branches are attention, attention, mlp at 0 and attention, mlp at 3",
        ),
    ],
)
def test_layernormscaling_is_refused_where_the_factor_would_be_a_guess(blocks, reason):
    model = nn.Sequential(*blocks).eval()
    x = torch.randn(2, 4, 8)
    keys, before = list(model.state_dict()), model(x)
    try:
        refused = str(rescheme(model, x, "layernormscaling", start="scheme").refused)
    except sw.SkipwayError as problem:
        refused = str(problem)
        assert list(model.state_dict()) == keys
        assert torch.equal(model(x), before)
    assert re.search(reason, refused)


class Pooled(nn.Module):
    """Blocks, and a head that pools by attention and adds an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.latent = nn.ModuleList([Layer(2), Layer(2)]), nn.Parameter(torch.ones(1, 8))
        self.pool, self.head = Attention(), LayerOfMlps()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.pool(self.latent.expand(len(x), 1, 8), x))


def test_layernormscaling_leaves_a_connection_behind_a_pooling_head_alone():
    torch.manual_seed(0)
    model, x = Pooled().eval(), torch.randn(2, 4, 8)
    twin = copy.deepcopy(model)
    twin.layers[1].scale = 2**-0.5
    operation = rescheme(model, x, "layernormscaling", start="scheme")
    torch.testing.assert_close(model(x), twin(x))
    assert list(operation.refused) == ["head"]
    assert "what head carries on comes from more than one tensor" in operation.refused["head"]


class TwoConvs(nn.Module):
    """F = conv3(h) + conv1(h)."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.conv3, self.conv1 = nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(x)
        return x + self.out(self.conv3(h) + self.conv1(h))


def test_normfree_divides_what_all_first_maps_read():
    torch.manual_seed(0)
    model = nn.Sequential(*(TwoConvs() for _ in range(3))).eval()
    x = torch.randn(2, 6, 5, 5)
    before = model(x).detach()
    rescheme(model, x, "normfree")
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    factors = [[each.residual_entry.factor for each in (block.conv3, block.conv1)] for block in model]
    assert factors == [[pytest.approx((1 + 0.04 * index) ** -0.5)] * 2 for index in range(3)]


class Squeezed(nn.Module):
    """A branch of two convolutions and a gate per channel, whose maps run last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act, self.conv2 = nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1)
        self.squeeze, self.excite = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.norm, self.out = nn.BatchNorm2d(6), nn.Identity()

    def branch(self, x: Tensor) -> Tensor:
        f = self.conv2(self.act(self.conv1(x)))
        gate = self.excite(self.squeeze(f.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.out(f * gate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class SqueezedPostNorm(Squeezed):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.branch(x))


@pytest.mark.parametrize("size", [5, 1])
def test_fixup_starts_the_last_map_of_the_branch_at_zero_and_not_that_of_its_gate(size):
    """Zhang et al. 2019, sec. 3: F(x) = 0, and He's times L^(-1/(2m - 2)) of m = 2 maps in a row."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Squeezed() for _ in range(16))).eval()
    for block in model:
        del block.norm
    x = torch.randn(2, 6, size, size)
    rescheme(model, x, "fixup", start="scheme")
    assert torch.equal(model(x), x)
    assert not any(block.conv2.weight.any() for block in model)
    assert all(block.excite.weight.any() for block in model)
    spread = torch.stack([block.conv1.weight for block in model]).std().detach()
    assert float(spread) == pytest.approx(16**-0.5 * (2 / 6) ** 0.5, rel=0.15)


class Written(nn.Module):
    """y = x + F(x, t) with F in some form."""

    def __init__(self, form) -> None:
        super().__init__()
        self.form, self.wide = form, nn.Linear(6, 12)
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.form(self, x, t)


def parts_of_one_map(m: Written, x: Tensor, t: Tensor) -> Tensor:
    value, gate = m.wide(x).chunk(2, -1)
    return value * gate.sigmoid()


@pytest.mark.parametrize(
    ("form", "path"),
    [
        (lambda m, x, t: (f := m.a(x)) * m.b(f).sigmoid(), ("a",)),
        (lambda m, x, t: m.a(x) * m.b(x).sigmoid(), ()),
        (parts_of_one_map, ("wide",)),
        (lambda m, x, t: m.out(m.a(x) * F.silu(m.b(x))), ("a", "b", "out")),
        (lambda m, x, t: m.out((m.a(x) + m.b(t)).relu()), ("a", "out")),
        (lambda m, x, t: m.a(x) + m.b(t), ()),
        (lambda m, x, t: m.b(t) * m.a(x).relu(), ("a",)),
        (lambda m, x, t: m.out(0.5 * (h := m.a(x)) * (1 + torch.tanh(0.8 * (h + 0.045 * h**3)))), ("a", "out")),
    ],
    ids=["its own gate", "two maps", "parts of one", "SwiGLU", "added within", "added at the end", "factor", "GELU"],
)
def test_fixup_leaves_no_branch_other_than_zero(form, path):
    """F₀ = 0 (Zhang et al. 2019, sec. 3), whatever multiplies a branch or is added to it, or it is refused."""
    torch.manual_seed(0)
    model, given = Written(form).eval(), (torch.randn(3, 6), torch.randn(3, 6))
    assert sw.chain(model, given)[0].seen.path == path
    if path:
        rescheme(model, given, "fixup", start="scheme")
        assert torch.equal(model(*given), given[0])
    else:
        with pytest.raises(sw.SkipwayError, match="added, joined, or multiplied at its end"):
            rescheme(model, given, "fixup", start="scheme")


class PoolingBlock(nn.Module):
    """F = relu(pool(x)), without a map."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.AvgPool1d(3, 1, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_fixup_refuses_a_branch_without_maps():
    model = nn.Sequential(nn.Linear(6, 6), PoolingBlock()).eval()
    with pytest.raises(sw.SkipwayError, match="starts the last map of every branch at 0"):
        rescheme(model, torch.randn(3, 4, 6), "fixup", start="scheme")


def test_fixup_refuses_branches_that_are_added():
    model = nn.Sequential(TwoConvs(), TwoConvs()).eval()
    values = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(sw.SkipwayError, match=r"0.conv3, 0.conv1 do not follow one another \(branches in it are added"):
        rescheme(model, torch.randn(2, 6, 5, 5), "fixup", start="scheme")
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))


def test_deepnorm_leaves_the_maps_of_gates_alone():
    """β for the maps that follow one another (Wang et al. 2022, fig. 2), as in networks of ours; He's for all."""
    torch.manual_seed(0)
    model = nn.Sequential(*(SqueezedPostNorm() for _ in range(64))).eval()
    rescheme(model, torch.randn(2, 6, 5, 5), "deepnorm", start="scheme")
    beta = (4 * 64) ** -0.25
    sizes = {
        name: float(torch.stack([getattr(block, name).weight for block in model]).std().detach())
        for name in ("conv1", "conv2", "excite")
    }
    he = (2 / 6) ** 0.5
    assert sizes == {
        name: pytest.approx(factor * he, rel=0.1) for name, factor in zip(sizes, (beta, beta, 1), strict=True)
    }


class TwoConvsPostNorm(TwoConvs):
    """y = norm(x + conv3(h) + conv1(h))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(x)
        return self.norm(x + (self.conv3(h) + self.conv1(h)))


def test_deepnorm_needs_no_order_of_maps():
    """y = norm(αx + F), and β for every map (Wang et al. 2022, fig. 2), also where branches are added."""
    torch.manual_seed(0)
    x, depth = torch.randn(2, 6, 5, 5), 64
    model = nn.Sequential(*(TwoConvsPostNorm() for _ in range(depth))).eval()
    before = model(x).detach()
    rescheme(copy.deepcopy(model), x, "deepnorm")  # checks that the outputs stay
    operation = rescheme(model, x, "deepnorm", start="scheme")
    assert len(operation.touched) == depth
    for name, fan in (("conv3", 54), ("conv1", 6)):
        size = torch.stack([getattr(block, name).weight for block in model]).std().detach()
        assert float(size) == pytest.approx((4 * depth) ** -0.25 * (2 / fan) ** 0.5, rel=0.1)
    block, h = TwoConvsPostNorm(), x.relu()
    block.load_state_dict(model[0].state_dict())
    expected = block.norm(depth**0.25 * x + block.conv3(h) + block.conv1(h))
    torch.testing.assert_close(copy.deepcopy(model[0]).train()(x), expected, rtol=1e-4, atol=1e-4)
    operation.undo()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("form", "maps"),
    [
        (lambda m, x, t: m.a(x) * m.b(x).sigmoid(), ("a", "b")),
        (lambda m, x, t: (f := m.a(x)) * m.b(f).sigmoid(), ("a",)),
        (lambda m, x, t: m.a(x) + m.b(t), ("a",)),
        (lambda m, x, t: torch.cat([m.a(x)[:, :3], m.b(x)[:, 3:]], 1), ("a", "b")),
    ],
    ids=["gated perceptron", "its own gate", "added from outside", "joined"],
)
def test_maps_that_the_signal_crosses_in_any_order(form, maps):
    seen = sw.chain(Written(form).eval(), (torch.randn(3, 6), torch.randn(3, 6)))[0].seen
    assert seen.signal_maps == maps
