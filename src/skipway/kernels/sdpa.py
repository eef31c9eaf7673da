"""Scaled dot-product attention on CPUs, block by block: causal, or with a bias that is broadcast over images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.kernels.autotune import REFERENCE, Implementation, add_kernel, enabled, restricted
from skipway.kernels.cast import at_least_float32, to_autocast
from skipway.kernels.native import attention_by_tiles, takes_tiles
from skipway.kernels.onednn import supports_onednn_matmul, with_onednn_matmul
from skipway.kernels.operator import Operator

__all__ = ["attention", "attention_backward_reference", "attention_reference", "bias_fits"]

CACHE = 1 << 21
"""Bytes of logits computed at a time."""
CAUSAL_ROWS = 128
"""Rows of a block under a causal mask: fewer leave out more of the masked half, and make smaller products."""
LEAST_ROWS = 32
"""Rows of a block at least."""
ROUGH = (0, 2, 3)
"""Axes of q, k, v and weights that count up to a factor of two in the choice of a kernel: texts have all lengths."""


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, keep_weights: bool
) -> tuple[Tensor, Tensor]:
    """Return the output, and the attention weights where they are kept for backward (else an empty tensor)."""
    if keep_weights:
        weights = attention_weights(q, k, bias, causal, hidden_rows(bias)).to(v.dtype)
        return weights @ v, weights
    return torch_attention(q, k, v, bias, causal), q.new_empty(0)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """Compute it by torch's function, for which a bias of several windows is repeated for every image."""
    if bias is not None and len(bias) > 1:
        bias = bias.repeat(len(q) // len(bias), 1, 1, 1)
    with torch._C.DisableTorchFunction():  # a mode of ours would route the call here again
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)


def attention_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, keep_weights: bool
) -> tuple[Tensor, Tensor]:
    """Compute a few images or rows at a time: their logits stay in the cache, and the bias is broadcast to images."""
    out = empty_output(q, v)
    kept = q.new_empty(*q.shape[:-1], k.shape[-2]) if keep_weights else q.new_empty(0)
    hidden = hidden_rows(bias)
    for images, rows, keys in blocks(q, k, bias, causal):
        query, key, value = q[images, :, rows], k[images, :, keys], v[images, :, keys]
        weights = attention_weights(query, key, bias, causal, hidden).to(v.dtype)
        out[images, :, rows] = weights @ value
        if keep_weights:
            kept[images, :, rows, keys] = weights
            kept[images, :, rows, keys.stop :] = 0
    return out, kept


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """Return an output without values: laid out as q, as torch's fused attention does, so that a network may view it as
    it viewed q; contiguous where heads of values have another size.
    """
    return torch.empty_like(q) if q.shape[-1] == v.shape[-1] else q.new_empty(*q.shape[:-1], v.shape[-1])


def hidden_rows(bias: Tensor | None) -> Tensor | None:
    """Rows whose bias is −∞ throughout, (W, heads, T, 1); None where it is known that there are none: to ask an
    accelerator would mean to wait for it.
    """
    if bias is None:
        return None
    hidden = bias.amax(-1, keepdim=True) == float("-inf")
    return None if hidden.device.type == "cpu" and not bool(hidden.any()) else hidden


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, hidden: Tensor | None = None) -> Tensor:
    """Return softmax(q kᵀ / √d + B) of shape (N, heads, T, S), N a multiple of B's first axis; causal: the last key
    is that of the last row, and a row's weights of later keys are 0.

    It is computed in float32 at least: logits rounded to 16 bits are wrong by a few per cent of a weight. They are
    scaled after the product, which may be rounded to 16 bits once more, where the entries of q have 16 bits. Rows of B
    that are `hidden_rows` have weights of 0, as in torch.
    """
    scale, exact = q.shape[-1] ** -0.5, q.dtype.itemsize > 2
    logits = (q * scale if exact else q.float()) @ at_least_float32(k).mT
    if not exact:
        logits.mul_(scale)
    if bias is not None:
        logits.unflatten(0, (-1, len(bias))).add_(bias)
    if causal:
        rows = q.shape[-2]
        later = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu_(1)
        logits[..., k.shape[-2] - rows :].masked_fill_(later, float("-inf"))
    weights = torch.softmax(logits, -1)
    if hidden is not None:
        weights.unflatten(0, (-1, len(hidden))).masked_fill_(hidden, 0)
    return weights


def weights_are_small(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether the weights are at most twice as large as q, k and v, so that keeping them beats computing them
    again: at 197 tokens and a head of 64 the backward pass takes two thirds of its time.
    """
    return k.shape[-2] <= 2 * (2 * k.shape[-1] + v.shape[-1])


def blocks(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Yield images, rows and the keys that they see, in blocks whose logits fill `CACHE`.

    A block is a few whole images, or some rows of one; with a causal mask keys after its last row are left out, so many
    rows are cut even where an image would fit.
    """
    windows = 1 if bias is None else len(bias)
    count, heads, rows, keys = len(q), q.shape[1], q.shape[2], k.shape[2]
    fitting = CACHE // (4 * heads * keys)  # rows of one image
    height = min(rows, CAUSAL_ROWS) if causal else rows
    if bias is None and fitting < height:
        height = max(fitting, LEAST_ROWS)
    images = max(1, fitting // (windows * height)) * windows
    for first in range(0, count, images):
        for top in range(0, rows, height):
            bottom = min(top + height, rows)
            yield slice(first, min(first + images, count)), slice(top, bottom), slice(0, bottom if causal else keys)


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
    Implementation("tiles", attention_by_tiles, takes_tiles),
    rough=ROUGH,
)


def attention_backward_reference(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the bias (empty without one); weights that were not kept are recomputed."""
    weights = kept if kept.numel() else attention_weights(q, k, bias, causal, hidden_rows(bias)).to(v.dtype)
    return gradients_from_weights(gradient, q, k, v, bias, weights)


def gradients_from_weights(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the bias.

    The gradient of the logits is computed in one pass, in float32 within, and rounded as its products need it.
    """
    to_logits = torch._softmax_backward_data(gradient @ v.mT, weights, -1, weights.dtype)
    to_bias = to_logits.new_empty(0)
    if bias is not None:
        to_bias = to_logits.unflatten(0, (-1, len(bias))).sum(0, dtype=torch.promote_types(q.dtype, torch.float32))
    scale = q.shape[-1] ** -0.5
    return (to_logits @ k).mul_(scale), (to_logits.mT @ q).mul_(scale), weights.mT @ gradient, to_bias


def attention_backward_in_blocks(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients block by block; those that several blocks share are summed in float32."""
    to_q, to_k, to_v = (torch.empty_like(each) for each in (q, k, v))
    to_bias: Tensor | int = 0
    sums: tuple[Tensor, Tensor] | None = None
    hidden = None if kept.numel() else hidden_rows(bias)
    for images, rows, keys in blocks(q, k, bias, causal):
        part, query, key, value = gradient[images, :, rows], q[images, :, rows], k[images, :, keys], v[images, :, keys]
        if kept.numel():
            weights = kept[images, :, rows, keys]
        else:
            weights = attention_weights(query, key, bias, causal, hidden).to(v.dtype)
        block_q, block_k, block_v, block_bias = gradients_from_weights(part, query, key, value, bias, weights)
        to_q[images, :, rows] = block_q
        if rows == slice(0, q.shape[2]):
            to_k[images], to_v[images] = block_k, block_v
        else:
            if rows.start == 0:
                sums = tuple(at_least_float32(torch.zeros_like(each[images])) for each in (k, v))  # type: ignore[assignment]
            assert sums is not None
            for total, block in zip(sums, (block_k, block_v), strict=True):
                total[:, :, keys] += block
            if rows.stop == q.shape[2]:
                to_k[images], to_v[images] = sums
        to_bias = to_bias + block_bias
    return to_q, to_k, to_v, to_bias  # type: ignore[return-value]


attention_backward = add_kernel(
    "attention backward",
    attention_backward_reference,
    Implementation("blocks", attention_backward_in_blocks, attends_on_cpu),
    Implementation("onednn", with_onednn_matmul(attention_backward_in_blocks), exact_in_onednn),
    rough=ROUGH,
)


class AttentionBackward(Operator, name="attention_backward"):
    """Gradients of q, k, v and the bias."""

    @staticmethod
    def forward(
        gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *gradients, to_bias = attention_backward(gradient, q, k, v, bias, causal, kept)
        dtype = q.dtype if bias is None else bias.dtype
        return *(each.contiguous() for each in gradients), to_bias.to(dtype).contiguous()

    @staticmethod
    def fake(
        gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, causal: bool, kept: Tensor
    ) -> tuple[Tensor, ...]:
        to_bias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
        return *(each.new_empty(each.shape) for each in (q, k, v)), to_bias


class AttentionOperator(Operator, name="attention"):
    """Output and, where they are kept, weights; the weights have no gradient of their own."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, keep_weights: bool
    ) -> tuple[Tensor, Tensor]:
        out, kept = attention_forward(q, k, v, bias, causal, keep_weights)
        like = empty_output(q, v)
        return out if out.stride() == like.stride() else like.copy_(out), kept

    @staticmethod
    def fake(q: Tensor, k: Tensor, v: Tensor, bias: Any, causal: bool, keep_weights: bool) -> tuple[Tensor, Tensor]:
        kept = q.new_empty((*q.shape[:-1], k.shape[-2]) if keep_weights else 0)
        return empty_output(q, v), kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.causal = inputs[4]
        ctx.save_for_backward(*inputs[:4], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        *gradients, to_bias = AttentionBackward.apply(gradient, *inputs, ctx.causal, kept)
        return *gradients, to_bias if ctx.needs_input_grad[3] else None, None, None


def operator_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """Compute it by our operator."""
    learns = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (q, k, v, bias))
    return AttentionOperator.apply(q, k, v, bias, causal, learns and weights_are_small(q, k, v))[0]


def both_passes(
    function: Callable[..., Tensor],
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, tuple[bool, ...]], tuple[Tensor, ...]]:
    """Return a function that computes the output, and the gradients of the tensors that `learns` marks."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, learns: tuple[bool, ...]
    ) -> tuple[Tensor, ...]:
        tensors = [each if each is None else each.detach() for each in (q, k, v, bias)]
        if not any(learns):
            return (function(*tensors, causal),)
        with torch.enable_grad():
            for each, needs in zip(tensors, learns, strict=True):
                if each is not None:
                    each.requires_grad_(needs)
            out = function(*tensors, causal)
        wanted = [each for each in tensors if each is not None and each.requires_grad]
        return out.detach(), *torch.autograd.grad(out, wanted, torch.ones_like(out))

    return run


attention_passes = add_kernel(
    "attention with backward",
    both_passes(torch_attention),
    Implementation("operator", both_passes(operator_attention), attends_on_cpu),
    rough=ROUGH,
)
"""Whether torch's function or our operator is the faster, both passes taken together: only its choice is used."""


def bias_fits(bias: Tensor, q: Tensor, k: Tensor) -> bool:
    """Return whether a bias is one for all images, or one for each window of an image."""
    return bias.ndim == 4 and bias.shape[1:] == (q.shape[1], q.shape[2], k.shape[2]) and len(q) % len(bias) == 0


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False) -> Tensor:
    """Compute softmax(q kᵀ / √d + B) v with B shared by all images, as `F.scaled_dot_product_attention` does.

    torch's fused attention on a CPU is made for long sequences: at a few hundred tokens its backward pass costs more
    than three plain products, and in bfloat16 up to ten times as much. It takes one bias for each window of every
    image, which is as large as all logits, and writes out all weights where the bias is learned. Here logits are
    computed a few images or rows at a time and the bias is broadcast to them. q, k, v and B are kept for backward; the
    weights are kept where they are no larger (windows), and computed again otherwise. Logits are in float32 where the
    rest is in 16 bits. Both passes are measured beside torch's at first use, and the faster is taken.

    Windows of a map (Liu et al. 2021, eq. 4) are the images of a batch, the windows of an image one after the other,
    with one bias for each window of an image.

    Args:
        q: queries.
        k: keys.
        v: values.
        bias: B, or None.
        causal: row t sees the keys up to t; T = S.

    Shapes: q (N, heads, T, d), k (N, heads, S, d), v (N, heads, S, e), B (1, heads, T, S), or (W, heads, T, S) where
    image or window i takes B[i mod W] → (N, heads, T, e), laid out as q where e = d. First derivatives only; second
    derivatives exist under `off()`.

    Raises:
        SkipwayError: the shapes do not fit, or a causal mask is given beside a bias or keys of another number.

    >>> q = torch.randn(6, 2, 4, 8)
    >>> attention(q, q, q, torch.zeros(3, 2, 4, 4)).shape
    torch.Size([6, 2, 4, 8])
    """
    if not q.shape[:2] == k.shape[:2] == v.shape[:2] or k.shape[2] != v.shape[2]:
        raise SkipwayError(
            f"q, k, v of shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: the rule is (N, heads, T, d), "
            "(N, heads, S, d), (N, heads, S, e) with equal N and heads; expand them first"
        )
    if bias is not None and not bias_fits(bias, q, k):
        raise SkipwayError(
            f"bias of shape {tuple(bias.shape)} for q {tuple(q.shape)}: the rule is (W, heads, T, S), W a divisor of N"
        )
    if causal and (bias is not None or q.shape[2] != k.shape[2]):
        raise SkipwayError(
            f"causal=True with {q.shape[2]} queries, {k.shape[2]} keys and {'a' if bias is not None else 'no'} bias: "
            "the rule is as many keys as queries and no bias; put the mask into the bias as -inf"
        )
    q, k, v, bias = to_autocast(q, k, v, bias)  # type: ignore[assignment]
    if not enabled() or not q.numel() or torch_is_faster(q, k, v, bias, causal):
        return torch_attention(q, k, v, bias, causal)
    return operator_attention(q, k, v, bias, causal)


def torch_is_faster(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> bool:
    """Return whether torch's function is to be called; not where nothing can be measured or one way is prescribed."""
    if restricted() or q.device.type != "cpu" or isinstance(q, FakeTensor) or torch.compiler.is_compiling():
        return False
    learns = tuple(torch.is_grad_enabled() and each is not None and each.requires_grad for each in (q, k, v, bias))
    return attention_passes.select(q, k, v, bias, causal, learns).name == REFERENCE
