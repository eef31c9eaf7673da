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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipway.hardware.processor import has_amx

__all__ = [
    "attention_by_tiles",
    "has_native",
    "has_native_gelu",
    "native_depthwise",
    "native_gelu_",
    "native_layer_norm",
    "native_max_pool",
    "takes_depthwise",
    "takes_max_pool",
    "takes_tiles",
]

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
        gelu: None where the processor does not convert vectors to bfloat16.
        depthwise: like `gelu`.
        max_pool: like `gelu`.
        attention: None where the processor, or the system, has no tiles.
    """

    layer_norms: Mapping[torch.dtype, Callable[..., Any]]
    gelu: Callable[..., None] | None = None
    depthwise: Callable[..., int] | None = None
    max_pool: Callable[..., None] | None = None
    attention: Callable[..., int] | None = None


@cache
def library() -> Library | None:
    """The compiled passes; None without a compiler that builds them."""
    if sys.byteorder != "little" or os.name != "posix":
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="skipway-", ignore_cleanup_errors=True) as folder:
            return build(Path(folder))
    except (OSError, subprocess.TimeoutExpired):  # a folder that cannot be written, a compiler that hangs
        return None


def build(folder: Path) -> Library | None:
    """Build the passes in a folder with the first compiler, and the first of the flags, that do."""
    source, built = Path(__file__).with_name("native.c"), folder / "native.so"
    for compiler, flags in product(compilers(), OPTIONAL):
        command = [*compiler, *FLAGS, *flags, str(source), "-o", str(built), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
            return declare(ctypes.CDLL(str(built)))
        except (OSError, AttributeError, subprocess.CalledProcessError):
            continue
    return None


def compilers() -> list[list[str]]:
    """C compilers that are there, as commands with their first options; that of the environment first."""
    named = [os.environ.get("CC", "").split(), ["cc"], ["gcc"], ["clang"]]
    return [each for each in named if each and shutil.which(each[0])]


def declare(found: ctypes.CDLL) -> Library:
    """Tell a library's functions what they take."""
    norms = {
        torch.bfloat16: found.skipway_layer_norm_bfloat16,
        torch.float32: found.skipway_layer_norm_float32,
    }
    for function in norms.values():
        function.argtypes, function.restype = [POINTER] * 4 + [COUNT, COUNT, ctypes.c_float, ctypes.c_int], None
    if not found.skipway_has_vectors():
        return Library(norms)
    found.skipway_gelu.argtypes, found.skipway_gelu.restype = [POINTER, COUNT, ctypes.c_int], None
    found.skipway_depthwise.argtypes = [POINTER] * 4 + [COUNT] * 5 + [ctypes.c_int]
    found.skipway_max_pool.argtypes = [POINTER] * 2 + [COUNT] * 9 + [ctypes.c_int]
    found.skipway_max_pool.restype = None
    vectors = Library(norms, found.skipway_gelu, found.skipway_depthwise, found.skipway_max_pool)
    if not found.skipway_has_tiles():
        return vectors
    found.skipway_attention.argtypes = [POINTER] * 6 + [COUNT] * 7 + [ctypes.c_float, ctypes.c_int]
    return replace(vectors, attention=found.skipway_attention)


def has_native(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> bool:
    """Whether `native_layer_norm` takes these arguments."""
    fits = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and x.is_contiguous() and x.numel() > 0
    affine = all(each is not None and each.dtype == x.dtype and each.is_contiguous() for each in (weight, bias))
    return fits and affine and library() is not None


def native_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise the rows of a tensor, as `torch.nn.functional.layer_norm` does over the last axis."""
    x = x.contiguous()
    found, size, y = library(), x.shape[-1], torch.empty_like(x)
    assert found is not None
    pointers = (each.data_ptr() for each in (x, weight, bias, y))
    found.layer_norms[x.dtype](*pointers, x.numel() // size, size, eps, torch.get_num_threads())
    return y


def has_native_gelu(x: Tensor) -> bool:
    """Whether `native_gelu_` computes GELU for a result of this type."""
    found = library() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else None
    return found is not None and found.gelu is not None


def native_gelu_(x: Tensor) -> Tensor:
    """GELU of a contiguous tensor in bfloat16, in place, off by 1e-4 before it is rounded."""
    found = library()
    assert found is not None
    assert found.gelu is not None
    found.gelu(x.data_ptr(), x.numel(), torch.get_num_threads())
    return x


def takes_depthwise(x: Tensor, weight: Tensor | None, bias: Tensor | None, stride: Any, padding: Any) -> bool:
    """Whether `native_depthwise` takes these arguments: bfloat16 in channels-last, a kernel of side 3, 5 or 7, and a
    result as large as x.
    """
    tensors = [each for each in (x, weight, bias) if each is not None]
    if weight is None or any(each.device.type != "cpu" or each.dtype != torch.bfloat16 for each in tensors):
        return False
    side = weight.shape[-1]
    shaped = side in (3, 5, 7) and weight.shape == (x.shape[1], 1, side, side) and x.numel() > 0
    if not shaped or set(stride) != {1} or set(padding) != {side // 2}:
        return False
    found = library() if x.is_contiguous(memory_format=torch.channels_last) else None
    return found is not None and found.depthwise is not None


def native_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A depthwise convolution in channels-last, its sums in float32."""
    x = x.contiguous(memory_format=torch.channels_last)
    found, (images, channels, height, width), y = library(), x.shape, torch.empty_like(x)
    assert found is not None
    assert found.depthwise is not None
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    failed = found.depthwise(
        *(x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()),
        *(images, height, width, channels, weight.shape[-1]),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for rows of a convolution")
    return y


def takes_max_pool(x: Tensor, side: int, stride: int, padding: int) -> bool:
    """Whether `native_max_pool` takes these arguments: bfloat16 in channels-last."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or x.ndim != 4 or not x.numel():
        return False
    fits = padding <= side // 2 and side <= min(x.shape[-2:]) + 2 * padding
    found = library() if fits and x.is_contiguous(memory_format=torch.channels_last) else None
    return found is not None and found.max_pool is not None


def native_max_pool(x: Tensor, side: int, stride: int, padding: int) -> Tensor:
    """The largest numbers of square windows of images in channels-last."""
    x = x.contiguous(memory_format=torch.channels_last)
    found, (images, channels, height, width) = library(), x.shape
    assert found is not None
    assert found.max_pool is not None
    down, across = ((each + 2 * padding - side) // stride + 1 for each in (height, width))
    y = torch.empty(images, channels, down, across, dtype=x.dtype, memory_format=torch.channels_last)
    sizes = (images, height, width, channels, down, across, side, stride, padding)
    found.max_pool(x.data_ptr(), y.data_ptr(), *sizes, torch.get_num_threads())
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
        fits = bias.shape[1] in (1, q.shape[1]) and bias.shape[2:] == (q.shape[2], k.shape[-2])
        fits = fits and len(q) % len(bias) == 0
        if not fits or bias.dtype != q.dtype or not bias.is_contiguous():
            return False
    found = library()
    return found is not None and found.attention is not None


def attention_by_tiles(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, keep_weights: bool
) -> tuple[Tensor, Tensor]:
    """Compute softmax(q kᵀ / √d + B) v head by head in matrix units: logits and sums stay in float32 and in a core's
    cache, and a bias is broadcast over images, and over heads where it has one for all.
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
        *(images, heads, rows, k.shape[2], dims, *((1, 1) if bias is None else bias.shape[:2])),
        dims**-0.5,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for a block of attention")
    return out.transpose(1, 2), q.new_empty(0)
