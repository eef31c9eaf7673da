"""Kind: axis 0 of the first argument is taken for the samples, and all other arguments are passed on whole.

`skip_compute` drops samples. In the tests every block notes the shapes that it is given, and the expectation over many
draws has to be the block's own output.

| trial | input | right value |
|---|---|---|
| D2 | `nn.TransformerEncoder`, sequence first, 12 or 8 positions of 8 samples | half of the samples, all positions |
| D2 | the same with a causal mask as long as there are samples | the mask stays whole |
| D2 | `src_key_padding_mask`, batch first and sequence first | cut with the samples |
| D2 | block(x, c), by position and by keyword | c is cut, too |
| D6 | Llama, with a padding mask that the example did not have | runs; the mask is cut |
| D6 | decoder with encoder states, (x, states) | both are cut |
| D6 | class numbers (N,) that are looked up in the block | cut |
| D6 | tuple outputs: (x, weights) | x is put back, weights of samples that were not drawn are 0 |
| D6 | edge list (2, E) of a graph network | refused: nodes have an influence on one another |
| D6 | a mask with an entry for each head of each sample | refused |
| D6 | an argument that the example did not have, and two axes of it fit | refused when it comes |
| D6 | an example of one sample | works |
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipway as sw
from benchmarks.surgery.foreign_networks import configured
from skipway.surgery import skip_compute

SEEN: list[tuple[tuple[int, ...], ...]] = []


class Noting(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, src_mask=None, src_key_padding_mask=None, is_causal=False) -> Tensor:
        given = (src, src_mask, src_key_padding_mask)
        SEEN.append(tuple(tuple(each.shape) for each in given if each is not None))
        return super().forward(src, src_mask, src_key_padding_mask, is_causal)


def encoder(batch_first: bool = False) -> nn.TransformerEncoder:
    layer = Noting(16, 2, 32, dropout=0.0, norm_first=True, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def shapes_in_training(model: nn.Module, *args: Any, **kwargs: Any) -> set[tuple[tuple[int, ...], ...]]:
    model.train()
    SEEN.clear()
    output = model(*args, **kwargs)
    (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    return set(SEEN)


@pytest.mark.parametrize("length", [12, 8])
def test_sequence_first(length):
    model, x = encoder(), torch.randn(length, 8, 16)
    operation = skip_compute(model, x, 0.5, rising=False)
    assert set(operation.touched.values()) == {"rate 0.5, samples on axis 1"}
    assert shapes_in_training(model, x) == {((length, 4, 16),)}


@pytest.mark.parametrize("length", [12, 8])
def test_a_mask_of_positions_stays_whole(length):
    model, x = encoder(), torch.randn(length, 8, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(length)
    skip_compute(model, {"src": x, "mask": mask, "is_causal": False}, 0.5, rising=False)
    assert shapes_in_training(model, x, mask=mask) == {((length, 4, 16), (length, length))}


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_padding_mask_is_cut(batch_first):
    model = encoder(batch_first)
    x = torch.randn(8, 5, 16) if batch_first else torch.randn(5, 8, 16)
    padding = torch.zeros(8, 5, dtype=torch.bool)
    padding[:, 4] = True
    skip_compute(model, {"src": x, "src_key_padding_mask": padding}, 0.5, rising=False)
    stream = (4, 5, 16) if batch_first else (5, 4, 16)
    assert shapes_in_training(model, x, src_key_padding_mask=padding) == {(stream, (4, 5))}


class Branch(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

    def branch(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).relu())


class Conditioned(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 8)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        SEEN.append((tuple(x.shape), tuple(c.shape)))
        return x + self.branch(x) * self.gate(c).unsqueeze(1)


class Reads(Branch):
    """A decoder's block, that reads an encoder's states."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        SEEN.append((tuple(x.shape), tuple(c.shape)))
        return x + self.attention(self.norm(x), c, c, need_weights=False)[0]


class Labelled(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 8)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        SEEN.append((tuple(x.shape), tuple(c.shape)))
        return x + self.branch(x + self.table(c).unsqueeze(1))


class Weighed(Branch):
    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.norm(x).softmax(-1)
        SEEN.append((tuple(x.shape),))
        return x + self.branch(x), weights


class Stack(nn.Module):
    def __init__(self, kind: type[nn.Module], by_keyword: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(2))
        self.by_keyword = by_keyword
        self.weights: list[Tensor] = []

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.weights = []
        for block in self.blocks:
            x = block(c=c, x=x) if self.by_keyword else block(x, c)
            if isinstance(x, tuple):
                x, weights = x
                self.weights.append(weights)
        return x


X = torch.randn(8, 5, 8)
SIDES = {
    "conditioned": (Conditioned, torch.randn(8, 4), (4, 4)),
    "encoder states": (Reads, torch.randn(8, 3, 8), (4, 3, 8)),
    "class numbers": (Labelled, torch.randint(7, (8,)), (4,)),
}


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("name", SIDES)
def test_side_inputs_are_cut(name, by_keyword):
    kind, side, expected = SIDES[name]
    model = Stack(kind, by_keyword)
    skip_compute(model, (X, side), 0.5, rising=False)
    assert shapes_in_training(model, X, side) == {((4, 5, 8), expected)}


@pytest.mark.parametrize("name", SIDES)
@torch.no_grad()
def test_the_expectation_is_what_the_block_computes(name):
    kind, side, _ = SIDES[name]
    model = Stack(kind)
    model.blocks = model.blocks[:1]
    expected = model(X, side)
    skip_compute(model, (X, side), 0.5, rising=False)
    assert torch.equal(model.eval()(X, side), expected)
    model.train()
    mean = torch.stack([model(X, side) for _ in range(400)]).mean(0)
    spread = (expected - X).abs().max()  # each draw is x or x + 2 F: deviation |F|, of the mean |F| / 20
    assert (mean - expected).abs().max() < 0.25 * spread


def test_other_outputs_keep_their_shape():
    model = Stack(Weighed)
    skip_compute(model, (X, torch.zeros(8, 1)), 0.5, rising=False)
    assert shapes_in_training(model, X, torch.zeros(8, 1)) == {((4, 5, 8),)}
    for weights in model.weights:
        drawn = weights.sum((1, 2)) > 0
        assert weights.shape == (8, 5, 8)
        assert drawn.sum() == 4
        torch.testing.assert_close(weights[drawn].sum(-1), torch.ones(4, 5))


class Graph(nn.Module):
    """Nodes (N, C) and an edge list (2, E)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GraphBlock() for _ in range(2))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, edges)
        return x


class GraphBlock(Branch):
    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        return x + self.branch(torch.zeros_like(x).index_add(0, target, x[source]))


def test_edge_lists_are_refused():
    model = Graph()
    with pytest.raises(sw.SkipwayError, match="no axis of the example holds independent samples"):
        skip_compute(model, (torch.randn(8, 8), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])), 0.5)
    assert type(model.blocks[0]) is GraphBlock


class PerHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder(batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(2 * x.shape[0], x.shape[1], x.shape[1])
        return self.encoder(x, mask=mask + 0 * x.mean())


def test_masks_of_every_head_are_cut_with_their_samples():
    model, x = PerHead(), torch.randn(8, 5, 16)
    skip_compute(model, x, 0.5)
    assert model.train()(x).shape == x.shape


def test_an_unknown_argument_of_two_fitting_axes_is_refused_when_it_comes():
    model, x = encoder(), torch.randn(8, 8, 16)
    skip_compute(model, x, 0.5)
    with pytest.raises(sw.SkipwayError, match="src_mask of shape \\(8, 8\\) was not in the example"):
        model.train()(x, mask=torch.zeros(8, 8))


def test_one_sample_does():
    model = encoder()
    operation = skip_compute(model, torch.randn(5, 1, 16), 0.5, rising=False)
    assert set(operation.touched.values()) == {"rate 0.5, samples on axis 1"}


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2", "GPT-2", "GPT-J", "Falcon"])
def test_language_models_with_padding(name):
    model = configured(name)
    ids = torch.randint(3, 60, (4, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model.eval()(input_ids=ids, attention_mask=mask).logits
    skip_compute(model, {"input_ids": ids}, 0.5)
    assert torch.equal(model.eval()(input_ids=ids, attention_mask=mask).logits, expected)
    model.train()(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.grad is not None)
