"""Layer normalisation over the channels of a map; batch normalisation, addition and ReLU as one training pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skipway.kernels import triton
from skipway.kernels.choosing import Way, enabled, kernel

__all__ = ["batch_norm_relu", "channel_norm"]


def rows(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels as rows: no copy where the map lies channels-last."""
    y, mean, inverse = torch.native_layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, eps)
    return y.movedim(-1, 1), mean.squeeze(-1), inverse.squeeze(-1)


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
    return x.new_empty(x.shape).contiguous(memory_format=torch.channels_last), moments, torch.empty_like(moments)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def backward(ctx: Any, gradient: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, inverse = ctx.saved_tensors
    to_x, to_weight, to_bias = torch.ops.aten.native_layer_norm_backward(
        gradient.movedim(1, -1),
        x.movedim(1, -1),
        [x.shape[1]],
        mean.unsqueeze(-1),
        inverse.unsqueeze(-1),
        weight,
        bias,
        [True, True, True],
    )
    return to_x.movedim(-1, 1), to_weight, to_bias, None


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
    return normalise(x, weight, bias, shortcut, eps)


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
        passed, x, weight, None, None, mean, inverse, True, ctx.eps, [True, True, True]
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
