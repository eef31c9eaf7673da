"""Gradients with respect to inputs, through models of any make."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["GradientFlags"]


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
