"""Kernels for CUDA in Triton; the same code runs under Triton's interpreter on a CPU, where the tests check it."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["channel_norm", "residual", "serves_norm", "serves_residual"]

BLOCK = 1024
"""Numbers that one program of the residual kernel works on."""
WIDEST = 8192
"""Channels that one program of the norm holds at once."""


def usable(x: Tensor) -> bool:
    """Whether Triton can run where x is: on a CUDA device, or anywhere under its interpreter."""
    return bool(x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and find_spec("triton") is not None


def dense(x: Tensor) -> Tensor:
    """A map as (N, H · W, C) or tokens as (N, T, C), without a copy."""
    return (x.movedim(1, -1) if x.ndim == 4 else x).flatten(1, -2)


def serves_residual(shortcut: Tensor, branch: Tensor, gain: Tensor | None, mask: Tensor | None) -> bool:
    """Tokens, and maps that lie channels-last; a gain per channel or none, a mask per sample or none."""
    if not usable(branch) or branch.ndim not in (3, 4) or shortcut.shape != branch.shape:
        return False
    layout = torch.channels_last if branch.ndim == 4 else torch.contiguous_format
    channels = branch.shape[1] if branch.ndim == 4 else branch.shape[2]
    return (
        all(each.is_contiguous(memory_format=layout) for each in (shortcut, branch))
        and (gain is None or gain.numel() in (1, channels))
        and (mask is None or mask.numel() == branch.shape[0])
    )


def serves_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> bool:
    """Maps that lie channels-last, of up to `WIDEST` channels."""
    return usable(x) and x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] <= WIDEST


@cache
def programs() -> tuple[Any, Any]:
    """The compiled programs; Triton is imported when the first is needed."""
    triton = import_module("triton")
    tl = import_module("triton.language")

    @triton.jit
    def residual_program(
        shortcut, branch, gain, mask, out, size, channels, sample, GAIN: tl.constexpr, MASK: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        y = tl.load(branch + at, inside).to(tl.float32)
        if GAIN == 1:
            y *= tl.load(gain).to(tl.float32)
        if GAIN == 2:
            y *= tl.load(gain + at % channels, inside).to(tl.float32)
        if MASK:
            y *= tl.load(mask + at // sample, inside).to(tl.float32)
        tl.store(out + at, (y + tl.load(shortcut + at, inside).to(tl.float32)).to(out.dtype.element_ty), inside)

    @triton.jit
    def norm_program(x, weight, bias, out, means, inverses, channels, eps, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        inside = at < channels
        values = tl.load(x + row * channels + at, inside, other=0.0).to(tl.float32)
        mean = tl.sum(values, 0) / channels
        centred = tl.where(inside, values - mean, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / channels + eps)
        scaled = centred * inverse * tl.load(weight + at, inside).to(tl.float32)
        y = scaled + tl.load(bias + at, inside).to(tl.float32)
        tl.store(out + row * channels + at, y.to(out.dtype.element_ty), inside)
        tl.store(means + row, mean)
        tl.store(inverses + row, inverse)

    return residual_program, norm_program


def residual(shortcut: Tensor, branch: Tensor, gain: Tensor | None, mask: Tensor | None) -> Tensor:
    """`kernels.residual` in one pass, summed in float32."""
    out = torch.empty_like(branch)
    size, rows = branch.numel(), dense(branch)
    kind = 0 if gain is None else 1 if gain.numel() == 1 else 2
    programs()[0][(-(-size // BLOCK),)](
        *(dense(shortcut), rows, branch if gain is None else gain, branch if mask is None else mask, dense(out)),
        *(size, rows.shape[-1], rows[0].numel()),
        GAIN=kind,
        MASK=mask is not None,
        BLOCK=BLOCK,
    )
    return out


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.channel_norm`, a pixel per program: read once, written once."""
    out = torch.empty_like(x)
    means = torch.empty((x.shape[0], *x.shape[2:]), dtype=torch.float32, device=x.device)
    inverses = torch.empty_like(means)
    width = 1 << (x.shape[1] - 1).bit_length()
    programs()[1][(means.numel(),)](dense(x), weight, bias, dense(out), means, inverses, x.shape[1], eps, BLOCK=width)
    return out, means, inverses
