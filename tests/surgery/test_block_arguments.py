"""What blocks are given and return beside x: tuples, masks of some blocks only, entries in groups."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn

import skipway as sw
from benchmarks.surgery.language import Model, examine_cell
from skipway.surgery import checkpointed, reversible, skip_compute
from skipway.surgery.block_survey import find_blocks
from skipway.surgery.saved_tensors import costs_of

X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(4, 6, dtype=torch.long)
MASK[0, 4:] = 0


class Attention(nn.Module):
    """x second, by keyword, and first in a tuple; the bias has an entry for each sample and head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, bias: Tensor | None, hidden: Tensor, shown: Tensor | None = None):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.mix(self.norm(hidden)).chunk(3, -1))
        scores = q @ k.mT
        if bias is not None:
            scores = scores + bias.view(len(hidden), 2, 1, -1)
        if shown is not None:
            scores = scores.masked_fill(shown[:, None, None] == 0, -1e4)
        return hidden + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)), None


class Decoder(nn.Module):
    """Blocks that are given an ALiBi of (samples × heads, 1, positions); every other one sees the padding, too."""

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every, self.blocks = every, nn.ModuleList(Attention() for _ in range(4))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, hidden_from: Tensor | None = None) -> Tensor:
        slopes = torch.tensor([0.5, 0.1]).repeat(len(x))
        bias = slopes[:, None, None] * torch.arange(x.shape[1])
        shown = attention_mask if hidden_from is None else hidden_from
        for number, block in enumerate(self.blocks):
            x = block(bias, hidden=x, shown=shown if number % self.every == 0 else None)[0]
        return x


def pair(every: int = 1) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Decoder(every).train()
    return model, copy.deepcopy(model)


def learned(model: nn.Module, *given: Tensor | None) -> list[Tensor]:
    out = model(*given)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


@pytest.mark.parametrize("every", [1, 2])
def test_blocks_in_tuples_are_computed_again_with_their_own_masks(every):
    """Without a mask in the example all blocks are given the same; with padding every other one is not."""
    model, plain = pair(every)
    operation = checkpointed(model, X, 2)
    assert len(operation.touched) == 2 * every
    assert operation.report["bytes after"] < 0.7 * operation.report["bytes before"]
    for given in ((X,), (X, MASK)):
        torch.testing.assert_close(learned(model, *given), learned(plain, *given))


def test_two_streams_through_blocks_in_tuples():
    model, plain = pair()
    reversible(model, X)
    u = v = X
    for block in plain.blocks:
        bias = torch.tensor([0.5, 0.1]).repeat(4)[:, None, None] * torch.arange(6)
        u, v = v, u + block(bias, v, MASK)[0] - v
    torch.testing.assert_close(learned(model, X, MASK)[0], u + v - X)


def test_a_row_that_is_given_other_arguments_than_on_the_example_says_so():
    model, _ = pair()
    checkpointed(model, X, 4)
    model.every = 2
    with pytest.raises(sw.SkipwayError, match="given other arguments than they"):
        model(X, MASK)


def test_masks_and_groups_of_entries_are_cut_with_the_samples():
    """A block sees the same of a drawn sample as without the operation: the others carry x."""
    model, plain = pair()
    skip_compute(model, X, 0.5, rising=False)
    block = model.blocks[0]
    bias = torch.rand(8, 1, 6)
    torch.manual_seed(1)
    found = block(bias, hidden=X, shown=MASK)[0]
    full = plain.blocks[0](bias, X, MASK)[0]
    drawn = (found != X).flatten(1).any(1)
    assert drawn.sum() == 2
    torch.testing.assert_close(found[drawn] - X[drawn], 2 * (full - X)[drawn])


def test_libraries_see_the_arguments_of_forward():
    model, plain = pair()
    expected = inspect.signature(plain.forward)
    sw.accelerate(model, X)
    assert inspect.signature(model.forward) == expected
    checkpointed(model, X)
    assert inspect.signature(model.blocks[0].forward) == inspect.signature(plain.blocks[0].forward)


class Saved(Decoder):
    """As transformers' networks are: built from a config."""

    def save_pretrained(self, folder) -> None: ...


def test_what_from_pretrained_would_leave_out_is_said():
    torch.manual_seed(0)
    model = Saved()
    dressed = sw.rescheme(model, X, "layerscale")
    assert "the config does not describe blocks.0.out.residual_scale, " in dressed.verified["save_pretrained"]
    assert "save_pretrained" not in sw.rescheme(Decoder(), X, "layerscale").verified
    dressed.undo()
    again = checkpointed(model, X)  # computes the same, which the config describes
    assert "save_pretrained" not in again.verified
    again.undo()
    assert "not kept: the config describes the network before" in reversible(model, X).verified["save_pretrained"]


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("LlamaForCausalLM", "skip_compute"),
        ("T5ForConditionalGeneration", "checkpointed"),
        ("GPT2LMHeadModel", "optimize"),
    ],
)
def test_language_models_looked_at_from_outside(name, operation, monkeypatch):
    monkeypatch.setattr("skipway.inference.backend_selection.BackendComparison.time", lambda self, *given: None)
    assert examine_cell(Model.build(name, None), operation) == ("right", "")


class Named(Decoder):
    """Blocks whose first argument is none, or not x."""

    def __init__(self, biased: bool) -> None:
        super().__init__()
        self.biased = biased

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(bias=torch.zeros(len(x) * 2, 1, 1), hidden=x)[0] if self.biased else block(None, hidden=x)[0]
        return x


@pytest.mark.parametrize(
    "build", [lambda: Named(True), lambda: Named(False), Decoder], ids=["named", "alone", "second"]
)
def test_a_block_keeps_the_bytes_of_x_wherever_it_is_given_x(build):
    model = build()
    _, costs = costs_of(model, X, find_blocks(model, X).calls)
    assert [cost.given for cost in costs.values()] == 4 * [X.nbytes]
    assert checkpointed(model, X, "squareroot").touched


class Threaded(nn.Module):
    """y = x + f(x) · h and, beside it, h' = g(h), which the next block is given."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, h):
        h = self.g(x if h is None else h)
        return x + self.f(x) * h, h


class ThreadedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Threaded() for _ in range(3))

    def forward(self, x, h=None):
        self.seen = []
        for block in self.blocks:
            x, h = block(x, h)
            self.seen.append(h)
        return x, h


def test_what_is_handed_on_stays_for_skipped_samples_what_the_block_was_given():
    torch.manual_seed(0)
    net, x, h = ThreadedNet(), torch.randn(6, 4), torch.randn(6, 4)
    skip_compute(net, (x, h), 0.5, rising=False)
    net.train()(x, h)
    for block, given, handed in zip(net.blocks, [h, *net.seen], net.seen, strict=False):
        computed = (handed - block.g(given)).abs().amax(1) < 1e-6
        assert computed.sum() == 3
        torch.testing.assert_close(handed[~computed], given[~computed])


def test_a_block_that_computes_of_each_sample_what_later_ones_need_is_left_alone():
    torch.manual_seed(0)
    net, x = ThreadedNet(), torch.randn(6, 4)
    operation = skip_compute(net, x, 0.5, rising=False)
    assert list(operation.touched) == ["blocks.1", "blocks.2"]
    assert "for blocks.1" in operation.refused["blocks.0"]
    net.train()(x)
    torch.testing.assert_close(net.seen[0], net.blocks[0].g(x))


def test_a_block_whose_memory_grows_is_left_alone():
    class Growing(Threaded):
        def forward(self, x, h):
            return x + self.f(x) * h.mean(1), torch.cat([h, self.g(x)[:, None]], 1)

    class Reading(Threaded):
        def forward(self, x, h):
            return x + self.f(x) * h.mean(1), self.g(h)

    torch.manual_seed(0)
    net = ThreadedNet()
    net.blocks = nn.ModuleList([Growing(), Reading(), Reading()])
    x, h = torch.randn(6, 4), torch.randn(6, 2, 4)
    operation = skip_compute(net, (x, h), 0.5, rising=False)
    assert list(operation.touched) == ["blocks.1", "blocks.2"]
    assert "is given nothing of that shape" in operation.refused["blocks.0"]


def test_what_stands_for_skipped_samples_is_asked_for_where_it_is_absent():
    net, x = ThreadedNet(), torch.randn(6, 4)
    skip_compute(net, (x, torch.randn(6, 4)), 0.5, rising=False)
    with pytest.raises(sw.SkipwayError, match="h was in the example of skip_compute and is not given now"):
        net.train()(x)
