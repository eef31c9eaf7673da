"""Attention, of whole images or within windows, with a bias that is never copied out for every image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.kernels.autotune import Way, enabled, kernel
from skipway.kernels.cast import lowered, wide
from skipway.kernels.onednn import has_door, opened

__all__ = ["attention", "fits", "window_attention"]

CACHE = 1 << 21
"""Bytes of logits that are computed at a time."""


def whole(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keeps: bool) -> tuple[Tensor, Tensor]:
    """The output, and the weights where they are to be kept (else nothing)."""
    if keeps:
        share = weights(q, k, bias).to(v.dtype)
        return share @ v, share
    if bias is not None and len(bias) > 1:
        bias = bias.repeat(len(q) // len(bias), 1, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias), q.new_empty(0)


def in_blocks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keeps: bool) -> tuple[Tensor, Tensor]:
    """A few images at a time, whose logits stay in the cache and take the bias by broadcasting."""
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    kept = q.new_empty(*q.shape[:-1], k.shape[-2]) if keeps else q.new_empty(0)
    parts = zip(*(blocks(each, q, k, bias) for each in (q, k, v, out, kept if keeps else out)), strict=True)
    for query, key, value, y, slot in parts:
        share = weights(query, key, bias).to(v.dtype)
        torch.matmul(share, value, out=y)
        if keeps:
            slot.copy_(share)
    return out, kept


def weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √d + B) of whole images: (n · windows, heads, T, S).

    In float32 at least: logits that are rounded to 16 bits are wrong by a few per cent of a weight.
    """
    logits = (wide(q) @ wide(k).mT).mul_(q.shape[-1] ** -0.5)
    if bias is not None:
        logits.unflatten(0, (-1, len(bias))).add_(bias)
    return torch.softmax(logits, -1)


def small(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the weights are no larger than q, k and v: then they are kept for backward and not computed again."""
    return k.shape[-2] <= 2 * k.shape[-1] + v.shape[-1]


def blocks(x: Tensor, q: Tensor, k: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Whole images, so many that their logits fill `CACHE`."""
    windows = 1 if bias is None else len(bias)
    image = windows * q.shape[1] * q.shape[2] * k.shape[2] * 4
    return x.split(max(1, CACHE // image) * windows)


def on_cpu(q: Tensor, *others: Any) -> bool:
    return q.device.type == "cpu"


def exact(*arguments: Any) -> bool:
    """Whether products in float32 may go through the door: bfloat16 that was widened loses nothing there."""
    return has_door(*arguments, types=(torch.float32, torch.bfloat16))


forward = kernel("attention", whole, Way("blocks", in_blocks, on_cpu), Way("onednn", opened(in_blocks), exact))


def backward_whole(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Through the weights, computed again where none were kept; the last is empty where there is no bias.

    The gradient of the weights may be rounded, no power is taken of it; that of the logits is summed in float32.
    """
    share = kept if kept.numel() else weights(q, k, bias)
    to_v = share.to(v.dtype).mT @ gradient
    within = wide(gradient @ v.mT)
    within = within.sub_((within * share).sum(-1, keepdim=True)).mul_(share)
    to_bias = within.new_empty(0) if bias is None else within.unflatten(0, (-1, len(bias))).sum(0)
    narrow = within.mul_(q.shape[-1] ** -0.5).to(q.dtype)
    return narrow @ k, narrow.mT @ q, to_v, to_bias


def backward_in_blocks(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = [torch.empty_like(each) for each in (q, k, v)]
    to_bias: Tensor | int = 0
    tensors = (gradient, q, k, v, kept if kept.numel() else q, *found)
    for part, query, key, value, share, *slots in zip(*(blocks(each, q, k, bias) for each in tensors), strict=True):
        share = share if kept.numel() else kept
        *grads, own = backward_whole(part, query, key, value, bias, share)
        for slot, grad in zip(slots, grads, strict=True):
            slot.copy_(grad)
        to_bias = to_bias + own
    return (*found, to_bias)  # type: ignore[return-value]


backward_kernel = kernel(
    "attention backward",
    backward_whole,
    Way("blocks", backward_in_blocks, on_cpu),
    Way("onednn", opened(backward_in_blocks), exact),
)


@torch.library.custom_op("skipway::attention", mutates_args=())
def operator(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keeps: bool) -> tuple[Tensor, Tensor]:
    out, kept = forward(q, k, v, bias, keeps)
    return out.contiguous(), kept


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Any, keeps: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty((*q.shape[:-1], k.shape[-2]) if keeps else 0)


@torch.library.custom_op("skipway::attention_backward", mutates_args=())
def backward_operator(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *found, to_bias = backward_kernel(gradient, q, k, v, bias, kept)
    return *(each.contiguous() for each in found), to_bias.to(q.dtype if bias is None else bias.dtype).contiguous()


@backward_operator.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, kept: Tensor) -> tuple[Tensor, ...]:
    return (
        *(each.new_empty(each.shape) for each in (q, k, v)),
        (bias.new_empty(bias.shape) if bias is not None else q.new_empty(0)),
    )


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.mark_non_differentiable(output[1])


def backward(ctx: Any, gradient: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    *found, to_bias = backward_operator(gradient, *ctx.saved_tensors)
    return *found, to_bias if ctx.needs_input_grad[3] else None, None


operator.register_autograd(backward, setup_context=keep)


def fits(bias: Tensor, q: Tensor, k: Tensor) -> bool:
    """Whether a bias is one for all images, or one for each window of an image."""
    return bias.ndim == 4 and bias.shape[1:] == (q.shape[1], q.shape[2], k.shape[2]) and len(q) % len(bias) == 0


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + B) v, B shared by all images, as `torch.nn.functional.scaled_dot_product_attention`.

    torch's fused attention on a CPU is made for long sequences: at a few hundred tokens its backward costs more than
    three plain products. It takes one bias per window of every image, which is as large as all logits, and writes all
    weights out where the bias is learned. Here logits are computed a few images at a time and take the bias by
    broadcasting; for backward q, k, v and B are kept, the weights too where they are no larger (windows), else they are
    computed again. Logits are in float32 also where the rest is in 16 bits.

    Shapes: q (N, heads, T, d), k (N, heads, S, d), v (N, heads, S, e), B (1, heads, T, S), or (W, heads, T, S) where
    image or window i takes B[i mod W] → (N, heads, T, e). First derivatives only; second ones exist under `off()`.

    Raises:
        SkipwayError: B does not fit.

    >>> q = torch.randn(6, 2, 4, 8)
    >>> attention(q, q, q).shape
    torch.Size([6, 2, 4, 8])
    """
    if bias is not None and not fits(bias, q, k):
        raise SkipwayError(
            f"bias of shape {tuple(bias.shape)} for q {tuple(q.shape)}: the rule is (W, heads, T, S), W a divisor of N"
        )
    q, k, v, bias = lowered(q, k, v, bias)  # type: ignore[assignment]
    if not enabled() or not q.numel():
        return whole(q, k, v, bias, False)[0]
    learns = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (q, k, v, bias))
    return operator(q, k, v, bias, learns and small(q, k, v))[0]


def window_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q kᵀ / √d + B) v within windows (Liu et al. 2021, eq. 4): `attention` with the bias of each window.

    Shapes: q, k, v (images · windows, heads, T, d), the windows of an image together; B (1, heads, T, T), or
    (windows, heads, T, T) where it differs from window to window → (images · windows, heads, T, d).

    Raises:
        SkipwayError: B does not fit.

    >>> q = torch.randn(6, 2, 4, 8)
    >>> window_attention(q, q, q, torch.zeros(3, 2, 4, 4)).shape
    torch.Size([6, 2, 4, 8])
    """
    return attention(q, k, v, bias)
