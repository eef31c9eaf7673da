"""Layer normalisation over channels, behind an addition too; batch normalisation, addition and ReLU in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skipway.kernels import triton
from skipway.kernels.autotune import Way, enabled, kernel
from skipway.kernels.cast import wide
from skipway.kernels.residual import factored, in_one_pass
from skipway.kernels.residual import plain as epilogue
from skipway.kernels.residual import plain_backward as epilogue_backward

__all__ = ["batch_norm_relu", "channel_norm", "residual_norm"]


def last(x: Tensor) -> Tensor:
    """A map with its channels at the end, as tokens have them."""
    return x.movedim(1, -1) if x.ndim == 4 else x


def back(x: Tensor) -> Tensor:
    """A map with its channels where they were."""
    return x.movedim(-1, 1) if x.ndim == 4 else x


def rows(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels as rows: no copy where the map lies channels-last. On a CPU torch rounds moments to the weight's type."""
    y, mean, inverse = torch.native_layer_norm(last(x), weight.shape, *affine(x, weight, bias), eps)
    return back(y), wide(mean.squeeze(-1)), wide(inverse.squeeze(-1))


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As torch wants them beside x: on a GPU of its type."""
    return (weight.to(x.dtype), bias.to(x.dtype)) if x.is_cuda else (weight, bias)


def narrow(x: Tensor, weight: Tensor, moments: Tensor) -> Tensor:
    """Moments as torch's backward wants them beside x and the weight: on a CPU of the weight's type."""
    return moments.to(weight.dtype) if x.device.type == "cpu" else moments


def rows_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    to_x, *others = torch.ops.aten.native_layer_norm_backward(
        *(last(gradient), last(x), weight.shape),
        *(narrow(x, weight, each).unsqueeze(-1) for each in (mean, inverse)),
        *(*affine(x, weight, bias), [True, True, True]),
    )
    return back(to_x), *others


def planes(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Moments along the channels of a map that lies plane by plane, without turning it round."""
    variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    inverse = (variance + eps).rsqrt()
    y = torch.addcmul(bias.view(-1, 1, 1), (x - mean).mul_(inverse), weight.view(-1, 1, 1))
    return y, mean.squeeze(1), inverse.squeeze(1)


forward = kernel(
    "channel norm",
    rows,
    Way("planes", planes, lambda x, *rest: x.is_contiguous() and x.dtype in (torch.float32, torch.float64)),
    Way("triton", triton.channel_norm, triton.serves_norm),
)


@torch.library.custom_op("skipway::channel_norm", mutates_args=())
def operator(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, inverse = forward(x, weight, bias, eps)
    return y.contiguous(memory_format=torch.channels_last), mean.contiguous(), inverse.contiguous()


@operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    moments = x.new_empty((x.shape[0], *x.shape[2:]), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x, memory_format=torch.channels_last), moments, torch.empty_like(moments)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def backward(ctx: Any, gradient: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    return *rows_backward(gradient, *ctx.saved_tensors), None


operator.register_autograd(backward, setup_context=keep)


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Every pixel normalised over its channels: y = g ⊙ (x − μ) / √(σ² + ε) + b, ConvNeXt's norm on maps.

    Shapes: x (N, C, H, W), weight and bias (C,) → (N, C, H, W), channels-last in memory.

    >>> channel_norm(torch.randn(2, 8, 5, 5), torch.ones(8), torch.zeros(8)).mean(1).abs().max() < 1e-5
    tensor(True)
    """
    if not enabled() or not x.numel():
        return rows(x, weight, bias, eps)[0]
    return operator(x, weight, bias, eps)[0]


def then_norm(add: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """A sum by a way of the epilogue, and its norm."""

    def run(
        shortcut: Tensor,
        branch: Tensor,
        gain: Tensor | None,
        mask: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> tuple[Tensor, ...]:
        stream = add(shortcut, branch, gain, mask)
        return stream, *rows(stream, weight, bias, eps)

    return run


one_by_one = then_norm(epilogue)
add_and_norm = kernel(
    "residual norm",
    one_by_one,
    Way("one pass", then_norm(in_one_pass), factored),
    Way("triton", triton.normalised, triton.serves_residual_norm),
)


@torch.library.custom_op("skipway::residual_norm", mutates_args=())
def sum_operator(
    shortcut: Tensor,
    branch: Tensor,
    gain: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stream, y, mean, inverse = add_and_norm(shortcut, branch, gain, mask, weight, bias, eps)
    return stream, y.contiguous(memory_format=layout(y)), mean.contiguous(), inverse.contiguous()


def layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.contiguous_format


@sum_operator.register_fake
def _(
    shortcut: Tensor, branch: Tensor, gain: Any, mask: Any, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, ...]:
    stream = epilogue(shortcut, branch, gain, mask)
    moments = stream.new_empty(last(stream).shape[:-1], dtype=torch.promote_types(stream.dtype, torch.float32))
    y = torch.empty_like(stream, memory_format=layout(stream))
    return stream, y, moments, torch.empty_like(moments)


def keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gain, mask, weight, bias, _ = inputs
    stream, _, mean, inverse = output
    learned = gain is not None and gain.requires_grad
    ctx.save_for_backward(branch if learned else None, gain, mask, weight, bias, stream, mean, inverse)
    ctx.mark_non_differentiable(mean, inverse)


def backward_sum(ctx: Any, to_stream: Tensor, gradient: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    branch, gain, mask, weight, bias, stream, mean, inverse = ctx.saved_tensors
    to_sum, to_weight, to_bias = rows_backward(gradient, stream, weight, bias, mean, inverse)
    to_sum = to_stream + to_sum
    if gain is None and mask is None:
        return to_sum, to_sum, None, None, to_weight, to_bias, None
    to_branch, to_gain = epilogue_backward(to_sum, branch, gain, mask)
    return to_sum, to_branch, to_gain if ctx.needs_input_grad[2] else None, None, to_weight, to_bias, None


sum_operator.register_autograd(backward_sum, setup_context=keep_sum)


def residual_norm(
    shortcut: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The end of a connection and the norm that the next one begins with: y = shortcut + g ⊙ m ⊙ branch, and
    b + w ⊙ (y − μ) / √(σ² + ε) over its channels; in Triton y is written and never read again.

    Shapes: shortcut and branch alike, (N, T, C) or (N, C, H, W); weight and bias (C,); gain (C,) or (C, 1, 1) or one
    number, mask (N, 1, …) → y and its norm, shaped like the branch; the norm of a map lies channels-last.

    Args:
        weight: w of the norm.
        bias: b of the norm.
        gain: g, what a scheme multiplies the branch with.
        mask: m, stochastic depth's: 0 or 1/(1 − p) for each sample; it has no gradient.
        eps: ε.

    >>> x = torch.randn(2, 5, 8)
    >>> y, normed = residual_norm(x, x, torch.ones(8), torch.zeros(8))
    >>> torch.equal(y, 2 * x), torch.allclose(normed, F.layer_norm(y, (8,), eps=1e-6), atol=1e-5)
    (True, True)
    """
    run = sum_operator if enabled() and branch.numel() else one_by_one
    stream, normed, *_ = run(shortcut, branch, gain, mask, weight, bias, eps)
    return stream, normed


def separate(
    x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    return F.relu(y if shortcut is None else y + shortcut), mean, inverse


def in_place(
    x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Addition and ReLU work on the norm's own output: one map is written in place of three."""
    y, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    return (y if shortcut is None else y.add_(shortcut)).relu_(), mean, inverse


normalise = kernel("batch norm relu", separate, Way("in place", in_place))


@torch.library.custom_op("skipway::batch_norm_relu", mutates_args=())
def batch_operator(
    x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, inverse = normalise(x, weight, bias, shortcut, eps)
    return y, wide(mean), wide(inverse)


@batch_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, shortcut: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    moments = x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), moments, torch.empty_like(moments)


def keep_batch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, shortcut, eps = inputs
    ctx.save_for_backward(x, weight, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.eps, ctx.added = eps, shortcut is not None


def backward_batch(ctx: Any, gradient: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    x, weight, y, mean, inverse = ctx.saved_tensors
    passed = torch.ops.aten.threshold_backward(gradient, y, 0)
    to_x, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
        *(passed, x, weight, None, None, *(narrow(x, weight, each) for each in (mean, inverse))),
        *(True, ctx.eps, [True, True, True]),
    )
    return to_x, to_weight, to_bias, passed if ctx.added else None, None


batch_operator.register_autograd(backward_batch, setup_context=keep_batch)


def follow(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    momentum: float,
    eps: float,
) -> None:
    """Running statistics as `torch.nn.BatchNorm2d` keeps them: with the unbiased variance."""
    if running_mean is None or running_var is None:
        return
    with torch.no_grad():
        count = x.numel() / x.shape[1]
        variance = (inverse.double() ** -2 - eps) * (count / max(count - 1, 1))
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(variance.to(running_var.dtype), momentum)


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    shortcut: Tensor | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """y = relu(g ⊙ (x − μ) / √(σ² + ε) + b + shortcut), with the batch's μ and σ²: a ResNet's training pass.

    The norm's output and the sum are never kept: backward reads x and y alone. Running statistics are updated in place
    as `torch.nn.BatchNorm2d` does, with the unbiased variance.

    Shapes: x and shortcut (N, C, H, W); weight, bias and running statistics (C,) → (N, C, H, W).

    Args:
        momentum: share of the batch in the running statistics.

    >>> y = batch_norm_relu(torch.randn(4, 3, 2, 2), torch.ones(3), torch.zeros(3))
    >>> y.shape, bool((y >= 0).all())
    (torch.Size([4, 3, 2, 2]), True)
    """
    run = batch_operator if enabled() else separate
    y, mean, inverse = run(x, weight, bias, shortcut, eps)
    follow(running_mean, running_var, x, mean, inverse, momentum, eps)
    return y
