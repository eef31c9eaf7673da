"""Gradients through models of any make: with respect to inputs, and where parts are checkpointed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["GradientFlags", "without_reentry"]


@contextmanager
def without_reentry() -> Iterator[None]:
    """Context in which re-entrant checkpoints of torch are of the other kind, which computes the same gradients.

    A re-entrant one allows neither `torch.autograd.grad` nor hooks on what is computed inside.
    """
    held = torch.utils.checkpoint.CheckpointFunction
    torch.utils.checkpoint.CheckpointFunction = NonReentrant  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = held  # type: ignore[misc]


class NonReentrant:
    """Takes the place of torch's autograd function of re-entrant checkpoints."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Run the function, and recompute its activations in the backward pass."""
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve, determinism_check="none"
        )


class GradientFlags(TorchFunctionMode):
    """Context in which a model may set `requires_grad` on what was computed from an input that requires a gradient.

    Such a tensor requires one already, and torch allows the flag to be set on leaves alone: Wav2Vec2 sets it on its
    input so that checkpoints inside get a gradient.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        sets = getattr(func, "__name__", "") == "requires_grad_" or func == Tensor.requires_grad.__set__  # type: ignore[attr-defined]
        tensor = next(iter(args), None)
        if sets and isinstance(tensor, Tensor) and not tensor.is_leaf:
            return tensor
        return func(*args, **(kwargs or {}))
