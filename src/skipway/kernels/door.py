"""torch's one door to oneDNN for products of two activations in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

__all__ = ["has_door", "opened"]


def opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its products going through oneDNN.

    The door is the setting that allows bfloat16 inside of products. Where the processor has matrix units for it they
    are then rounded; a kernel's comparison with its reference finds that and refuses the way. The setting is the
    process's, and is put back after the call.

    >>> opened(torch.matmul)(torch.ones(1, 2), torch.ones(2, 1))
    tensor([[2.]])
    """

    @wraps(function)
    def run(*arguments: Any) -> Any:
        matmul: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - its stub has none
        before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        try:
            return function(*arguments)
        finally:
            matmul.fp32_precision = before

    return run


def has_door(*arguments: Any) -> bool:
    """Whether all tensors are on the CPU in float32, and this torch has the setting.

    >>> has_door(torch.ones(1).double())
    False
    """
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    return all(each.device.type == "cpu" and each.dtype == torch.float32 for each in tensors) and hasattr(
        getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"
    )
