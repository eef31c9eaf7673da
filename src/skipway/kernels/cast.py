"""Types of a kernel's arguments: the type that autocast asks for, and the type in which sums are taken."""

from __future__ import annotations

from torch import Tensor, float32, float64, get_autocast_dtype, is_autocast_enabled, promote_types

__all__ = ["at_least_float32", "eligible", "to_autocast"]


def to_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast floating-point tensors but float64 to autocast's type where it is on, as it does before a matrix product.

    >>> import torch
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     to_autocast(torch.ones(1), None)
    (tensor([1.], dtype=torch.bfloat16), None)
    """
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not is_autocast_enabled(device):
        return tensors
    dtype = get_autocast_dtype(device)
    return tuple(each.to(dtype) if each is not None and eligible(each) else each for each in tensors)


def eligible(x: Tensor) -> bool:
    """Whether autocast casts a tensor."""
    return x.is_floating_point() and x.dtype != float64


def at_least_float32(x: Tensor) -> Tensor:
    """Cast 16-bit tensors to float32; others keep their type.

    >>> import torch
    >>> at_least_float32(torch.ones(1).bfloat16()).dtype, at_least_float32(torch.ones(1).double()).dtype
    (torch.float32, torch.float64)
    """
    return x.to(promote_types(x.dtype, float32))
