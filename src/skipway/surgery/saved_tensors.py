"""Bytes that autograd keeps for the backward pass, of a whole network and of each block."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.surgery.block_call import BlockCall
from skipway.surgery.verification import forward_hooks
from skipway.tracing import Example, call_model, preserved_state
from skipway.tracing.example import copy_example
from skipway.tracing.reentrant_checkpoints import NonReentrant
from skipway.tracing.watch import storage_of

__all__ = ["Costs", "SavedTensors", "costs_of", "saved_bytes"]

COMPRESSED = {
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}
SPARSE = {torch.sparse_coo: ("_indices", "_values"), **COMPRESSED}
"""Methods that return the dense tensors of which a sparse one consists, by its layout."""


@dataclass(frozen=True)
class Costs:
    """Bytes that autograd keeps for one block.

    Args:
        name: path of the block.
        inside: bytes kept within the block.
        given: bytes of its input, which are kept instead if the block is computed again.
    """

    name: str
    inside: float
    given: float


class SavedTensors:
    """Counts the storages that autograd keeps, each once, and lets go of them, so that counting takes no memory.

    Args:
        parameters: tensors that are not counted.

    >>> saved, layer = SavedTensors([]), nn.Linear(2, 2, bias=False)
    >>> with saved.counting():
    ...     y = layer(torch.ones(3, 2))
    >>> saved.total
    24.0
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.alive = {key: None for parameter in parameters for key, _, _ in memory_of(parameter)}
        self.within: list[str] = [""]
        self.bytes: dict[str, float] = {}

    def counting(self) -> AbstractContextManager[Any]:
        """Within it, what passes keep is counted and dropped: there is no backward pass after them."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, refuse_unpack)

    @property
    def total(self) -> float:
        """All bytes."""
        return sum(self.bytes.values())

    def pack(self, tensor: Tensor) -> None:
        """Count the storages of a tensor that were not counted."""
        for key, holder, size in memory_of(tensor):
            if key not in self.alive:
                # its address may be used again when it is gone
                self.alive[key] = weakref.ref(holder, partial(self.forget, key))  # type: ignore[assignment]
                name = self.within[-1]
                self.bytes[name] = self.bytes.get(name, 0.0) + size

    def forget(self, key: int, _: object) -> None:
        """Count what lies at an address again: what was there is gone."""
        self.alive.pop(key, None)


def memory_of(tensor: Tensor) -> Iterator[tuple[int, object, int]]:
    """The storages of a tensor, of which a sparse one has several: address, storage and bytes; the tensor itself where
    its storage cannot be told.
    """
    parts = [getattr(tensor, name)() for name in SPARSE.get(tensor.layout, ())] or [tensor]
    for part in parts:
        storage = storage_of(part)
        if storage is None:
            yield id(part), part, part.numel() * part.element_size()
        else:
            yield storage._cdata, storage, storage.nbytes()


def refuse_unpack(_: None) -> Tensor:
    """Refuse to give back a tensor that was counted only."""
    raise RuntimeError("saved tensors were counted, not kept; there is no backward pass after this forward pass")


def saved_bytes(model: nn.Module, example: Example) -> float:
    """Bytes that one training pass keeps for its backward pass, parameters not counted, each storage once; the model is
    left alone.
    """
    return costs_of(model, example, {})[0]


def costs_of(model: nn.Module, example: Example, calls: Mapping[str, BlockCall]) -> tuple[float, dict[str, Costs]]:
    """Bytes that one training pass keeps for its backward pass, parameters not counted, each storage once: of the whole
    model, and of each of the blocks, in the order in which they run; the model is left alone.

    Args:
        model: any module.
        example: what it is called with.
        calls: of the blocks, by their names.

    Raises:
        SkipwayError: the model has re-entrant checkpoints of its own.
    """
    saved, inputs = SavedTensors(model.parameters()), dict[str, float]()

    def enter(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = calls[name].take(args, kwargs)
        inputs.setdefault(name, float(x.numel() * x.element_size()))
        saved.within.append(name)

    def leave(name: str, *_: Any) -> None:
        saved.within.pop()

    hooks = forward_hooks(model, calls, enter=enter, leave=leave)
    with hooks, preserved_state(model), torch.enable_grad(), saved.counting():
        before = NonReentrant.calls
        call_model(model.train(), copy_example(example, gradients=True))
    if NonReentrant.calls > before:
        raise SkipwayError(
            f"{type(model).__name__} checkpoints blocks by itself, re-entrantly, which computes them without gradients "
            "first; switch that off with gradient_checkpointing_disable(), or give use_reentrant=False: "
            'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
        )
    return saved.total, {name: Costs(name, saved.bytes.get(name, 0.0), own) for name, own in inputs.items()}
