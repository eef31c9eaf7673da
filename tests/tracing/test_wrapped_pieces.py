"""Chains of networks whose pieces are wrapped, joined and taken apart, resampled, or run by `torch.func`."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint

import skipway as sw
from skipway.tracing import watch
from skipway.tracing.chain import chain_from_program


@dataclass
class Output:
    hidden: Tensor


Named = namedtuple("Named", "hidden cache")
PACKS = {
    "tensor": (lambda y: y, lambda out: out),
    "tuple": (lambda y: (y, None), lambda out: out[0]),
    "named tuple": (lambda y: Named(y, None), lambda out: out.hidden),
    "dict": (lambda y: {"hidden": y}, lambda out: out["hidden"]),
    "dataclass": (Output, lambda out: out.hidden),
}


class Block(nn.Module):
    def __init__(self, pack=PACKS["tensor"][0]) -> None:
        super().__init__()
        self.norm, self.f, self.pack = (
            nn.LayerNorm(8),
            nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)),
            pack,
        )

    def forward(self, x: Tensor):
        return self.pack(x + self.f(self.norm(x)))


class Net(nn.Module):
    """Two blocks; `call` runs one on the stream."""

    def __init__(self, pack=PACKS["tensor"][0], call=lambda block, x: block(x)) -> None:
        super().__init__()
        self.blocks, self.head, self.call = nn.ModuleList(Block(pack) for _ in range(2)), nn.Linear(8, 3), call

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.call(block, x)
        return self.head(x)


def shape_of(chain) -> list[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    return [(c.name, c.seen.skip, c.seen.maps, c.seen.norms) for c in chain]


PLAIN = [(f"blocks.{i}", "identity", (f"blocks.{i}.f.0", f"blocks.{i}.f.2"), ("pre",)) for i in range(2)]
X = torch.zeros(4, 8)


@pytest.mark.parametrize("kind", PACKS)
def test_blocks_hand_over_containers(kind):
    pack, take = PACKS[kind]
    assert shape_of(sw.chain(Net(pack, lambda block, x: take(block(x))), X)) == PLAIN


CALLS = {
    "re-entrant checkpoint": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "checkpoint": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "vmap": lambda block, x: torch.vmap(block)(x),
    "functional call": lambda block, x: torch.func.functional_call(block, dict(block.named_parameters()), (x,)),
    "autocast": lambda block, x: torch.autocast("cpu", dtype=torch.bfloat16)(block)(x),
    "compiled function": lambda block, x: torch.compile(block.forward, backend="eager")(x),
    "kept in cat": lambda block, x: torch.cat([block(x), x]).chunk(2)[0],
    "kept in stack": lambda block, x: torch.stack([x, block(x)])[1],
}


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("training", [False, True])
def test_blocks_run_by_something_else(kind, training):
    model = Net(call=CALLS[kind])
    found = shape_of(chain_from_program(model, watch(model, X, training=training)))
    if kind in ("vmap", "compiled function", "functional call"):
        found = [(f"blocks.{i}", *rest) for i, (_, *rest) in enumerate(found)]  # who adds is not always told
    assert found == PLAIN


def compiled(model):
    model.blocks = nn.ModuleList(torch.compile(block, backend="eager") for block in model.blocks)
    return model


WRAPS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled blocks": compiled,
    "bfloat16": lambda model: model.bfloat16(),
    "DataParallel": nn.DataParallel,
    "spectral norm": lambda model: parametrize(model, parametrizations.spectral_norm),
    "weight norm": lambda model: parametrize(model, parametrizations.weight_norm),
    "weight norm by hooks": lambda model: parametrize(model, weight_norm),
}


def parametrize(model, by):
    for block in model.blocks:
        by(block.f[2])
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", WRAPS)
def test_wrapped_networks_and_weights(kind):
    chain = sw.chain(WRAPS[kind](Net()), X.bfloat16() if kind == "bfloat16" else X)
    inner = "._orig_mod" if kind == "compiled blocks" else ""
    assert [c.name.replace("._orig_mod", "") for c in chain] == ["blocks.0", "blocks.1"]
    assert [c.path[-1].weight.shape for c in chain] == [(8, 8)] * 2
    assert all(c.seen.maps[-1] == f"blocks.{i}{inner}.f.2" for i, c in enumerate(chain))


def test_tensors_that_are_joined_and_taken_apart_are_themselves():
    model = Net(call=lambda block, x: sum(torch.cat([x, block.f(block.norm(x))], -1).chunk(2, -1)))
    assert [c.seen.maps for c in sw.chain(model, X)] == [maps for _, _, maps, _ in PLAIN]


def test_a_nested_tensor_without_sizes_is_refused_with_a_way_out():
    def nested(block, x):
        with torch.no_grad():
            return torch.nested.to_padded_tensor(block.f(torch.nested.nested_tensor([x, x[:2]])), 0.0).flatten(0, 1)

    with pytest.raises(sw.SkipwayError, match=r"layout=torch\.jagged"):
        sw.chain(Net(call=nested), X)


class Conv(nn.Module):
    """Maps of an image (2, 4, 6, 6) of which each form takes some."""

    def __init__(self, form) -> None:
        super().__init__()
        self.first, self.last, self.form = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), form
        self.down, self.wide = nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(4, 16, 3, padding=1)
        self.up, self.one = nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2)


RESAMPLED = {
    "block of a generator": ("upsampled", lambda m, x: double(x) + m.last(double(m.first(x).relu()))),
    "super-resolution": ("upsampled", lambda m, x: double(x) + F.pixel_shuffle(m.wide(m.first(x).relu()), 2)),
    "learned upsampling": ("projection", lambda m, x: m.up(x) + m.last(double(m.first(x).relu()))),
    "projected and upsampled": ("projection", lambda m, x: m.one(double(x)) + m.last(double(m.first(x).relu()))),
    "space to channels": ("pooled", lambda m, x: m.down(x) + F.pixel_unshuffle(x, 2).unflatten(1, (8, 2)).mean(2)),
    "upsampled before": ("identity", lambda m, x: (y := double(x)) + m.first(y.relu())),
}


@pytest.mark.parametrize("kind", RESAMPLED)
def test_skips_that_change_the_number_of_positions(kind):
    skip, form = RESAMPLED[kind]
    chain = sw.chain(Conv(form), torch.zeros(2, 4, 6, 6))
    assert ([c.seen.skip for c in chain], chain.refused) == ([skip], ())


class Gated(nn.Module):
    """An attention-like branch over tokens (N, L, 8) with a gate from their mean, and a conditioning MLP."""

    def __init__(self, form) -> None:
        super().__init__()
        self.proj, self.norm, self.f = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.cond = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(8, 8), nn.Linear(8, 8))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


def gate_of_all_tokens(m, x):
    gate = m.cond(x.mean(1)).unsqueeze(1)
    h = m.proj(x)
    return h + m.f(m.norm(h)).relu() * gate


def test_a_gate_that_reads_all_tokens_is_no_branch_over_several_streams():
    (connection,) = sw.chain(Gated(gate_of_all_tokens), torch.zeros(2, 5, 8))
    assert (connection.seen.skip, connection.seen.streams, connection.seen.last) == ("identity", None, "f")


def test_two_maps_on_both_sides_are_parallel_behind_an_activation():
    chain = sw.chain(Gated(lambda m, x: m.ada(m.norm(x)) + m.cond(x)), torch.zeros(2, 5, 8))
    assert (len(chain), [refusal.reason for refusal in chain.refused]) == (0, ["parallel"])


FIRST_TOKEN = {
    "the same slice twice": lambda m, x: m.f(m.norm(x[:, 1:])).relu() + x[:, 1:],
    "tokens apart": lambda m, x: (
        torch.cat([x[:, :1], x[:, 1:].flip(1)], 1) + m.f(m.norm(torch.cat([x[:, :1], x[:, 1:].flip(1)], 1))).relu()
    ),
}


@pytest.mark.parametrize("kind", FIRST_TOKEN)
def test_streams_of_which_the_first_token_is_set_apart(kind):
    (connection,) = sw.chain(Gated(FIRST_TOKEN[kind]), torch.zeros(2, 5, 8))
    assert (connection.seen.skip, connection.seen.norms) == ("identity", ("pre",))


def test_relative_positions_beside_values_are_parallel():
    def attend(m, x):
        scores = (x @ x.mT).softmax(-1)
        return scores @ m.f(x) + scores @ m.proj.weight[:5]  # both linear in the scores

    chain = sw.chain(Gated(attend), torch.zeros(2, 5, 8))
    assert (len(chain), [refusal.reason for refusal in chain.refused]) == (0, ["parallel"])


def test_two_attentions_of_four_axes_are_parallel_and_no_pyramid():
    def attend(m, x):
        q, k, v = (each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (m.proj, m.f, m.cond[0]))
        context = m.cond[2](x[:, :3]).unflatten(-1, (2, 4)).transpose(1, 2)
        return (F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, context, context)).mT

    assert [r.reason for r in sw.chain(Gated(attend), torch.zeros(2, 5, 8)).refused] == ["parallel"]


def test_a_norm_with_a_gain_of_four_axes_is_a_norm():
    class ImageNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(x, dim=1) * 2 * self.gamma

    def form(m, x):
        return x + m.last(m.norm(x).relu())

    model = Conv(form)
    model.norm = ImageNorm()
    assert [c.seen.norms for c in sw.chain(model, torch.zeros(2, 4, 6, 6))] == [("pre",)]


def test_empty_tensors_with_one_axis_may_be_joined():
    def cached(block, x):
        return block(torch.cat([torch.tensor([]), x]))

    assert shape_of(sw.chain(Net(call=cached), X)) == PLAIN
