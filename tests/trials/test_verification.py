"""Kind: verification that cannot see: only the forward pass, only evaluation mode, with copies that put out 0, on the
first output, without the masks that the example has.

Each of the faulty operations below keeps what used to be compared, and is refused, with the model as before.

| trial | input | right value |
|---|---|---|
| D1 | a causal network gets a copy that sees later positions, silent at the start | refused: later entries |
| D1 | the same behind a padding mask | refused: what the mask hides |
| D1 | a silent part that mixes samples | refused: axis 0 |
| D2 | an operation after which training mode raises | refused, with the exception |
| D2 | an operation that changes training mode alone | refused where equality is promised |
| D3 | equal outputs, other gradients: of a parameter, of an input | refused, with whose gradient |
| D3 | a block that runs twice in a training pass, statistics updated twice | refused: buffers |
| D3 | a cache that grows in the backward pass | refused: outputs of another shape |
| D8 | the second output, an entry of a mapping, a field of a dataclass, an attribute of a cache changes | refused |
| – | networks with dropout, and random numbers of Python and NumPy | equal draws before and after |
| – | a network on the meta device, without gradients, or with one sample in BatchNorm | said, and not "difference 0" |
| – | an operation within `torch.inference_mode` | new weights can be trained |
| – | `tolerance` of not a number, negative, a word | refused before anything is changed |
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import skipway as sw
from skipway.surgery import checkpointed, lesion, remove_norm, rescheme, shorten, skip_compute
from skipway.surgery.checks import EQUAL
from skipway.surgery.training_pass import DrawsByShape, run_training_pass
from skipway.surgery.transaction import Transaction, transaction

X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """x + F(x), position by position."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Stack(nn.Module):
    """Blocks; nothing is mixed between positions or samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(), Block(), Block())

    def forward(self, x: Tensor) -> Any:
        return self.blocks(x)


class Mixing(nn.Module):
    """Adds a mean over an axis, times a weight that starts at 0."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis, self.weight = axis, nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * x.mean(self.axis, keepdim=True)


def refused(model: nn.Module, example: Any, alter: Callable[[Transaction], object], message: str) -> None:
    """The operation is refused with the message, and the model is as before."""
    keys, values = list(model.state_dict()), [tensor.clone() for tensor in model.state_dict().values()]

    def operate() -> None:
        with transaction(model, example, title="an operation", tolerance=1e-5, checks=EQUAL) as change:
            alter(change)
            change.commit()

    with pytest.raises(sw.SkipwayError, match=message):
        operate()
    assert list(model.state_dict()) == keys
    assert all(map(torch.equal, values, model.state_dict().values()))


@pytest.mark.parametrize("axis", [0, 1])
def test_silent_parts_are_drawn_at_random(axis):
    refused(
        Stack(),
        X,
        lambda change: change.set_submodule("blocks.1", nn.Sequential(change.model.blocks[1], Mixing(axis))),
        rf"outputs did not depend on later entries of the input along axis {axis}, and change with it",
    )


def test_a_weight_that_was_there_and_was_set_to_0_is_drawn_as_well():
    model = nn.Sequential(Stack(), Mixing(1))
    with torch.no_grad():
        model[1].weight.fill_(0.0)

    def alter(change: Transaction) -> None:
        change.keep_values([change.model[1].weight])
        with torch.no_grad():
            change.model[1].weight.mul_(1.0)

    refused(model, X, alter, "later entries of the input along axis 1")


class Padded(nn.Module):
    """torch's encoder layer with a padding mask, and after it, possibly, something that does not know the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.0)
        self.after = nn.Identity()

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.after(self.layer(x, src_key_padding_mask=padding))


@pytest.mark.parametrize("padded", [True, False])
def test_what_a_padding_mask_hides_stays_hidden(padded):
    """Also if nothing is padded in the example."""
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[1, 4:] = padded
    refused(
        Padded(),
        {"x": X, "padding": padding},
        lambda change: change.set_submodule("after", Mixing(1)),
        "what padding hides in x",
    )


def test_deepen_is_refused_if_its_copies_are_called_without_their_mask(monkeypatch):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    example = {"src": X, "mask": nn.Transformer.generate_square_subsequent_mask(6)}
    sw.deepen(model, example, 1).undo()
    from skipway.surgery.block_call import BlockCall

    def follow(self: BlockCall, output: Any, twin: nn.Module, args: Any, kwargs: Any) -> Any:
        return twin(output)

    monkeypatch.setattr(BlockCall, "follow", follow)
    with pytest.raises(sw.SkipwayError, match="outputs did not depend on later entries of src along axis 1"):
        sw.deepen(model, example, 1)


class RaisesInTraining(Block):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("size of tensor a (7) must match")
        return super().forward(x)


class ScalesInTraining(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.1 if self.training else 1.0)


class Doubled(torch.autograd.Function):
    """x, with twice the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


class WrongGradient(Block):
    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(super().forward(x))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (RaisesInTraining, "a training pass does not run .*RuntimeError: size of tensor a"),
        (ScalesInTraining, "in training mode the output changed by"),
        (WrongGradient, "the gradient of .* changed by 1 of its size"),
    ],
)
def test_training_passes_are_compared(kind, message):
    refused(Stack(), X, lambda change: change.set_class(change.model.blocks[1], kind), message)


def test_gradients_of_inputs_count_where_all_parameters_are_frozen():
    model = Stack().requires_grad_(False)
    alter = lambda change: change.set_class(change.model.blocks[0], WrongGradient)  # noqa: E731
    refused(model, X, alter, "the gradient of input 0 changed by 1")


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Twice(Normed):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            super().forward(x)
        return super().forward(x)


def test_running_statistics_that_are_updated_twice_are_seen():
    refused(Normed(), X[0], lambda c: c.set_class(c.model, Twice), "after a training pass BatchNorm1d.running_mean")


class Cache:
    """Keys of a pass, in an object of a library's own."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None

    def update(self, keys: Tensor) -> None:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 1)


class Caching(Stack):
    def forward(self, x: Tensor) -> dict[str, Any]:
        cache = Cache()
        return {"logits": self.put(x, cache), "cache": cache}

    def put(self, x: Tensor, cache: Cache) -> Tensor:
        cache.update(x)
        return self.blocks(x)


class CachingAgain(Caching):
    """Recomputes in the backward pass, and writes into the cache again."""

    def put(self, x: Tensor, cache: Cache) -> Tensor:
        if not self.training:
            return super().put(x, cache)
        return torch.utils.checkpoint.checkpoint(super().put, x, cache, use_reentrant=False)


def test_a_cache_that_grows_in_the_backward_pass_is_seen():
    refused(Caching(), X, lambda c: c.set_class(c.model, CachingAgain), r"returned 2 tensors.*shape \(4, 6, 8\)")


@dataclass
class Heads:
    late: Any
    early: Any


class Several(Stack):
    """Two outputs, in one of several containers."""

    def __init__(self, container: str) -> None:
        super().__init__()
        self.container, self.shift = container, 0.0

    def forward(self, x: Tensor) -> Any:
        early, late = self.blocks[0](x) + self.shift, self.blocks(x)
        if self.container == "cache":
            cache = Cache()
            cache.update(early)
            return late, cache
        return {
            "tuple": (late, early),
            "list": [late, [early]],
            "dict": {"late": late, "early": early},
            "dataclass": Heads(late, (early,)),
        }[self.container]


@pytest.mark.parametrize("container", ["tuple", "list", "dict", "dataclass", "cache"])
def test_every_output_is_compared(container):
    model = Several(container)
    refused(model, X, lambda c: c.set_attribute(model, "shift", 0.5), "the output changed by 0\\.")


class Drawing(Stack):
    """Drops, and multiplies by random numbers of Python and NumPy."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            factor = random.random() + np.random.rand() if self.training else 1.0
            x = nn.functional.dropout(block(x) * factor, 0.3, self.training)
        return x


def test_draws_are_the_same_before_and_after_and_states_are_put_back():
    model = Drawing().eval()
    operation = rescheme(model, X, "layerscale")
    assert operation.verified["training"].startswith("a pass forward and backward: outputs (difference 0)")
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for operate in (lambda: sw.deepen(model, X, 1), lambda: checkpointed(model, X)):
        assert operate().verified["training"].startswith("a pass forward and backward: outputs (difference 0)")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_random_numbers_depend_on_shapes_alone():
    x = torch.ones(64, requires_grad=True)
    with DrawsByShape():
        one = nn.functional.dropout(x)
        torch.randn(5)
        other = nn.functional.dropout(x)
        assert torch.equal(one, other)
        assert not torch.equal(torch.rand(5), torch.rand(6)[:5])


def test_what_was_verified_is_told():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    operation = sw.deepen(model, {"src": X, "mask": mask}, 1)
    assert operation.verified["outputs in evaluation"].startswith("1 tensor, difference ")
    assert "37 gradients" in operation.verified["training"]  # 36 parameters and the input
    assert "later entries of src along axis 0" in operation.verified["what outputs depend on"]
    assert "later entries of src along axis 1" in operation.verified["what outputs depend on"]
    for name, words in operation.verified.items():
        assert f"{name}: {words}" in str(operation)


def test_what_could_not_be_compared_is_told():
    operation = rescheme(Stack().to("meta"), X.to("meta"), "layerscale")
    assert operation.verified == {"nothing": "the model is on the meta device"}
    assert "difference" not in operation.report
    assert "difference" not in str(operation)
    assert sw.accelerate(Stack()).verified == {"nothing": "no example was given"}

    norm = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)).eval()
    operation = remove_norm(norm, torch.randn(1, 3, 4, 4), how="fold")
    assert "Expected more than 1 value per channel" in operation.verified["training"]
    operation = lesion(Stack().requires_grad_(False), X.requires_grad_(False), ["blocks.0"])
    assert operation.verified["training"].startswith("a pass forward and backward runs")  # the input has a gradient


def test_a_training_pass_leaves_gradients_hooks_and_examples_alone():
    model, x = Stack(), X.clone()
    model.blocks[0].up.weight.grad = torch.ones(16, 8)
    run_training_pass(model, x)
    assert model.blocks[0].up.weight.grad.eq(1).all()
    assert model.blocks[0].up.bias.grad is None
    assert x.grad is None
    assert not x.requires_grad
    writing = nn.Sequential(nn.ReLU(inplace=True), Stack())
    assert run_training_pass(writing, x) is not None
    assert torch.equal(x, X)


def test_in_inference_mode_new_parts_can_be_trained_later():
    model = Stack()
    with torch.inference_mode():
        sw.deepen(model, X.clone(), 1)
        rescheme(model, X.clone(), "layerscale")
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(X).sum().backward()
    with torch.inference_mode():
        model = Stack()
    operation = rescheme(model, X, "layerscale")  # its own weights cannot be trained
    assert operation.verified["training"].startswith("not compared: a training pass does not run")


@pytest.mark.parametrize("tolerance", [float("nan"), -1.0, "small", True])
def test_a_tolerance_is_a_number_of_at_least_0(tolerance):
    with pytest.raises(sw.SkipwayError, match=r"tolerance=.*: the rule is a number of at least 0"):
        rescheme(Stack(), X, "layerscale", tolerance=tolerance)


def test_parts_that_were_drawn_are_put_back_to_the_bit_even_if_a_check_is_interrupted():
    model = Stack()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    passes, stop = [0], [-1]

    def count(*_: object) -> None:
        passes[0] += 1
        if passes[0] == stop[0]:
            raise KeyboardInterrupt

    handle = model.blocks[2].register_forward_hook(count)
    operation = sw.deepen(model, X, 1)
    twins = [p.clone() for n, p in model.named_parameters() if "residual_scale" in n]
    assert sum(not twin.any() for twin in twins) >= 2  # the copy is silent again
    operation.undo()
    for number in range(1, passes[0] + 1):
        passes[0], stop[0] = 0, number
        with pytest.raises(KeyboardInterrupt):
            sw.deepen(model, X, 1)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    handle.remove()


@pytest.mark.parametrize(
    "operate",
    [
        lambda m: shorten(m, X, 2),
        lambda m: lesion(m, X, ["blocks.0"]),
        lambda m: skip_compute(m, X, 0.5),
        lambda m: sw.accelerate(m, X),
        lambda m: sw.surgery.reversible(m, X),
    ],
)
def test_every_operation_is_verified(operate):
    assert set(operate(Stack()).verified) == {"outputs in evaluation", "training", "what outputs depend on"}
