"""Attention within shifted windows, from the map to the map: nothing is partitioned, rolled or copied in Triton."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from skipway.errors import SkipwayError
from skipway.kernels import triton_launch
from skipway.kernels.autotune import Implementation, add_kernel, enabled
from skipway.kernels.cast import to_autocast
from skipway.kernels.operator import Operator
from skipway.kernels.sdpa import attention_backward_reference, attention_reference
from skipway.nn.window_partition import MASK, shift_mask, window_partition, window_reverse

__all__ = ["windowed_attention"]


def window_operands(qkv: Tensor, position: Tensor, down: int, across: int) -> tuple[Tensor, ...]:
    """Return q, k and v of each window, and B + M."""
    (height, width), (heads, tokens) = qkv.shape[1:3], position.shape[:2]
    side = math.isqrt(tokens)
    windows = window_partition(qkv.roll((-down, -across), (1, 2)), side).flatten(0, 1)
    bias = position.unsqueeze(0)
    if down or across:
        bias = bias + MASK * shift_mask(height, width, side, down, across, qkv.device).unsqueeze(1)
    return (*windows.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(), bias)


def windows_reference(qkv: Tensor, position: Tensor, down: int, across: int) -> Tensor:
    """Roll the map, partition it, attend, put it together, roll it back."""
    q, k, v, bias = window_operands(qkv, position, down, across)
    out = attention_reference(q, k, v, bias.to(q.dtype), False, False)[0].transpose(1, 2).flatten(2)
    side = math.isqrt(position.shape[1])
    return window_reverse(out.unflatten(0, (len(qkv), -1)), qkv.shape[1] // side, side).roll((down, across), (1, 2))


def windows_backward_reference(
    gradient: Tensor, qkv: Tensor, position: Tensor, down: int, across: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of qkv and of the bias by the same steps."""
    heads, tokens = position.shape[:2]
    side = math.isqrt(tokens)
    q, k, v, bias = window_operands(qkv, position, down, across)
    parts = window_partition(gradient.roll((-down, -across), (1, 2)), side).flatten(0, 1)
    dy = parts.unflatten(-1, (heads, -1)).transpose(1, 2)
    *gradients, to_bias = attention_backward_reference(dy, q, k, v, bias.to(q.dtype), False, q.new_empty(0))
    windows = torch.stack(gradients).permute(1, 3, 0, 2, 4).flatten(2).unflatten(0, (len(qkv), -1))
    return window_reverse(windows, qkv.shape[1] // side, side).roll((down, across), (1, 2)), to_bias.sum(0)


windows_forward = add_kernel(
    "windows",
    windows_reference,
    Implementation("triton", triton_launch.launch_windows, triton_launch.supports_windows),
)
windows_backward = add_kernel(
    "windows backward",
    windows_backward_reference,
    Implementation(
        "triton",
        triton_launch.launch_windows_backward,
        lambda gradient, *arguments: triton_launch.supports_windows(*arguments),
    ),
)


class WindowedAttentionBackward(Operator, name="windowed_attention_backward"):
    """Gradients of qkv and of the positions' bias."""

    @staticmethod
    def forward(gradient: Tensor, qkv: Tensor, position: Tensor, down: int, across: int) -> tuple[Tensor, Tensor]:
        to_qkv, to_position = windows_backward(gradient, qkv, position, down, across)
        return to_qkv.contiguous(), to_position.to(position.dtype).contiguous()

    @staticmethod
    def fake(gradient: Tensor, qkv: Tensor, position: Tensor, down: int, across: int) -> tuple[Tensor, Tensor]:
        return qkv.new_empty(qkv.shape), position.new_empty(position.shape)


class WindowedAttention(Operator, name="windowed_attention"):
    """softmax(q kᵀ / √d + B + M) v, token by token of the map."""

    @staticmethod
    def forward(qkv: Tensor, position: Tensor, down: int, across: int) -> Tensor:
        return windows_forward(qkv, position, down, across).contiguous()

    @staticmethod
    def fake(qkv: Tensor, position: Tensor, down: int, across: int) -> Tensor:
        return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        qkv, position, ctx.down, ctx.across = inputs
        ctx.save_for_backward(qkv, position)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*WindowedAttentionBackward.apply(gradient, *ctx.saved_tensors, ctx.down, ctx.across), None, None)


def windowed_attention(qkv: Tensor, position: Tensor, down: int = 0, across: int = 0) -> Tensor:
    """Compute softmax(q kᵀ / √d + B + M) v within the windows of a shifted map (Liu et al. 2021, eq. 4 and fig. 4).

    M is −100 between tokens that the cyclic shift brought together from opposite edges, else 0. In plain torch the map
    is rolled, partitioned into windows, and put together again; in Triton, on CUDA, each program reads the tokens of a
    window where they lie, forward and backward, and adds B and M in registers.

    Shapes: qkv (N, H, W, 3 · heads · d), the output of one linear map, H and W multiples of a window's side;
    B (heads, T, T) with T = side² → (N, H, W, heads · d). First derivatives only.

    Args:
        qkv: queries, keys and values of every token of the map.
        position: B.
        down: shift of the grid of windows along H, 0 ≤ down < side.
        across: shift along W.

    Raises:
        SkipwayError: the shapes or shifts do not fit.

    >>> windowed_attention(torch.randn(2, 6, 4, 3 * 8), torch.zeros(2, 4, 4), 1, 1).shape
    torch.Size([2, 6, 4, 8])
    """
    heads, tokens = position.shape[:2]
    side = math.isqrt(tokens)
    if side**2 != tokens or position.shape[2] != tokens or not (0 <= down < side and 0 <= across < side):
        raise SkipwayError(
            f"position of shape {tuple(position.shape)}, shift ({down}, {across}): the rule is (heads, T, T), T the "
            "square of a window's side, and shifts from 0 to below the side"
        )
    if qkv.ndim != 4 or qkv.shape[1] % side or qkv.shape[2] % side or qkv.shape[3] % (3 * heads):
        raise SkipwayError(
            f"qkv of shape {tuple(qkv.shape)}: the rule is (N, H, W, 3 · heads · d) with {heads} heads, H and W "
            f"multiples of {side}"
        )
    (qkv,) = to_autocast(qkv)  # type: ignore[assignment]
    operator = WindowedAttention.apply if enabled() else windows_reference
    return operator(qkv, position, down, across)
