"""The widest precision of a device, in which many numbers are summed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["widest", "widest_type"]


def widest(tensor: Tensor) -> Tensor:
    """A tensor in float64, or in float32 where its device has no float64.

    >>> widest(torch.ones(1)).dtype
    torch.float64
    """
    return tensor.to(widest_type(tensor.device))


def widest_type(device: torch.device) -> torch.dtype:
    """The type of `widest`.

    >>> widest_type(torch.device("mps"))
    torch.float32
    """
    return torch.float32 if device.type == "mps" else torch.float64
