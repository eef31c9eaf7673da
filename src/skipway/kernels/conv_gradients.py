"""torch's own gradients of a convolution, which kernels are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["convolution_gradients"]


def convolution_gradients(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: tuple[bool, bool, bool],
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> list[Tensor]:
    """Return torch's gradients of x, weight and bias where `mask` asks for them; stride and padding of both axes."""
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, [0], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, mask
    )
