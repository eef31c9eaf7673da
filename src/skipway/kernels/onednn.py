"""Products of two activations through oneDNN in float32, for which torch offers one setting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from skipway.hardware.processor import has_amx

__all__ = ["onednn_matmul", "supports_onednn_matmul", "with_onednn_matmul"]


class OpenProducts:
    """Open `onednn_matmul` contexts of all threads, and the setting before the first of them."""

    count, before = 0, "none"
    lock = Lock()


@contextmanager
def onednn_matmul() -> Iterator[None]:
    """Send products in float32 to oneDNN within the context, in the whole process.

    The setting is the one that allows bfloat16 inside float32 products: on processors with matrix units for bfloat16
    (AMX) the products are then rounded to it, those of other threads, too.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - its stub has none
    with OpenProducts.lock:
        if not OpenProducts.count:
            OpenProducts.before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        OpenProducts.count += 1
    try:
        yield
    finally:
        with OpenProducts.lock:
            OpenProducts.count -= 1
            if not OpenProducts.count:
                matmul.fp32_precision = OpenProducts.before


def with_onednn_matmul(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with its products sent to oneDNN.

    It is for processors on which that rounds nothing, see `supports_onednn_matmul`.

    >>> with_onednn_matmul(torch.matmul)(torch.ones(1, 2), torch.ones(2, 1))
    tensor([[2.]])
    """

    @wraps(function)
    def run(*arguments: Any) -> Any:
        with onednn_matmul():
            return function(*arguments)

    return run


def supports_onednn_matmul(*arguments: Any, types: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Return whether all tensors are on the CPU in one of `types`, and this torch has the setting; not where the
    setting rounds (AMX). Products of bfloat16 in float32 would lose nothing by it there, but the setting is that of the
    process: those of other threads would be rounded meanwhile.

    >>> supports_onednn_matmul(torch.ones(1).double())
    False
    """
    if has_amx() or not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"):
        return False
    return all(each.device.type == "cpu" and each.dtype in types for each in arguments if isinstance(each, Tensor))
