"""Types of the arguments of a kernel: what autocast makes of them, and in what sums are taken."""

from __future__ import annotations

from torch import Tensor, float32, get_autocast_dtype, is_autocast_enabled, promote_types

__all__ = ["lowered", "wide"]


def lowered(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast hands them to a matrix product: in its type where it is on, else as they are.

    >>> import torch
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     lowered(torch.ones(1), None)
    (tensor([1.], dtype=torch.bfloat16), None)
    """
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not is_autocast_enabled(device):
        return tensors
    dtype = get_autocast_dtype(device)
    return tuple(each.to(dtype) if each is not None and each.is_floating_point() else each for each in tensors)


def wide(x: Tensor) -> Tensor:
    """In float32 at least.

    >>> import torch
    >>> wide(torch.ones(1).bfloat16()).dtype, wide(torch.ones(1).double()).dtype
    (torch.float32, torch.float64)
    """
    return x.to(promote_types(x.dtype, float32))
