"""The widest precision of a device, in which many numbers are summed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["exact", "widest", "widest_type"]

FLOAT64 = ("cpu", "cuda")
"""Kinds of devices that have that type; Apple's has not, and some of Intel's have not."""


def widest(tensor: Tensor) -> Tensor:
    """A tensor in float64, or in float32 where its device has no float64.

    >>> widest(torch.ones(1)).dtype
    torch.float64
    """
    return tensor.to(widest_type(tensor.device))


def exact(tensor: Tensor) -> Tensor:
    """A tensor in float64, on the CPU where its device has no such type: for differences of large sums.

    >>> exact(torch.ones(1)).dtype
    torch.float64
    """
    return (tensor if widest_type(tensor.device) == torch.float64 else tensor.cpu()).double()


def widest_type(device: torch.device) -> torch.dtype:
    """The type of `widest`.

    >>> widest_type(torch.device("mps")), widest_type(torch.device("xpu"))
    (torch.float32, torch.float32)
    """
    return torch.float64 if device.type in FLOAT64 else torch.float32
