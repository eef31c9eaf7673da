"""The arithmetic of several streams, with backward passes that keep the streams alone and pass over memory once.

All take streams as (n, N, P, C): P tokens or pixels, channels last. Autograd's own formulas would keep float32 copies
of n streams and add zeros to what was split; under `torch.compile` and export the plain expressions are used instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = [
    "add_written",
    "as_float32",
    "combine",
    "gated_mean",
    "mix_streams",
    "normed_product",
    "sinkhorn",
    "without_autocast",
]

PIECE = 2**17
"""Numbers of a stream that are mixed at a time on a CPU, so that all streams of a piece fit into its caches."""


def as_float32(x: Tensor) -> Tensor:
    """x in float32 where its type is narrower; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in the types of its arguments, the first of which is a tensor, whatever autocast says."""
    kind = arguments[0].device.type
    # torch refuses the question about a device that has no autocast, "meta" for example
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return function(*arguments)
    with torch.autocast(kind, enabled=False):
        return function(*arguments)


def apply(function: type[Function], plain: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function with its own backward pass, or, where a compiler reads the program, the plain expression; in the
    type of the streams.
    """
    return without_autocast(plain if torch.compiler.is_compiling() else function.apply, *arguments)


def pieces(s: Tensor) -> Iterator[slice]:
    """Samples that are taken at a time."""
    size = max(1, PIECE // max(s[0, :1].numel(), 1))
    return (slice(start, start + size) for start in range(0, s.shape[1], size))


def by_token(samples: slice, *s: Tensor) -> Tensor:
    """Streams of some samples in a row, as one matrix (n, C) for each token, in float32: (N, P, n, C)."""
    count, some = sum(map(len, s)), s[0][0, samples]
    wide = torch.promote_types(some.dtype, torch.float32)
    rows, start = some.new_empty((*some.shape[:-1], count, some.shape[-1]), dtype=wide), 0
    for each in s:
        rows[..., start : start + len(each), :] = each[:, samples].permute(1, 2, 0, 3)
        start += len(each)
    return rows


# Mixing ---------------------------------------------------------------------------------------------------------------


def combine(weights: Tensor, s: Tensor) -> Tensor:
    """Σⱼ w[…, j, k] sⱼ: weights (N, P, n, k) or (n, k), streams (n, N, P, C) → (k, N, P, C), in the type of s."""
    if weights.ndim == 2:
        return (weights.T.to(s.dtype) @ s.flatten(1)).view(-1, *s.shape[1:])
    return torch.einsum("ntjk,jntc->kntc", weights.to(s.dtype), s)


def combine_in_pieces(weights: Tensor, s: Tensor) -> Tensor:
    """The same, in float32 within, without a copy of all streams."""
    out = s.new_empty(weights.shape[-1], *s.shape[1:])
    for samples in pieces(s):
        mixed = as_float32(weights[samples]).transpose(-1, -2).contiguous() @ by_token(samples, s)
        out[:, samples] = mixed.permute(2, 0, 1, 3)
    return out


def gradients_in_pieces(weights: Tensor, s: Tensor, *g: Tensor) -> tuple[Tensor, Tensor]:
    """Σₖ w[…, j, k] gₖ, shaped as s, and ⟨sⱼ, gₖ⟩ over the channels, shaped as the weights of each token."""
    to_s, to_weights = torch.empty_like(s), []
    for samples in pieces(s):
        rows = by_token(samples, *g)
        to_s[:, samples] = (as_float32(weights[samples]) @ rows).permute(2, 0, 1, 3)
        to_weights.append(by_token(samples, s) @ rows.transpose(-1, -2))
    return to_s, torch.cat(to_weights).to(weights.dtype)


def gradients_at_once(weights: Tensor, s: Tensor, *g: Tensor) -> tuple[Tensor, Tensor]:
    """The same for weights of all tokens, and on a GPU."""
    together = torch.cat(g)
    if weights.ndim == 2:
        to_weights = s.flatten(1) @ together.flatten(1).T
    else:
        to_weights = torch.einsum("jntc,kntc->ntjk", s, together)
    return combine(weights.transpose(-1, -2), together), to_weights.to(weights.dtype)


class Mix(Function):
    """(s, weights) → the first combination, and all others."""

    @staticmethod
    def forward(s: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return split_first((combine_in_pieces if takes_pieces(s, weights) else combine)(weights, s))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor]:
        s, weights = ctx.saved_tensors
        compute = gradients_in_pieces if takes_pieces(s, weights) else gradients_at_once
        return compute(weights, s, gradients[0].unsqueeze(0), gradients[1])


def takes_pieces(s: Tensor, weights: Tensor) -> bool:
    """Whether to mix some samples at a time: on a CPU, with weights of each token."""
    return weights.ndim > 2 and s.device.type == "cpu"


def split_first(mixed: Tensor) -> tuple[Tensor, Tensor]:
    """The first of several streams, and the others. The first is copied: a branch that keeps a view keeps them all."""
    return mixed[0].clone(), mixed[1:]


def mix_plainly(s: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`mix_streams` with autograd's own backward pass; for a compiler, which fuses them, as sums written out."""
    if weights.ndim == 2 or torch.compiler.is_exporting():
        return split_first(combine(weights, s))
    apart = as_float32(weights).unsqueeze(-1)
    terms = ([apart[..., j, k, :] * s[j] for j in range(len(s))] for k in range(weights.shape[-1]))
    first, *others = (reduce(torch.add, each).to(s.dtype) for each in terms)
    return first, torch.stack(others)


def mix_streams(s: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σⱼ w[…, j, k] sⱼ: what is read, k = 0, and what is carried on, k ≥ 1.

    Shapes: s (n, N, P, C), weights (N, P, n, 1 + n) of each token, or (n, 1 + n) of all → (N, P, C), (n, N, P, C).
    """
    return apply(Mix, mix_plainly, s, weights)


# Writing --------------------------------------------------------------------------------------------------------------


class Write(Function):
    """(carried, write, f) → carried + write · f, which is no view: FSDP2 asks that of a module's output."""

    @staticmethod
    def forward(carried: Tensor, write: Tensor, f: Tensor, channel: int) -> Tensor:
        out = torch.empty_like(carried)
        apart = (len(write), -1)
        torch.addcmul(carried.unflatten(0, apart), write, f, out=out.unflatten(0, apart))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, write, f, ctx.channel = inputs
        ctx.save_for_backward(write, f)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (g,), (write, f) = gradients, ctx.saved_tensors
        g_write = g_f = None
        apart = g.unflatten(0, (len(write), -1))
        if ctx.needs_input_grad[1]:
            g_write = (apart * f).sum(ctx.channel, keepdim=True, dtype=as_float32(write).dtype)
            g_write = g_write.sum_to_size(write.shape).to(write.dtype)
        if ctx.needs_input_grad[2]:
            # in the layout of f: torch 2.13's BatchNorm is wrong backward with the strides of apart[0] of one sample
            g_f = torch.zeros_like(f)
            for one, weight in zip(apart, write, strict=True):
                g_f.addcmul_(one, weight)
        return g, g_write, g_f, None


def write_plainly(carried: Tensor, write: Tensor, f: Tensor, channel: int) -> Tensor:
    """`add_written` with autograd's own backward pass."""
    return torch.addcmul(carried.unflatten(0, (len(write), -1)), write, f).flatten(0, 1)


def add_written(carried: Tensor, write: Tensor, f: Tensor, channel: int) -> Tensor:
    """carriedⱼ + writeⱼ f.

    Shapes: carried (n·N, …), write (n, 1 or N, …), 1 at the axis `channel`, f (N, …) → (n·N, …).
    """
    return apply(Write, write_plainly, carried, write.to(carried.dtype), f.to(carried.dtype), channel)


# Norm and map ---------------------------------------------------------------------------------------------------------


def product_and_moments(s: Tensor, weight: Tensor, centred: bool, joint: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """W s in float32, the mean square of s, and its mean where `centred`; summed over groups where `joint`."""
    product = as_float32(s @ weight.to(s.dtype).transpose(1, 2))
    square = mean_square(s)
    mean = s.mean(-1, dtype=square.dtype) if centred else None
    if not joint:
        return product, square, mean
    return product.sum(0), square.mean(0), None if mean is None else mean.mean(0)


def mean_square(s: Tensor) -> Tensor:
    """Of each row, in float32."""
    wide = torch.promote_types(s.dtype, torch.float32)
    return torch.linalg.vector_norm(s, dim=-1, dtype=wide).square() / s.shape[-1]


def inverse_deviation(square: Tensor, mean: Tensor | None, epsilon: float) -> Tensor:
    """1 / √(variance + ε), with an axis for the channels."""
    variance = square if mean is None else (square - mean.square()).clamp(min=0)
    return torch.rsqrt(variance + epsilon).unsqueeze(-1)


class NormedProduct(Function):
    """(s, weight) → W norm(s), without norm(s)."""

    @staticmethod
    def forward(
        s: Tensor, weight: Tensor, epsilon: float, centred: bool, joint: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        product, square, mean = product_and_moments(s, weight, centred, joint)
        inverse = inverse_deviation(square, mean, epsilon)
        return product * inverse, inverse, mean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        s, weight, ctx.epsilon, _, ctx.joint = inputs
        ctx.mark_non_differentiable(*(each for each in output[1:] if each is not None))
        ctx.save_for_backward(s, weight, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        g, (s, weight, out, inverse, mean) = gradients[0], ctx.saved_tensors
        if torch.is_grad_enabled():  # the second derivative goes through these, too
            moments = product_and_moments(s, weight, mean is not None, ctx.joint)[1:]
            inverse, mean = inverse_deviation(*moments, ctx.epsilon), moments[1]
        g_product = (g * inverse).to(s.dtype)
        # through 1 / √v: every number of the row by the same factor, around the mean
        numbers = s.shape[-1] * (len(s) if ctx.joint else 1)
        pull = -(g * out).sum(-1, keepdim=True) * inverse.square() / numbers
        g_s = g_weight = None
        if ctx.needs_input_grad[0]:
            left, right = g_product, weight.to(s.dtype)
            if mean is not None:
                left = torch.cat((left, (-pull * mean.unsqueeze(-1)).to(s.dtype)), dim=-1)
                right = torch.cat((right, torch.ones_like(right[:, :1])), dim=1)
            g_s = torch.addcmul(left @ right, s, pull.to(s.dtype))
        if ctx.needs_input_grad[1]:
            g_weight = (g_product.transpose(-1, -2) @ s).to(weight.dtype)
        return g_s, g_weight, None, None, None


def normed_product_plainly(s: Tensor, weight: Tensor, epsilon: float, centred: bool, joint: bool) -> tuple[Tensor, ...]:
    """`normed_product` with autograd's own backward pass, in a tuple as that of the function."""
    product, square, mean = product_and_moments(s, weight, centred, joint)
    return (product * inverse_deviation(square, mean, epsilon),)


def normed_product(s: Tensor, weight: Tensor, epsilon: float, *, centred: bool = False, joint: bool = True) -> Tensor:
    """W norm(s) of each row, in float32; norm(s) is not formed: W s is divided by the deviation.

    Shapes: s (g, R, C), weight (g, k, C) → (R, k), or (g, R, k) where groups are not `joint`.

    Args:
        s: rows in groups.
        weight: W; where `centred`, rows whose sum is 0, so that W s is W (s - mean).
        epsilon: added to the variance.
        centred: the deviation is that from the mean, LayerNorm's, and not from 0, RMSNorm's.
        joint: a row of all groups is one vector; else each has a norm and a product of its own.
    """
    return apply(NormedProduct, normed_product_plainly, s, weight, epsilon, centred, joint)[0]


# Gated read -----------------------------------------------------------------------------------------------------------


def gated_parts(s: Tensor, hidden: Tensor, up: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of one stream: rms(s), what it was multiplied by for that, and the gate, in float32."""
    inverse = inverse_deviation(mean_square(s), None, epsilon)
    return as_float32(s) * inverse, inverse, torch.sigmoid(as_float32(hidden @ up.to(hidden.dtype).T))


class GatedMean(Function):
    """(s, hidden, up, gain) → meanⱼ(σ(upⱼ hidden) ⊙ gainⱼ ⊙ rms(sⱼ)), one stream at a time, in both passes."""

    @staticmethod
    def forward(s: Tensor, hidden: Tensor, up: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        return gated_mean_plainly(s, hidden, up, gain, epsilon)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.epsilon = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        s, hidden, up, gain = ctx.saved_tensors
        g = as_float32(gradients[0]) / len(s)
        to_s, to_hidden, to_up, to_gain = [], torch.zeros_like(hidden), [], []
        for stream, u, factor in zip(s, up, gain, strict=True):
            normed, inverse, gate = gated_parts(stream, hidden, u, ctx.epsilon)
            g_gated = g * gate
            to_gain.append((g_gated * normed).sum(0))
            g_normed = g_gated * factor
            inner = ((g * normed) * factor * gate * (1 - gate)).to(hidden.dtype)
            to_hidden = to_hidden + inner @ u.to(inner.dtype)
            to_up.append(inner.T @ hidden)
            pull = (g_normed * normed).mean(-1, keepdim=True)
            to_s.append((inverse * (g_normed - normed * pull)).to(s.dtype))
        return torch.stack(to_s), to_hidden, torch.stack(to_up).to(up.dtype), torch.stack(to_gain).to(gain.dtype), None


def gated_mean_plainly(s: Tensor, hidden: Tensor, up: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """`gated_mean` with autograd's own backward pass."""
    total = torch.zeros_like(s[0], dtype=as_float32(s[0, :0]).dtype)
    for stream, u, factor in zip(s, up, gain, strict=True):
        normed, _, gate = gated_parts(stream, hidden, u, epsilon)
        total = total + gate * normed * factor
    return (total / len(s)).to(s.dtype)


def gated_mean(s: Tensor, hidden: Tensor, up: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """meanⱼ(σ(upⱼ hidden) ⊙ gainⱼ ⊙ rms(sⱼ)).

    Shapes: s (n, R, C), hidden (R, r), up (n, C, r), gain (n, C) → (R, C).
    """
    return apply(GatedMean, gated_mean_plainly, s, hidden, up, gain, epsilon)


# Sinkhorn -------------------------------------------------------------------------------------------------------------


def normalisations(logits: Tensor, iterations: int, epsilon: float) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The matrix after each division, what it was divided by, and the axis: (n, n, R) tokens last."""
    matrix = torch.softmax(logits, dim=1) + epsilon
    for number in range(2 * iterations - 1):
        axis = number % 2
        total = matrix.sum(axis, keepdim=True) + epsilon
        matrix = matrix / total
        yield matrix, total, axis


class Sinkhorn(Function):
    """(logits, iterations, ε) → the last matrix; what is in between is computed again."""

    @staticmethod
    def forward(logits: Tensor, iterations: int, epsilon: float) -> Tensor:
        return sinkhorn_plainly(logits, iterations, epsilon)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits, ctx.iterations, ctx.epsilon = inputs
        ctx.save_for_backward(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (g,), (logits,) = gradients, ctx.saved_tensors
        for matrix, total, axis in reversed(list(normalisations(logits, ctx.iterations, ctx.epsilon))):
            g = (g - (g * matrix).sum(axis, keepdim=True)) / total
        matrix = torch.softmax(logits, dim=1)
        return matrix * (g - (g * matrix).sum(1, keepdim=True)), None, None


def sinkhorn_plainly(logits: Tensor, iterations: int, epsilon: float) -> Tensor:
    """The last matrix."""
    return list(normalisations(logits, iterations, epsilon))[-1][0]


def sinkhorn(logits: Tensor, iterations: int, epsilon: float = 0.0) -> Tensor:
    """The doubly stochastic matrix that exp(logits) is scaled to: sums over the last axis but one are 1, those over the
    last are 1 as far as the iterations get (Xie et al. 2025, eq. 9, transposed, as DeepSeek-V4's code has it).

    Args:
        logits: (…, n, n).
        iterations: of rows, then columns, ≥ 1.
        epsilon: added to every entry once and to every sum.

    >>> bool(torch.allclose(sinkhorn(torch.randn(3, 3), 5).sum(0), torch.ones(3)))
    True
    """
    tokens_last = logits.flatten(0, -3).permute(1, 2, 0).contiguous() if logits.ndim > 2 else logits.unsqueeze(-1)
    matrix = apply(Sinkhorn, sinkhorn_plainly, tokens_last, iterations, epsilon)
    return matrix.permute(2, 0, 1).reshape(logits.shape)
