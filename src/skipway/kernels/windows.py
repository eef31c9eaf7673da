"""Attention within shifted windows, from the map to the map: nothing is cut, rolled or copied where Triton runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from skipway.errors import SkipwayError
from skipway.kernels import triton
from skipway.kernels.attention import backward_whole, whole
from skipway.kernels.autotune import Way, kernel
from skipway.kernels.cast import lowered
from skipway.nn.window_partition import MASK, shift_mask, window_partition, window_reverse

__all__ = ["windowed_attention"]


def parts(qkv: Tensor, position: Tensor, down: int, across: int) -> tuple[Tensor, ...]:
    """q, k and v of each window and B + M."""
    (height, width), (heads, tokens) = qkv.shape[1:3], position.shape[:2]
    side = math.isqrt(tokens)
    windows = window_partition(qkv.roll((-down, -across), (1, 2)), side).flatten(0, 1)
    bias = position.unsqueeze(0)
    if down or across:
        bias = bias + MASK * shift_mask(height, width, side, down, across, qkv.device).unsqueeze(1)
    return (*windows.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(), bias)


def plain(qkv: Tensor, position: Tensor, down: int, across: int) -> Tensor:
    """Roll, cut, attend, join, roll back."""
    q, k, v, bias = parts(qkv, position, down, across)
    out = whole(q, k, v, bias.to(q.dtype), False)[0].transpose(1, 2).flatten(2)
    side = math.isqrt(position.shape[1])
    return window_reverse(out.unflatten(0, (len(qkv), -1)), qkv.shape[1] // side, side).roll((down, across), (1, 2))


def plain_backward(gradient: Tensor, qkv: Tensor, position: Tensor, down: int, across: int) -> tuple[Tensor, Tensor]:
    """The same way back."""
    heads, tokens = position.shape[:2]
    side = math.isqrt(tokens)
    q, k, v, bias = parts(qkv, position, down, across)
    dy = (
        window_partition(gradient.roll((-down, -across), (1, 2)), side)
        .flatten(0, 1)
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
    )
    *found, to_bias = backward_whole(dy, q, k, v, bias.to(q.dtype), q.new_empty(0))
    windows = torch.stack(found).permute(1, 3, 0, 2, 4).flatten(2).unflatten(0, (len(qkv), -1))
    return window_reverse(windows, qkv.shape[1] // side, side).roll((down, across), (1, 2)), to_bias.sum(0)


forward = kernel("windows", plain, Way("triton", triton.windows, triton.serves_windows))
backward_kernel = kernel(
    "windows backward",
    plain_backward,
    Way("triton", triton.windows_backward, lambda gradient, *rest: triton.serves_windows(*rest)),
)


@torch.library.custom_op("skipway::windowed_attention", mutates_args=())
def operator(qkv: Tensor, position: Tensor, down: int, across: int) -> Tensor:
    return forward(qkv, position, down, across).contiguous()


@operator.register_fake
def _(qkv: Tensor, position: Tensor, down: int, across: int) -> Tensor:
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


@torch.library.custom_op("skipway::windowed_attention_backward", mutates_args=())
def backward_operator(gradient: Tensor, qkv: Tensor, position: Tensor, down: int, across: int) -> tuple[Tensor, Tensor]:
    to_qkv, to_position = backward_kernel(gradient, qkv, position, down, across)
    return to_qkv.contiguous(), to_position.to(position.dtype).contiguous()


@backward_operator.register_fake
def _(gradient: Tensor, qkv: Tensor, position: Tensor, down: int, across: int) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), position.new_empty(position.shape)


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, position, ctx.down, ctx.across = inputs
    ctx.save_for_backward(qkv, position)


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*backward_operator(gradient, *ctx.saved_tensors, ctx.down, ctx.across), None, None)


operator.register_autograd(backward, setup_context=keep)


def windowed_attention(qkv: Tensor, position: Tensor, down: int = 0, across: int = 0) -> Tensor:
    """softmax(q kᵀ / √d + B + M) v within the windows of a shifted map (Liu et al. 2021, eq. 4 and fig. 4).

    M is −100 between tokens that the cyclic shift brought together from opposite edges, else 0. In plain torch the map
    is rolled, cut into windows, and put together again; in Triton, on CUDA, each program reads the tokens of a window
    where they lie, forward and backward, and B and M are added in registers.

    Shapes: qkv (N, H, W, 3 · heads · d) as one map puts it out, H and W multiples of a window's side; B (heads, T, T)
    with T = side² → (N, H, W, heads · d). First derivatives only.

    Args:
        qkv: queries, keys and values of every token of the map.
        position: B.
        down: by how much the windows' grid is shifted along H, 0 ≤ down < side.
        across: along W.

    Raises:
        SkipwayError: sizes that do not fit.

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
    (qkv,) = lowered(qkv)  # type: ignore[assignment]
    return operator(qkv, position, down, across)
