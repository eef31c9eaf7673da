"""The layout in memory that torch's convolutions read and write: channels first, or channels-last."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

__all__ = ["lay_out", "memory_layout", "output_layout"]


def memory_layout(x: Tensor) -> torch.memory_format:
    """Return the layout that torch takes a map or a weight to have. Those of one channel or one pixel are contiguous in
    both; the strides of their axes of length 1 decide.

    >>> images = torch.zeros(2, 1, 4, 4)
    >>> memory_layout(images), memory_layout(images.to(memory_format=torch.channels_last))
    (torch.contiguous_format, torch.channels_last)
    """
    return suggest_memory_format(x)


def output_layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Return the layout of what torch's convolution returns: channels-last where the map or the weight is."""
    layout = memory_layout(x)
    return layout if layout == torch.channels_last else memory_layout(weight)


def lay_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    """Return a map in a layout, which is then its `memory_layout`: what is contiguous in both is copied if need be."""
    return x.contiguous(memory_format=layout).to(memory_format=layout)
