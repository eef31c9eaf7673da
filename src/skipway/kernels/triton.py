"""Kernels for CUDA in Triton; the same code runs under Triton's interpreter on a CPU, where the tests check it."""

from __future__ import annotations

import math
import os
from functools import cache, reduce
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "HAS_TRITON",
    "channel_norm",
    "depthwise",
    "depthwise_to_input",
    "depthwise_to_weight",
    "fits_windows",
    "normalised",
    "residual",
    "residual_backward",
    "serves_depthwise",
    "serves_gradient",
    "serves_norm",
    "serves_residual",
    "serves_residual_norm",
    "serves_windows",
    "windows",
    "windows_backward",
]

HAS_TRITON = find_spec("triton") is not None
WIDEST = 8192
"""Channels that one program of the norm holds at once."""
WAVE = 2112
"""Programs that share the work where each leaves a sum behind: sixteen for each multiprocessor of an H100."""


def usable(x: Tensor) -> bool:
    """Whether Triton can run where x is: on a CUDA device, or anywhere under its interpreter."""
    return HAS_TRITON and bool(x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


@cache
def programs() -> Any:
    """The programs; Triton is imported when the first is needed."""
    return import_module("skipway.kernels.programs")


def dense(x: Tensor) -> Tensor:
    """A map as (N, H · W, C) or tokens as (N, T, C), without a copy."""
    return (x.movedim(1, -1) if x.ndim == 4 else x).flatten(1, -2)


def channels_last(*maps: Tensor) -> bool:
    return all(each.is_contiguous(memory_format=torch.channels_last) for each in maps)


def shared(work: int) -> int:
    """How many pieces each program takes so that `WAVE` programs do all."""
    return max(1, -(-work // WAVE))


def power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


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


def promoted(*given: Tensor | None) -> torch.dtype:
    """The type of their sum or product; a single number has no say in it, as in torch."""
    return reduce(torch.promote_types, (each.dtype for each in given if each is not None and each.ndim))


def packed(values: Tensor | None, other: Tensor) -> Tensor:
    """A few numbers one after the other; where there are none a program is given something that it does not read."""
    return other if values is None else values.contiguous()


def kind(gain: Tensor | None) -> int:
    """0: no gain, 1: one number, 2: one for each channel."""
    return 0 if gain is None else 1 if gain.numel() == 1 else 2


def residual(
    shortcut: Tensor, branch: Tensor, gain: Tensor | None, mask: Tensor | None, block: int = 2048, warps: int = 8
) -> Tensor:
    """`kernels.residual` in one pass, summed in float32."""
    out = torch.empty_like(branch, dtype=promoted(shortcut, branch, gain, mask))
    size, rows = branch.numel(), dense(branch)
    programs().residual[(-(-size // block),)](
        *(dense(shortcut), rows, packed(gain, branch), packed(mask, branch), dense(out), size),
        CHANNELS=rows.shape[-1],
        SAMPLE=rows[0].numel(),
        GAIN=kind(gain),
        MASK=mask is not None,
        BLOCK=block,
        num_warps=warps,
    )
    return out


def residual_backward(
    gradient: Tensor, branch: Tensor | None, gain: Tensor | None, mask: Tensor | None, tile: int = 2048, warps: int = 4
) -> tuple[Tensor, Tensor]:
    """The branch's gradient, and that of the gain for each channel, (C,): empty where no branch is given."""
    to_branch = torch.empty_like(gradient)
    lines = dense(gradient)
    count, channels = lines.shape[0] * lines.shape[1], lines.shape[2]
    block = min(power(channels), 256)
    rows = max(1, tile // block)
    steps = shared(-(-count // rows) * -(-channels // block))
    grid = (-(-count // (rows * steps)), -(-channels // block))
    sums = torch.empty(grid[0], channels, dtype=torch.float32, device=gradient.device)
    programs().residual_backward[grid](
        *(lines, lines if branch is None else dense(branch), packed(gain, gradient)),
        *(packed(mask, gradient), dense(to_branch), sums, count, lines.shape[1]),
        CHANNELS=channels,
        GAIN=kind(gain),
        MASK=mask is not None,
        LEARNED=branch is not None,
        STEPS=steps,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return to_branch, sums.sum(0) if branch is not None else sums.new_empty(0)


def serves_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> bool:
    """Maps that lie channels-last, of up to `WIDEST` channels."""
    return usable(x) and channels_last(x) and x.shape[1] <= WIDEST


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.channel_norm`: read once, written once."""
    return normalised(x, None, None, None, weight, bias, eps)[1:]


def serves_residual_norm(
    shortcut: Tensor, branch: Tensor, gain: Tensor | None, mask: Tensor | None, *others: Any
) -> bool:
    """What the epilogue serves, of up to `WIDEST` channels."""
    return serves_residual(shortcut, branch, gain, mask) and dense(branch).shape[-1] <= WIDEST


def normalised(
    x: Tensor,
    branch: Tensor | None,
    gain: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    tile: int = 2048,
    warps: int = 4,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.residual_norm` in one pass: the stream (x itself where no branch is given), its norm and moments."""
    rows = dense(x)
    stream = x if branch is None else torch.empty_like(x, dtype=promoted(x, branch, gain, mask))
    out = torch.empty_like(stream)
    sizes = (x.shape[0], *(x.shape[2:] if x.ndim == 4 else x.shape[1:-1]))
    means = torch.empty(sizes, dtype=torch.float32, device=x.device)
    inverses = torch.empty_like(means)
    block = power(rows.shape[-1])
    lines = max(1, tile // block)
    programs().channel_norm[(-(-means.numel() // lines),)](
        *(rows, rows if branch is None else dense(branch), packed(gain, x), packed(mask, x)),
        *(
            weight.contiguous(),
            bias.contiguous(),
            dense(stream),
            dense(out),
            means,
            inverses,
            means.numel(),
            rows.shape[1],
            rows.shape[2],
            eps,
        ),
        ADDED=branch is not None,
        GAIN=kind(gain),
        MASK=mask is not None,
        ROWS=lines,
        BLOCK=block,
        num_warps=warps,
    )
    return stream, out, means, inverses


def fits_windows(tokens: int, width: int) -> bool:
    """Windows of up to 64 tokens, heads of 16, 32 or 64 channels."""
    return tokens <= 64 and width in (16, 32, 64)


def serves_windows(qkv: Tensor, position: Tensor, down: int, across: int) -> bool:
    """What fits, the map in one piece."""
    heads, tokens = position.shape[:2]
    return usable(qkv) and qkv.is_contiguous() and fits_windows(tokens, qkv.shape[-1] // (3 * heads))


def sizes_of(qkv: Tensor, position: Tensor) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Windows, height and width; constants of the programs."""
    heads, tokens = position.shape[:2]
    side = math.isqrt(tokens)
    count, height, width = qkv.shape[:3]
    constants = {
        "HEADS": heads,
        "SIDE": side,
        "WIDTH": qkv.shape[-1] // (3 * heads),
        "BLOCK": max(16, power(tokens)),
        "PRECISION": "ieee" if qkv.dtype == torch.float32 else "tf32",
    }
    return (count * (height // side) * (width // side), height, width), constants


def windows(qkv: Tensor, position: Tensor, down: int, across: int, steps: int = 8, warps: int = 2) -> Tensor:
    """`kernels.windowed_attention`, from the map to the map."""
    (count, height, width), constants = sizes_of(qkv, position)
    out = qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))
    programs().window_attention[(-(-count // steps) * len(position),)](
        *(qkv, position.contiguous(), out, count, height, width, down, across, constants["WIDTH"] ** -0.5),
        **constants,
        STEPS=steps,
        num_warps=warps,
    )
    return out


def windows_backward(
    gradient: Tensor, qkv: Tensor, position: Tensor, down: int, across: int, steps: int | None = None, warps: int = 4
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and of the positions."""
    (count, height, width), constants = sizes_of(qkv, position)
    steps = shared(count * len(position)) if steps is None else steps
    splits = -(-count // steps)
    to_qkv = torch.empty_like(qkv)
    sums = torch.empty((splits, *position.shape), dtype=torch.float32, device=qkv.device)
    programs().window_attention_backward[(splits * len(position),)](
        *(gradient.contiguous(), qkv, position.contiguous(), to_qkv, sums, count, height, width, down, across),
        constants["WIDTH"] ** -0.5,
        **constants,
        STEPS=steps,
        num_warps=warps,
    )
    return to_qkv, sums.sum(0)


def serves_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Maps that lie channels-last; kernels of up to 7 × 7, whose sums fit into registers."""
    return usable(x) and channels_last(x) and weight.shape[-1] <= 7


def serves_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> bool:
    """The same of both maps."""
    return channels_last(gradient) and serves_depthwise(x, weight, None)


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int = 4, columns: int = 7, block: int = 64, warps: int = 1
) -> Tensor:
    """A depthwise convolution: each program holds a tile of the map in registers."""
    out = torch.empty_like(x)
    count, channels, height, width = x.shape
    side = weight.shape[-1]
    taps = weight.flatten(1).t().contiguous()
    grid = (count * -(-height // rows) * -(-width // columns), -(-channels // block))
    programs().depthwise[grid](
        *(dense(x), taps, packed(bias, taps), dense(out), height, width),
        CHANNELS=channels,
        SIDE=side,
        ROWS=rows,
        COLUMNS=columns,
        BLOCK=block,
        BIAS=bias is not None,
        num_warps=warps,
    )
    return out


def depthwise_to_input(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The same with the kernel turned by half a turn."""
    return depthwise(gradient, weight.flip(-2, -1), None)


def depthwise_to_weight(
    gradient: Tensor, x: Tensor, weight: Tensor, rows: int = 4, columns: int = 7, block: int = 32, warps: int = 1
) -> Tensor:
    """All k² sums of a channel in the registers of one thread; one sum of each program is left to add up."""
    count, channels, height, width = x.shape
    side = weight.shape[-1]
    tiles = count * -(-height // rows) * -(-width // columns)
    steps = shared(tiles * -(-channels // block))
    grid = (-(-tiles // steps), -(-channels // block))
    sums = torch.empty(grid[0], side * side, channels, dtype=torch.float32, device=x.device)
    programs().depthwise_to_weight[grid](
        *(dense(gradient), dense(x), sums, tiles, height, width),
        CHANNELS=channels,
        SIDE=side,
        ROWS=rows,
        COLUMNS=columns,
        STEPS=steps,
        BLOCK=block,
        num_warps=warps,
    )
    return sums.sum(0).t().reshape(weight.shape).to(weight.dtype)
