"""What autograd keeps for the backward pass, in bytes: of the whole network and of each block."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipway.tracing import Example, preserved_state
from skipway.tracing.example import call_model

__all__ = ["Costs", "Saved", "costs_of", "saved_bytes"]


@dataclass(frozen=True)
class Costs:
    """What one block keeps for the backward pass.

    Args:
        name: of the block.
        inside: bytes that it keeps.
        given: bytes of its input, which have to be kept instead where it is computed again.
    """

    name: str
    inside: float
    given: float


class Saved:
    """Counts the storages that autograd keeps, each once, and lets go of them, so that counting takes no memory.

    Args:
        parameters: which are not counted.

    >>> saved, layer = Saved([]), nn.Linear(2, 2, bias=False)
    >>> with saved.counting():
    ...     y = layer(torch.ones(3, 2))
    >>> saved.total
    24.0
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.alive = {parameter.untyped_storage()._cdata: None for parameter in parameters}
        self.within: list[str] = [""]
        self.bytes: dict[str, float] = {}

    def counting(self) -> AbstractContextManager[Any]:
        """What is kept by passes within is counted, and gone: there is no backward pass behind them."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, unkept)

    @property
    def total(self) -> float:
        """All bytes."""
        return sum(self.bytes.values())

    def pack(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place not in self.alive:
            # its address may be used again when it is gone
            self.alive[place] = weakref.ref(storage, lambda _: self.alive.pop(place, None))  # type: ignore[assignment]
            name = self.within[-1]
            self.bytes[name] = self.bytes.get(name, 0.0) + storage.nbytes()

    def enter(self, name: str, module: nn.Module, given: Any) -> None:
        self.within.append(name)

    def leave(self, module: nn.Module, given: Any, out: Any) -> None:
        self.within.pop()


def unkept(_: None) -> Tensor:
    raise RuntimeError("what was counted was not kept")


def saved_bytes(model: nn.Module, example: Example) -> float:
    """Bytes that one training pass keeps for its backward pass, parameters not counted, each storage once."""
    return costs_of(model, example, ())[0]


def costs_of(model: nn.Module, example: Example, blocks: Iterable[str]) -> tuple[float, dict[str, Costs]]:
    """Bytes that one training pass keeps for its backward pass, parameters not counted, each storage once: of the whole
    model, and of each of the blocks, in the order in which they run.
    """
    saved, given = Saved(model.parameters()), dict[str, float]()

    def enter(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        given.setdefault(name, float(inputs[0].numel() * inputs[0].element_size()))
        saved.enter(name, module, inputs)

    handles: list[Any] = []
    for name in blocks:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(partial(enter, name)))
        handles.append(module.register_forward_hook(saved.leave, always_call=True))
    try:
        with preserved_state(model), torch.enable_grad(), saved.counting():
            call_model(model.train(), example)
    finally:
        for handle in handles:
            handle.remove()
    return saved.total, {name: Costs(name, saved.bytes.get(name, 0.0), own) for name, own in given.items()}
