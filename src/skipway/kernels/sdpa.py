"""Scaled dot-product attention with a bias that is broadcast over images instead of being copied for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.kernels.autotune import Implementation, add_kernel, enabled
from skipway.kernels.cast import at_least_float32, to_autocast
from skipway.kernels.onednn import supports_onednn_matmul, with_onednn_matmul
from skipway.kernels.operator import Operator

__all__ = ["attention", "attention_backward_reference", "attention_reference", "bias_fits"]

CACHE = 1 << 21
"""Bytes of logits computed at a time."""


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep_weights: bool
) -> tuple[Tensor, Tensor]:
    """Return the output, and the attention weights where they are kept for backward (else an empty tensor)."""
    if keep_weights:
        weights = attention_weights(q, k, bias).to(v.dtype)
        return weights @ v, weights
    if bias is not None and len(bias) > 1:
        bias = bias.repeat(len(q) // len(bias), 1, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias), q.new_empty(0)


def attention_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep_weights: bool
) -> tuple[Tensor, Tensor]:
    """Compute a few images at a time: their logits stay in the cache, and the bias is broadcast to them."""
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    kept = q.new_empty(*q.shape[:-1], k.shape[-2]) if keep_weights else q.new_empty(0)
    tensors = (q, k, v, out, kept if keep_weights else out)
    for query, key, value, y, slot in zip(*(image_blocks(each, q, k, bias) for each in tensors), strict=True):
        weights = attention_weights(query, key, bias).to(v.dtype)
        torch.matmul(weights, value, out=y)
        if keep_weights:
            slot.copy_(weights)
    return out, kept


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Return softmax(q kᵀ / √d + B) of shape (N, heads, T, S), N a multiple of B's first axis.

    It is computed in float32 at least: logits rounded to 16 bits are wrong by a few per cent of a weight.
    """
    logits = (at_least_float32(q) @ at_least_float32(k).mT).mul_(q.shape[-1] ** -0.5)
    if bias is not None:
        logits.unflatten(0, (-1, len(bias))).add_(bias)
    return torch.softmax(logits, -1)


def weights_are_small(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether the weights are no larger than q, k and v, so that keeping them beats computing them again."""
    return k.shape[-2] <= 2 * k.shape[-1] + v.shape[-1]


def image_blocks(x: Tensor, q: Tensor, k: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Split x into blocks of whole images whose logits fill `CACHE`."""
    windows = 1 if bias is None else len(bias)
    bytes_per_image = windows * q.shape[1] * q.shape[2] * k.shape[2] * 4
    return x.split(max(1, CACHE // bytes_per_image) * windows)


def attends_on_cpu(q: Tensor, *others: Any) -> bool:
    """Return whether blocks may be computed: they are made for a CPU's cache."""
    return q.device.type == "cpu"


def exact_in_onednn(*arguments: Any) -> bool:
    """Return whether oneDNN's setting may be used: bfloat16 widened to float32 loses nothing by it."""
    return supports_onednn_matmul(*arguments, types=(torch.float32, torch.bfloat16))


attention_forward = add_kernel(
    "attention",
    attention_reference,
    Implementation("blocks", attention_in_blocks, attends_on_cpu),
    Implementation("onednn", with_onednn_matmul(attention_in_blocks), exact_in_onednn),
)


def attention_backward_reference(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the bias (empty without one); weights that were not kept are recomputed.

    The gradient of the weights may be rounded, since no power of it is taken; that of the logits is summed in float32.
    """
    weights = kept if kept.numel() else attention_weights(q, k, bias)
    to_v = weights.to(v.dtype).mT @ gradient
    to_logits = at_least_float32(gradient @ v.mT)
    to_logits = to_logits.sub_((to_logits * weights).sum(-1, keepdim=True)).mul_(weights)
    to_bias = to_logits.new_empty(0) if bias is None else to_logits.unflatten(0, (-1, len(bias))).sum(0)
    scaled = to_logits.mul_(q.shape[-1] ** -0.5).to(q.dtype)
    return scaled @ k, scaled.mT @ q, to_v, to_bias


def attention_backward_in_blocks(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of a few images at a time; the bias's are summed over the blocks."""
    gradients = [torch.empty_like(each) for each in (q, k, v)]
    to_bias: Tensor | int = 0
    tensors = (gradient, q, k, v, kept if kept.numel() else q, *gradients)
    for part, query, key, value, weights, *slots in zip(
        *(image_blocks(each, q, k, bias) for each in tensors), strict=True
    ):
        weights = weights if kept.numel() else kept
        *block_gradients, block_to_bias = attention_backward_reference(part, query, key, value, bias, weights)
        for slot, computed in zip(slots, block_gradients, strict=True):
            slot.copy_(computed)
        to_bias = to_bias + block_to_bias
    return (*gradients, to_bias)  # type: ignore[return-value]


attention_backward = add_kernel(
    "attention backward",
    attention_backward_reference,
    Implementation("blocks", attention_backward_in_blocks, attends_on_cpu),
    Implementation("onednn", with_onednn_matmul(attention_backward_in_blocks), exact_in_onednn),
)


class AttentionBackward(Operator, name="attention_backward"):
    """Gradients of q, k, v and the bias."""

    @staticmethod
    def forward(
        gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *gradients, to_bias = attention_backward(gradient, q, k, v, bias, kept)
        dtype = q.dtype if bias is None else bias.dtype
        return *(each.contiguous() for each in gradients), to_bias.to(dtype).contiguous()

    @staticmethod
    def fake(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, kept: Tensor) -> tuple[Tensor, ...]:
        to_bias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
        return *(each.new_empty(each.shape) for each in (q, k, v)), to_bias


class AttentionOperator(Operator, name="attention"):
    """Output and, where they are kept, weights; the weights have no gradient of their own."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep_weights: bool) -> tuple[Tensor, Tensor]:
        out, kept = attention_forward(q, k, v, bias, keep_weights)
        return out.contiguous(), kept

    @staticmethod
    def fake(q: Tensor, k: Tensor, v: Tensor, bias: Any, keep_weights: bool) -> tuple[Tensor, Tensor]:
        kept = q.new_empty((*q.shape[:-1], k.shape[-2]) if keep_weights else 0)
        return q.new_empty((*q.shape[:-1], v.shape[-1])), kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:4], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        *gradients, to_bias = AttentionBackward.apply(gradient, *ctx.saved_tensors)
        return *gradients, to_bias if ctx.needs_input_grad[3] else None, None


def bias_fits(bias: Tensor, q: Tensor, k: Tensor) -> bool:
    """Return whether a bias is one for all images, or one for each window of an image."""
    return bias.ndim == 4 and bias.shape[1:] == (q.shape[1], q.shape[2], k.shape[2]) and len(q) % len(bias) == 0


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute softmax(q kᵀ / √d + B) v with B shared by all images, as `F.scaled_dot_product_attention` does.

    torch's fused attention on a CPU is made for long sequences: at a few hundred tokens its backward pass costs more
    than three plain products. It takes one bias for each window of every image, which is as large as all logits, and
    writes out all weights where the bias is learned. Here logits are computed a few images at a time and the bias is
    broadcast to them. q, k, v and B are kept for backward; the weights are kept where they are no larger (windows), and
    computed again otherwise. Logits are in float32 where the rest is in 16 bits.

    Windows of a map (Liu et al. 2021, eq. 4) are the images of a batch, the windows of an image one after the other,
    with one bias for each window of an image.

    Shapes: q (N, heads, T, d), k (N, heads, S, d), v (N, heads, S, e), B (1, heads, T, S), or (W, heads, T, S) where
    image or window i takes B[i mod W] → (N, heads, T, e). First derivatives only; second derivatives exist under
    `off()`.

    Raises:
        SkipwayError: the shape of B does not fit.

    >>> q = torch.randn(6, 2, 4, 8)
    >>> attention(q, q, q, torch.zeros(3, 2, 4, 4)).shape
    torch.Size([6, 2, 4, 8])
    """
    if bias is not None and not bias_fits(bias, q, k):
        raise SkipwayError(
            f"bias of shape {tuple(bias.shape)} for q {tuple(q.shape)}: the rule is (W, heads, T, S), W a divisor of N"
        )
    q, k, v, bias = to_autocast(q, k, v, bias)  # type: ignore[assignment]
    if not enabled() or not q.numel():
        return attention_reference(q, k, v, bias, False)[0]
    learns = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (q, k, v, bias))
    return AttentionOperator.apply(q, k, v, bias, learns and weights_are_small(q, k, v))[0]
