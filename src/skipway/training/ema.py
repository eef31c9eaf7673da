"""An exponential moving average of the weights, which is evaluated and kept in their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from skipway.checkpoint.state import local_tensor, place_like
from skipway.errors import CheckpointError
from skipway.weights.prefixes import EXTRA

__all__ = ["ModelEMA"]


class ModelEMA:
    """a <- d a + (1 - d) w after each update, with d = min(decay, (1 + t) / (10 + t)) at update t = 1, 2, …

    The decay rises, so that the initial weights are forgotten (as in TensorFlow's ExponentialMovingAverage and timm).
    Floating-point buffers such as running statistics are averaged too, so that they fit the averaged weights; counters
    are copied. Tensors of `get_extra_state` are left out: they are made anew for each state dict.

    Args:
        model: the model whose parameters and buffers are averaged; left unchanged.
        decay: 0 < decay < 1.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 0.0)
    >>> average = ModelEMA(model, decay=0.9)
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> average.update(model, 1)
    >>> with average.applied(model):
    ...     round(model.weight.item(), 4)
    0.8182
    >>> model.weight.item()
    1.0
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in averaged(model.state_dict()).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, update: int) -> None:
        """Include the weights after optimizer update number `update`, from 1."""
        weight = 1 - min(self.decay, (1 + update) / (10 + update))
        for name, tensor in averaged(model.state_dict()).items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor, weight)
            else:
                local_tensor(self.tensors[name]).copy_(local_tensor(place_like(tensor, self.tensors[name])))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Context in which the model has the averaged weights; a tensor with several names, that of the first."""
        tensors = averaged(model.state_dict())
        with torch.no_grad():
            self.swap(reversed(tensors.items()))  # and back in reverse: tensors may share memory
            try:
                yield
            finally:
                self.swap(tensors.items())

    def swap(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Swap tensors of the model with their averages, in place, one after the other."""
        for name, tensor in tensors:
            kept = tensor.detach().clone()
            tensor.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load averages from a checkpoint.

        Raises:
            CheckpointError: names or shapes differ.
        """
        tensors = averaged(tensors)
        if tensors.keys() != self.tensors.keys():
            raise CheckpointError("the averaged weights of the checkpoint belong to another network")
        for name, tensor in tensors.items():
            if tensor.shape != self.tensors[name].shape:
                raise CheckpointError(f"the averaged {name} is {tuple(tensor.shape)} in the checkpoint")
            local_tensor(self.tensors[name]).copy_(local_tensor(place_like(tensor, self.tensors[name])))


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state dict that are averaged: parameters and buffers, and no extra state of a module."""
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] != EXTRA}
