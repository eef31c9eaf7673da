"""Compute and memory of anybody's blocks: `skip_compute` for stochastic depth, `checkpointed` for activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skipway.errors import SkipwayError
from skipway.surgery.admission import admitted, refuse_branching
from skipway.surgery.depth import blocks_of
from skipway.surgery.operation import Operation
from skipway.surgery.verifying import difference, outputs
from skipway.tracing import Example, untouched
from skipway.tracing.watching import call

__all__ = ["checkpointed", "saved_bytes", "skip_compute"]


def skip_compute(model: nn.Module, rate: float, example: Example, *, rising: bool = True) -> Operation:
    """Stochastic depth that does not compute what it drops, around anybody's blocks, in place.

    In training a block sees only k = ⌈n(1 − p)⌉ of the n samples, drawn anew in each pass, and the others carry x:
    y = x, and on the drawn ones y = x + (n/k)(block(x) − x), so that the expectation is the block's own output. k does
    not depend on what is drawn, and is at least 1: shapes stay static for `torch.compile`, and every parameter has a
    gradient for DDP. In evaluation the block is what it was. Stochastic depth of the block's own is best switched off.

    Args:
        model: any module that `chain` can read, with blocks that carry x itself.
        rate: p of the last block, 0 < p < 1.
        example: what the model is called with.
        rising: p_l = p · l/L, as in Huang et al. 2016 (https://arxiv.org/abs/1603.09382, eq. 4); else p everywhere.

    Raises:
        SkipwayError: the rate is not between 0 and 1, or the model has no such block.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    >>> operation = skip_compute(model, 0.5, torch.randn(8, 3, 8))
    >>> [round(block.skipped, 3) for block in model.layers]
    [0.125, 0.25, 0.375, 0.5]
    """
    if not 0 < rate < 1:
        raise SkipwayError(f"rate={rate}: the share of samples that a block skips has to be between 0 and 1")
    model = admitted(model)
    refuse_branching(model, example, "skip_compute")
    blocks = present(model, example)
    before = outputs(model, example)
    operation = Operation(model, f"{type(model).__name__} skips up to {rate:g} of its blocks' samples", {}, {}, {})
    touched = {}
    try:
        for number, name in enumerate(blocks, start=1):
            block, own = model.get_submodule(name), rate * (number / len(blocks) if rising else 1)
            operation.steps.append(changed(block, skipping(type(block))))
            block.skipped = own  # type: ignore[assignment]
            operation.steps.append(partial(delattr, block, "skipped"))
            touched[name] = f"rate {own:.3g}"
        operation.report = {"difference": difference(before, outputs(model, example))}
    except BaseException:
        operation.undo()
        raise
    operation.touched = touched
    return operation


@cache
def skipping(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `kind` that in training computes only some of the samples."""

    def forward(self: nn.Module, x: Tensor, *others: Any, **named: Any) -> Any:
        if not self.training:
            return kind.forward(self, x, *others, **named)
        count = x.shape[0]
        kept = max(1, int(-(-count * (1 - self.skipped) // 1)))  # type: ignore[operator]
        drawn = torch.randperm(count, device=x.device)[:kept]
        part = x[drawn]
        change = kind.forward(self, part, *others, **named) - part
        return x.index_add(0, drawn, (change * (count / kept)).to(x.dtype))

    return type(f"{kind.__name__}Skipping", (kind,), {"forward": forward, "__module__": kind.__module__})


def checkpointed(model: nn.Module, example: Example) -> Operation:
    """Keep the input of every block and compute its inside again in the backward pass (Chen et al. 2016,
    https://arxiv.org/abs/1604.06174), for anybody's blocks, in place.

    Random numbers are the same in both computations, and running statistics are updated once (P22).

    Args:
        model: any module that `chain` can read.
        example: what the model is called with.

    Returns:
        the operation; its report holds the bytes that one training pass keeps for the backward pass, before and after.

    Raises:
        SkipwayError: the model has no block that carries x itself.
    """
    model = admitted(model)
    blocks = present(model, example)
    kept = saved_bytes(model, example)
    before = outputs(model, example)
    operation = Operation(model, f"{type(model).__name__} checkpoints {len(blocks)} blocks", {}, {}, {})
    try:
        for name in blocks:
            block = model.get_submodule(name)
            operation.steps.append(changed(block, recomputing(type(block))))
        operation.report = {
            "difference": difference(before, outputs(model, example)),
            "bytes before": kept,
            "bytes after": saved_bytes(model, example),
        }
    except BaseException:
        operation.undo()
        raise
    operation.touched = dict.fromkeys(blocks, "computed again in the backward pass")
    return operation


@cache
def recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `kind` whose inside is computed again in the backward pass."""

    def inside(self: nn.Module, *given: Any, **named: Any) -> Any:
        # the compiler recomputes operators, and writes what is written into a buffer once
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:  # not within a backward pass
            return kind.forward(self, *given, **named)
        with statistics_kept(self):
            return kind.forward(self, *given, **named)

    def forward(self: nn.Module, *given: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *given, **named)
        return checkpoint(inside, self, *given, use_reentrant=False, **named)

    return type(f"{kind.__name__}Checkpointed", (kind,), {"forward": forward, "__module__": kind.__module__})


@contextmanager
def statistics_kept(block: nn.Module) -> Iterator[None]:
    """Buffers as they were, running statistics among them, whatever the block writes into them."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in block.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and module.training
    ]
    try:
        yield
    finally:
        for module, name, buffer, old in kept:
            module._buffers[name] = buffer
            # past autograd, which may have kept a buffer that nothing wrote into
            buffer.data.copy_(old)


def changed(module: nn.Module, kind: type[nn.Module]) -> Callable[[], None]:
    """Give a module another class; what gives it back its own.

    Raises:
        SkipwayError: the module's forward is an attribute of the instance, which a class does not reach.
    """
    if "forward" in module.__dict__:
        raise SkipwayError(f"the forward of this {type(module).__name__} was replaced on the instance")
    own = type(module)
    module.__class__ = kind

    def put_back() -> None:
        module.__class__ = own

    return put_back


def present(model: nn.Module, example: Example) -> list[str]:
    """The blocks that carry x itself, of which there has to be one."""
    blocks = blocks_of(model, example)
    if not blocks:
        raise SkipwayError(
            f"{type(model).__name__} has no block that adds to x itself and puts out what is shaped like it"
        )
    return blocks


def saved_bytes(model: nn.Module, example: Example) -> float:
    """Bytes that one training pass keeps for its backward pass, parameters not counted, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # an address must not be used twice
        return tensor

    held: list[Tensor] = []
    with untouched(model), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call(model.train(), example)
    return float(sum(found.values()))
