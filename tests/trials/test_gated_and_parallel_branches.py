"""Branches that no module returns alone could not be dressed: parallel, gated, made in the forward that adds.

| trial | input | right value |
|---|---|---|
| D11 | x + (a(x) + b(x)), three branches, a difference of branches, scaled and dropped ones | a scale behind each |
| D11 | x + (relu(a(x)) + tanh(b(x))): functions between the modules and the sum | a scale on the block's y − x |
| D11 | Phi, GPT-J, CodeGen, GPT-NeoX, Falcon (2 layers) | dressed 2 of 2 |
| D12 | x + g(c) f(n(x)): the gate before, behind, chunked from one map, of a sum; of relu(f) | behind f; behind g |
| D12 | squeeze-and-excitation f(x) · σ(g(f(x))): the gate reads f | on the block's y − x |
| – | x and y in tuples, keyword arguments and mappings | dressed |
| – | a block that writes into x | it gets a copy of x, and is dressed |
| – | a block that norms its sum, a constant in between and a function behind the sum | refused, the operator is named |
| – | the remedy "add skips" on layers of `nn.TransformerEncoder` that have none, and on its own, with masks | skips |
| – | y = x + s F(x) for any s; s = 1 changes nothing; chain, undo, lesion, gradients | as in theory |
| – | (N, L, C) and (N, C, L) with L = C; token mixing; temporal convolutions | the gain is on the channels |
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import skipway as sw
from benchmarks.peers import import_transformers
from skipway.diagnosis.remedies import AddSkips, Case
from skipway.diagnosis.settings import Settings
from skipway.errors import SkipwayError
from skipway.probes import probe
from skipway.surgery import fold_gains, lesion, rescheme
from skipway.tracing import call_model

C = 8


class Block(nn.Module):
    """Parts that each branch may use."""

    def __init__(self, branch, out=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.d = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.norm, self.gates = nn.LayerNorm(C), nn.Linear(C, 2 * C)
        self.drop, self.ls = nn.Dropout(0.1), nn.Parameter(torch.rand(C))
        self.branch = branch

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        return x + self.branch(self, self.norm(x), c)


def squeeze(m, h, c):
    f = m.a(h)
    return f * m.b(f.mean(1, keepdim=True)).sigmoid()


WHOLE = "the model, on its output minus its input"
BRANCHES = {  # what is added, and behind what a scale stands
    "sum": (lambda m, h, c: m.a(h) + m.b(h), "a, b"),
    "three": (lambda m, h, c: m.a(h) + m.b(h) + m.d(h), "a, b, d"),
    "difference": (lambda m, h, c: m.a(h) - m.b(h), "a, b"),
    "stacked": (lambda m, h, c: torch.stack([m.a(h), m.b(h)]).sum(0), "a, b"),
    "scaled and dropped": (lambda m, h, c: m.drop(m.a(h)) * 0.5 + m.ls * m.b(h), "drop, b"),
    "functions": (lambda m, h, c: m.a(h).relu() + m.b(h).tanh(), WHOLE),
    "one function": (lambda m, h, c: m.a(h).relu(), WHOLE),
    "no module": (lambda m, h, c: functional.linear(h.relu(), m.ls.expand(C, C)), WHOLE),
    "gate": (lambda m, h, c: m.b(c).unsqueeze(1) * m.a(h), "a"),
    "gate behind": (lambda m, h, c: m.a(h) * m.b(c)[:, None], "a"),
    "gate of a function": (lambda m, h, c: m.b(c).unsqueeze(1) * m.a(h).relu(), "b"),
    "chunked gates": (lambda m, h, c: m.gates(c).chunk(2, -1)[1][:, None] * m.a(h), "a"),
    "tanh gate": (lambda m, h, c: m.b(c).tanh()[:, None] * m.a(h), "a"),
    "gate on a sum": (lambda m, h, c: m.d(c)[:, None] * (m.a(h) + m.b(h)), "a, b"),
    "divided": (lambda m, h, c: m.a(h) / (m.b(c)[:, None] + 9), "a"),
    "divisor": (lambda m, h, c: h.tanh() / m.b(c)[:, None].exp(), WHOLE),
    "squeeze and excitation": (squeeze, WHOLE),
}


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 5, C, generator=generator), torch.randn(3, C, generator=generator)


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_is_dressed_as_a_whole(name):
    branch, place = BRANCHES[name]
    block, (x, c) = Block(branch).eval(), inputs()
    before, keys = block(x, c), list(block.state_dict())
    operation = rescheme(block, (x, c), "skipinit")
    assert [*operation.touched.values()] == [place]
    torch.testing.assert_close(block(x, c), before)
    gains = [parameter for key, parameter in block.named_parameters() if key not in keys]
    for factor in (0.0, 3.0, -2.0):  # y = x + s F(x)
        with torch.no_grad():
            for gain in gains:
                gain.fill_(factor)
        torch.testing.assert_close(block(x, c), x + factor * (before - x), rtol=1e-4, atol=1e-5)
    operation.undo(force=True)
    assert torch.equal(block(x, c), before)
    assert list(block.state_dict()) == keys


@pytest.mark.parametrize("name", BRANCHES)
def test_a_scale_per_channel_is_on_the_channels(name):
    branch, _ = BRANCHES[name]
    block, (x, c) = Block(branch).eval(), inputs()
    before = block(x, c)
    rescheme(block, (x, c), "layerscale")
    factors = torch.rand(C) + 0.5
    with torch.no_grad():
        for key, parameter in block.named_parameters():
            if key.endswith("gain"):
                parameter.copy_(factors.view_as(parameter))
    torch.testing.assert_close(block(x, c), x + factors * (before - x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BRANCHES)
def test_the_chain_is_the_same_afterwards(name):
    block, given = Block(BRANCHES[name][0]).eval(), inputs()
    count = len(sw.chain(block, given))
    rescheme(block, given, "layerscale")
    assert len(sw.chain(block, given)) == count
    operation = lesion(Block(BRANCHES[name][0]).eval(), given, ["" if count == 1 else f":{count}"])
    torch.testing.assert_close(operation.model(*given), given[0])


def test_gradients_reach_the_gain_and_the_branch():
    block, (x, c) = Block(BRANCHES["functions"][0]), inputs()
    rescheme(block, (x, c), "layerscale")
    block(x, c).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for key, parameter in block.named_parameters() if key[0] in "abr")


class Tuples(Block):
    """Returns and takes more than x, x by keyword."""

    def forward(self, c: Tensor, hidden: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"hidden": hidden + self.a(self.norm(hidden)).relu()}, c


class Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Tuples(None) for _ in range(3))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            outputs, c = block(c, hidden=x)
            x = outputs["hidden"]
        return x


def test_where_x_is_in_arguments_and_outputs_is_recorded():
    model, (x, c) = Caller().eval(), inputs()
    before = model(x, c)
    operation = rescheme(model, (x, c), "skipinit")
    assert list(operation.touched.values()) == [f"blocks.{n}, on its output minus its input" for n in range(3)]
    torch.testing.assert_close(model(x, c), before)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("gain"):
                parameter.zero_()
    assert torch.equal(model(x, c), x)
    assert not fold_gains(model, (x, c)).touched


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(self.norm(x)).relu()
        x += h
        return x


class Around(nn.Module):
    """Lets its block write into a copy."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.clone())


class Normed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.a(x).relu())


class Shifted(Block):
    def forward(self, x: Tensor) -> Tensor:
        return (x + (self.a(x) + self.ls)).relu()


def test_a_block_that_writes_into_x_is_given_a_copy():
    model, x = Around(InPlace(None)).eval(), inputs()[0]
    before = model(x)
    rescheme(model, x, "skipinit")
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        model.block.residual_branch.gain.fill_(3.0)
    torch.testing.assert_close(model(x), x + 3 * (before - x))


class Bare(nn.TransformerEncoderLayer):
    """Without skips."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        h = self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal=is_causal)
        return self._ff_block(self.norm2(h))


class BareTuples(Tuples):
    def forward(self, c: Tensor, hidden: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"hidden": functional.relu_(hidden.mul_(0.5)) @ self.a.weight}, c


@pytest.mark.parametrize("kind", [Bare, nn.TransformerEncoderLayer, BareTuples])
def test_added_skips_leave_a_module_what_it_is(kind):
    if kind is BareTuples:
        model, given = Caller().eval(), inputs()
        model.blocks = nn.ModuleList(BareTuples(None) for _ in range(3))
        names = [f"blocks.{n}" for n in range(3)]
    else:
        layer = kind(C, 2, 16, batch_first=True, dropout=0.0)
        model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
        given = {"src": inputs()[0], "mask": nn.Transformer.generate_square_subsequent_mask(5)}
        names = [f"layers.{n}" for n in range(3)]
    with torch.no_grad():
        x = given["src"] if isinstance(given, dict) else given[0]
        case = AddSkips(tuple(names), gain=0.5).apply(Case(model, Settings(), given, sw.chain(model, given)))
        assert all(isinstance(model.get_submodule(name), kind) for name in names)
        after = call_model(case.model, given)
        for block in [model.get_submodule(name) for name in names]:
            block.residual_branch.gain.fill_(0.0)
        torch.testing.assert_close(call_model(case.model, given), x)
    assert not torch.allclose(after, x)
    assert len(sw.chain(model, given)) >= 3


@pytest.mark.parametrize(("kind", "between"), [(Normed, "relu"), (Shifted, "add")])
def test_where_no_place_is_equal_the_reason_says_what_is_in_between(kind, between):
    with pytest.raises(SkipwayError, match=f"made in the forward that adds, by {between}"):
        rescheme(Around(kind(None)).eval(), inputs()[0], "layerscale")


L = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
S = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
MODELS = {
    "PhiModel": {**L, "intermediate_size": 64},
    "GPTNeoXModel": {**L, "intermediate_size": 64},
    "FalconModel": L,
    "GPTJModel": S,
    "CodeGenModel": S,
}


@pytest.mark.parametrize("name", MODELS)
def test_parallel_language_models_are_dressed(name):
    kind = getattr(import_transformers(), name)
    model, ids = kind(kind.config_class(**MODELS[name])).eval(), torch.randint(3, 50, (2, 6))
    before = model(input_ids=ids).last_hidden_state
    operation = rescheme(model, {"input_ids": ids}, "layerscale")
    assert (len(operation.touched), operation.refused) == (2, {})
    torch.testing.assert_close(model(input_ids=ids).last_hidden_state, before)


class Transposed(nn.Module):
    """A connection of one layer, on channels first or last, alone or between positions."""

    def __init__(self, layer: nn.Module, form) -> None:
        super().__init__()
        self.stem, self.layer, self.form = nn.Linear(C, C), layer, form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, self.stem(x))


SQUARE = {  # (N, L, C) with L = C: the axis of the sum that holds the channels
    "tokens": (nn.Linear(C, C), lambda m, x: x + m.layer(x.relu()), 2),
    "channels first": (nn.Conv1d(C, C, 1), lambda m, x: (y := x.mT) + m.layer(y.relu()), 1),
    "conv on transposed": (nn.Conv1d(C, C, 1), lambda m, x: x + m.layer(x.mT.relu()).mT, 2),
    "token mixing": (nn.Linear(C, C), lambda m, x: x + m.layer(x.mT.relu()).mT, None),
}


@pytest.mark.parametrize("name", SQUARE)
def test_the_axis_of_the_channels_is_the_one_that_weights_write(name):
    layer, form, axis = SQUARE[name]
    model, x = Transposed(layer, form).eval(), torch.randn(2, C, C)
    (connection,) = sw.chain(model, x)
    assert connection.seen.channel == (2 if axis is None else axis)
    before, skip = model(x), model.stem(x).mT if axis == 1 else model.stem(x)
    if axis is None:  # the last map writes positions, and which of two equal axes was the channels' is not recorded
        with pytest.raises(SkipwayError, match="said by no weight"):
            rescheme(model, x, "layerscale")
        return
    rescheme(model, x, "layerscale")
    factors = torch.rand(C)
    with torch.no_grad():
        gain = model.get_parameter("layer.residual_scale.gain")
        gain.copy_(factors.view_as(gain))
    scale = factors if axis == 2 else factors[:, None]
    torch.testing.assert_close(model(x), skip + scale * (before - skip))


@pytest.mark.parametrize("length", [C, C + 3])
def test_a_temporal_convolution_has_its_gain_on_the_channels(length):
    class Temporal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(C, C, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x.relu())

    model, x = Temporal(), torch.randn(2, C, length)
    (connection,) = sw.chain(model, x)
    assert (connection.site.dim, connection.site.spatial) == (C, 1)
    rescheme(model, x, "layerscale")
    assert model.conv.residual_scale.gain.numel() == C


@pytest.mark.parametrize("form", ["tokens", "channels first", "maps", "maps with channels last"])
def test_positions_are_told_from_channels_where_both_are_equally_many(form):
    """Every position of a sample holds the same vector, so that they are not distinct at all."""
    shape = {"tokens": (1, 1, C), "channels first": (1, C, 1), "maps": (1, C, 1, 1)}.get(form, (1, 1, 1, C))
    size = tuple(C if length == 1 else length for length in shape[1:])
    layer: nn.Module = {"tokens": nn.Linear(C, C), "channels first": nn.Conv1d(C, C, 1)}.get(form, nn.Conv2d(C, C, 1))
    layer = nn.Linear(C, C) if form == "maps with channels last" else layer

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(x).relu()

    x = torch.randn(3, *shape[1:]).expand(3, *size).contiguous()
    signals = probe(One(), x, measures=["tokens_distinct"])
    assert signals[""]["tokens_distinct"] == pytest.approx(0, abs=1e-5)


def test_dead_channels_of_a_temporal_convolution_are_counted_by_channel():
    conv = nn.Conv1d(C, C, 1)
    with torch.no_grad():
        conv.bias[: C // 2] = -100.0
        conv.bias[C // 2 :] = 100.0

    class Temporal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv, nn.Conv1d(C, C, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(functional.relu(self.first(x)))

    assert probe(Temporal(), torch.randn(3, C, 5), measures=["dead"])[""]["dead"] == 0.5
