"""Launch of the kernels in Triton, on CUDA; tests run the same code on a CPU in Triton's interpreter."""

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
    "fits_windows",
    "launch_depthwise",
    "launch_depthwise_to_input",
    "launch_depthwise_to_weight",
    "launch_residual",
    "launch_residual_backward",
    "launch_windows",
    "launch_windows_backward",
    "supports_depthwise",
    "supports_depthwise_gradient",
    "supports_residual",
    "supports_windows",
]

HAS_TRITON = find_spec("triton") is not None
PROGRAMS = 2112
"""Programs of a launch in which each writes a partial sum: sixteen for each multiprocessor of an H100."""


def triton_runs_on(x: Tensor) -> bool:
    """Return whether Triton can run on the device of x: on CUDA, or anywhere in its interpreter."""
    return HAS_TRITON and bool(x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


@cache
def triton_kernels() -> Any:
    """Import the kernels and with them Triton, at the first launch."""
    return import_module("skipway.kernels.triton_kernels")


def as_rows(x: Tensor) -> Tensor:
    """View a channels-last map as (N, H · W, C), or tokens as (N, T, C)."""
    return (x.movedim(1, -1) if x.ndim == 4 else x).flatten(1, -2)


def all_channels_last(*maps: Tensor) -> bool:
    return all(each.is_contiguous(memory_format=torch.channels_last) for each in maps)


def pieces_per_program(work: int) -> int:
    """Return how many pieces of work each of `PROGRAMS` programs takes."""
    return max(1, -(-work // PROGRAMS))


def next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def supports_residual(shortcut: Tensor, branch: Tensor, gain: Tensor | None, mask: Tensor | None) -> bool:
    """Return whether these are tokens or channels-last maps, with at most a gain per channel and a mask per sample."""
    if not triton_runs_on(branch) or branch.ndim not in (3, 4) or shortcut.shape != branch.shape:
        return False
    layout = torch.channels_last if branch.ndim == 4 else torch.contiguous_format
    channels = branch.shape[1] if branch.ndim == 4 else branch.shape[2]
    return (
        all(each.is_contiguous(memory_format=layout) for each in (shortcut, branch))
        and (gain is None or gain.numel() in (1, channels))
        and (mask is None or mask.numel() == branch.shape[0])
    )


def promoted_dtype(*given: Tensor | None) -> torch.dtype:
    """Return the type of the tensors' sum or product; as in torch a tensor without axes does not count."""
    return reduce(torch.promote_types, (each.dtype for each in given if each is not None and each.ndim))


def pointer_or(values: Tensor | None, other: Tensor) -> Tensor:
    """Return the values contiguously; where there are none, another tensor, which the kernel does not read."""
    return other if values is None else values.contiguous()


def gain_layout(gain: Tensor | None) -> int:
    """Return 0 without a gain, 1 for a single number, 2 for one number per channel."""
    return 0 if gain is None else 1 if gain.numel() == 1 else 2


def launch_residual(
    shortcut: Tensor, branch: Tensor, gain: Tensor | None, mask: Tensor | None, block: int = 2048, warps: int = 8
) -> Tensor:
    """Compute `kernels.residual` in one pass, summed in float32."""
    out = torch.empty_like(branch, dtype=promoted_dtype(shortcut, branch, gain, mask))
    size, rows = branch.numel(), as_rows(branch)
    triton_kernels().residual_kernel[(-(-size // block),)](
        *(as_rows(shortcut), rows, pointer_or(gain, branch), pointer_or(mask, branch), as_rows(out), size),
        CHANNELS=rows.shape[-1],
        SAMPLE=rows[0].numel(),
        GAIN=gain_layout(gain),
        MASK=mask is not None,
        BLOCK=block,
        num_warps=warps,
    )
    return out


def launch_residual_backward(
    gradient: Tensor, branch: Tensor | None, gain: Tensor | None, mask: Tensor | None, tile: int = 2048, warps: int = 4
) -> tuple[Tensor, Tensor]:
    """Return the branch's gradient, and the gain's for each channel, (C,), or empty where no branch is given."""
    to_branch = torch.empty_like(gradient)
    lines = as_rows(gradient)
    count, channels = lines.shape[0] * lines.shape[1], lines.shape[2]
    block = min(next_power_of_two(channels), 256)
    rows = max(1, tile // block)
    steps = pieces_per_program(-(-count // rows) * -(-channels // block))
    grid = (-(-count // (rows * steps)), -(-channels // block))
    sums = torch.empty(grid[0], channels, dtype=torch.float32, device=gradient.device)
    triton_kernels().residual_backward_kernel[grid](
        *(lines, lines if branch is None else as_rows(branch), pointer_or(gain, gradient)),
        *(pointer_or(mask, gradient), as_rows(to_branch), sums, count, lines.shape[1]),
        CHANNELS=channels,
        GAIN=gain_layout(gain),
        MASK=mask is not None,
        LEARNED=branch is not None,
        STEPS=steps,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return to_branch, sums.sum(0) if branch is not None else sums.new_empty(0)


def fits_windows(tokens: int, width: int) -> bool:
    """Return whether the kernels take windows of so many tokens, up to 64, and heads of 16, 32 or 64 channels."""
    return tokens <= 64 and width in (16, 32, 64)


def supports_windows(qkv: Tensor, position: Tensor, down: int, across: int) -> bool:
    """Return whether the windows fit and the map is contiguous."""
    heads, tokens = position.shape[:2]
    return triton_runs_on(qkv) and qkv.is_contiguous() and fits_windows(tokens, qkv.shape[-1] // (3 * heads))


def window_sizes(qkv: Tensor, position: Tensor) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return (windows, height, width) and the constants of the kernels."""
    heads, tokens = position.shape[:2]
    side = math.isqrt(tokens)
    count, height, width = qkv.shape[:3]
    constants = {
        "HEADS": heads,
        "SIDE": side,
        "WIDTH": qkv.shape[-1] // (3 * heads),
        "BLOCK": max(16, next_power_of_two(tokens)),
        "PRECISION": "ieee" if qkv.dtype == torch.float32 else "tf32",
    }
    return (count * (height // side) * (width // side), height, width), constants


def launch_windows(qkv: Tensor, position: Tensor, down: int, across: int, steps: int = 8, warps: int = 2) -> Tensor:
    """Compute `kernels.windowed_attention` from the map to the map."""
    (count, height, width), constants = window_sizes(qkv, position)
    out = qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))
    triton_kernels().window_attention_kernel[(-(-count // steps) * len(position),)](
        *(qkv, position.contiguous(), out, count, height, width, down, across, constants["WIDTH"] ** -0.5),
        **constants,
        STEPS=steps,
        num_warps=warps,
    )
    return out


def launch_windows_backward(
    gradient: Tensor, qkv: Tensor, position: Tensor, down: int, across: int, steps: int | None = None, warps: int = 4
) -> tuple[Tensor, Tensor]:
    """Return the gradients of qkv and of the positions' bias."""
    (count, height, width), constants = window_sizes(qkv, position)
    steps = pieces_per_program(count * len(position)) if steps is None else steps
    splits = -(-count // steps)
    to_qkv = torch.empty_like(qkv)
    sums = torch.empty((splits, *position.shape), dtype=torch.float32, device=qkv.device)
    triton_kernels().window_attention_backward_kernel[(splits * len(position),)](
        *(gradient.contiguous(), qkv, position.contiguous(), to_qkv, sums, count, height, width, down, across),
        constants["WIDTH"] ** -0.5,
        **constants,
        STEPS=steps,
        num_warps=warps,
    )
    return to_qkv, sums.sum(0)


def supports_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the map is channels-last and the filter at most 7 × 7, so that its sums fit into registers."""
    return triton_runs_on(x) and all_channels_last(x) and weight.shape[-1] <= 7


def supports_depthwise_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Return whether that holds for both maps."""
    return all_channels_last(gradient) and supports_depthwise(x, weight, None)


def launch_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int = 4, columns: int = 7, block: int = 64, warps: int = 1
) -> Tensor:
    """Convolve depthwise; each program holds a tile of the map in registers."""
    out = torch.empty_like(x)
    count, channels, height, width = x.shape
    side = weight.shape[-1]
    taps = weight.flatten(1).t().contiguous()
    grid = (count * -(-height // rows) * -(-width // columns), -(-channels // block))
    triton_kernels().depthwise_kernel[grid](
        *(as_rows(x), taps, pointer_or(bias, taps), as_rows(out), height, width),
        CHANNELS=channels,
        SIDE=side,
        ROWS=rows,
        COLUMNS=columns,
        BLOCK=block,
        BIAS=bias is not None,
        num_warps=warps,
    )
    return out


def launch_depthwise_to_input(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Convolve the gradient with the filter rotated by 180°."""
    return launch_depthwise(gradient, weight.flip(-2, -1), None)


def launch_depthwise_to_weight(
    gradient: Tensor, x: Tensor, weight: Tensor, rows: int = 4, columns: int = 7, block: int = 32, warps: int = 1
) -> Tensor:
    """Sum all k² products of a channel in one thread's registers, then over the programs."""
    count, channels, height, width = x.shape
    side = weight.shape[-1]
    tiles = count * -(-height // rows) * -(-width // columns)
    steps = pieces_per_program(tiles * -(-channels // block))
    grid = (-(-tiles // steps), -(-channels // block))
    sums = torch.empty(grid[0], side * side, channels, dtype=torch.float32, device=x.device)
    triton_kernels().depthwise_to_weight_kernel[grid](
        *(as_rows(gradient), as_rows(x), sums, tiles, height, width),
        CHANNELS=channels,
        SIDE=side,
        ROWS=rows,
        COLUMNS=columns,
        STEPS=steps,
        BLOCK=block,
        num_warps=warps,
    )
    return sums.sum(0).t().reshape(weight.shape).to(weight.dtype)
