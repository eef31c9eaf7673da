"""Layer norm of rows in inference."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from skipway.kernels.autotune import Implementation, add_kernel
from skipway.kernels.native import has_native, native_layer_norm

__all__ = ["layer_norm"]


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's function."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


layer_norm = add_kernel("layer norm", layer_norm_reference, Implementation("native", native_layer_norm, has_native))
"""Layer norm over the last axis, without gradients."""
