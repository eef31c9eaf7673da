"""Max-pooling in inference."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from skipway.kernels.autotune import Implementation, add_kernel
from skipway.kernels.native import native_max_pool, takes_max_pool

__all__ = ["max_pool"]


def max_pool_reference(x: Tensor, side: int, stride: int, padding: int) -> Tensor:
    """torch's function."""
    return F.max_pool2d(x, side, stride, padding)


max_pool = add_kernel("max pool", max_pool_reference, Implementation("native", native_max_pool, takes_max_pool))
"""The largest numbers of square windows, without gradients."""
