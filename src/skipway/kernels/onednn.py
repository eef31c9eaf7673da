"""torch's one door to oneDNN for products of two activations in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

__all__ = ["has_door", "opened", "through_onednn"]


@contextmanager
def through_onednn() -> Iterator[None]:
    """Within, products in float32 go through oneDNN, in the whole process.

    The door is the setting that allows bfloat16 inside of products. Where the processor has matrix units for it they
    are then rounded.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - its stub has none
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its products going through oneDNN; a kernel's comparison with its reference finds where they
    are rounded, and refuses the way.

    >>> opened(torch.matmul)(torch.ones(1, 2), torch.ones(2, 1))
    tensor([[2.]])
    """

    @wraps(function)
    def run(*arguments: Any) -> Any:
        with through_onednn():
            return function(*arguments)

    return run


def has_door(*arguments: Any, types: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether all tensors are on the CPU in one of these types, and this torch has the setting.

    >>> has_door(torch.ones(1).double())
    False
    """
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    return all(each.device.type == "cpu" and each.dtype in types for each in tensors) and hasattr(
        getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"
    )
