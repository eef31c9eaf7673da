"""Passes written in C (`native.c`), compiled for this machine when they are first needed.

It takes a C compiler, as `torch.compile` does, and a second or two in each process. Without one torch's functions are
used.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipway.hardware.processor import has_amx

__all__ = ["attention_by_tiles", "has_native", "native_layer_norm", "takes_tiles"]

FLAGS = [
    *("-std=gnu11", "-O3", "-march=native", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
]
"""Sums may be taken in another order; values that are not finite stay what they are."""
OPTIONAL = (("-mprefer-vector-width=512", "-fopenmp"), ("-fopenmp",), ())
"""What not every compiler knows: with the first of these that it takes, the library is built."""
PATIENCE = 60
"""Seconds after which a compiler is given up."""
MOST_KEYS = 4096
"""Keys up to which a block of logits stays in a core's cache."""
POINTER, COUNT = ctypes.c_void_p, ctypes.c_int64


@dataclass(frozen=True)
class Library:
    """The functions of `native.c`.

    Args:
        layer_norms: by type.
        attention: None where the processor, or the system, has no tiles.
    """

    layer_norms: Mapping[torch.dtype, Callable[..., Any]]
    attention: Callable[..., int] | None


@cache
def library() -> Library | None:
    """The compiled passes; None without a compiler that builds them."""
    compiler = next(filter(None, map(shutil.which, compilers())), None)
    if compiler is None or sys.byteorder != "little" or os.name != "posix":
        return None
    source = Path(__file__).with_name("native.c")
    with tempfile.TemporaryDirectory(prefix="skipway-") as folder:
        built = Path(folder) / "native.so"
        for flags in OPTIONAL:
            command = [compiler, *FLAGS, *flags, str(source), "-o", str(built), "-lm"]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
                return declare(ctypes.CDLL(str(built)))
            except (OSError, subprocess.SubprocessError):
                continue
    return None


def compilers() -> Iterator[str]:
    """Names of C compilers, that of the environment first."""
    if named := os.environ.get("CC", "").split():
        yield named[0]
    yield from ("cc", "gcc", "clang")


def declare(found: ctypes.CDLL) -> Library:
    """Tell a library's functions what they take."""
    norms = {
        torch.bfloat16: found.skipway_layer_norm_bfloat16,
        torch.float32: found.skipway_layer_norm_float32,
    }
    for function in norms.values():
        function.argtypes, function.restype = [POINTER] * 4 + [COUNT, COUNT, ctypes.c_float, ctypes.c_int], None
    if not found.skipway_has_tiles():
        return Library(norms, None)
    found.skipway_attention.argtypes = [POINTER] * 6 + [COUNT] * 6 + [ctypes.c_float, ctypes.c_int]
    return Library(norms, found.skipway_attention)


def has_native(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> bool:
    """Whether `native_layer_norm` takes these arguments."""
    fits = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and x.is_contiguous() and x.numel() > 0
    affine = all(each is not None and each.dtype == x.dtype and each.is_contiguous() for each in (weight, bias))
    return fits and affine and library() is not None


def native_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise the rows of a contiguous tensor, as `torch.nn.functional.layer_norm` does over the last axis."""
    found, size, y = library(), x.shape[-1], torch.empty_like(x)
    assert found is not None
    pointers = (each.data_ptr() for each in (x, weight, bias, y))
    found.layer_norms[x.dtype](*pointers, x.numel() // size, size, eps, torch.get_num_threads())
    return y


def takes_tiles(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, keep_weights: bool) -> bool:
    """Whether `attention_by_tiles` takes these arguments: bfloat16 on a processor with AMX, no causal mask."""
    if not has_amx() or causal or keep_weights or q.shape[-1] % 2 or k.shape[-2] > MOST_KEYS:
        return False
    for each in (q, k, v):
        plain = each.device.type == "cpu" and each.dtype == torch.bfloat16 and each.ndim == 4 and each.stride(-1) == 1
        if not plain or each.shape[-1] != q.shape[-1] or each.shape[:2] != q.shape[:2] or not each.numel():
            return False
    if v.shape[-2] != k.shape[-2] or k.stride(-2) * 16 >= 1 << 31:
        return False
    if bias is not None:
        fits = bias.shape[1:] == (*q.shape[1:3], k.shape[-2]) and len(q) % len(bias) == 0
        if not fits or bias.dtype != q.dtype or not bias.is_contiguous():
            return False
    found = library()
    return found is not None and found.attention is not None


def attention_by_tiles(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, keep_weights: bool
) -> tuple[Tensor, Tensor]:
    """Compute softmax(q kᵀ / √d + B) v head by head in matrix units: logits and sums stay in float32 and in a core's
    cache, and a bias is broadcast over images.
    """
    found, (images, heads, rows, dims) = library(), q.shape
    assert found is not None
    assert found.attention is not None
    out = q.new_empty(images, rows, heads, dims)
    failed = found.attention(
        *(each.data_ptr() for each in (q, k, v)),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        (COUNT * 9)(*(step for each in (q, k, v) for step in each.stride()[:3])),
        *(images, heads, rows, k.shape[2], dims, 1 if bias is None else len(bias)),
        dims**-0.5,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for a block of attention")
    return out.transpose(1, 2), q.new_empty(0)
