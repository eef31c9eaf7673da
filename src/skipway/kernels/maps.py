"""Linear maps on the CPU: through oneDNN where it is quicker than the library that torch takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skipway.kernels.autotune import Way, enabled, kernel
from skipway.kernels.cast import lowered
from skipway.kernels.onednn import has_door, opened

__all__ = ["Pack", "by_onednn", "linear", "packed", "packed_product", "pointwise", "product", "worthwhile"]

SMALL = 1 << 22
"""Multiplications below which a map is left to torch: the operator's own overhead (some 20 µs) would be felt."""


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The operator that inductor emits for a linear map; it always goes through oneDNN, with packed weights too."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return by_onednn(x, weight.contiguous(), bias)


def on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


product = kernel("linear", F.linear, Way("onednn", onednn, on_cpu))
"""x Wᵀ + b by the quickest way; no gradient passes (see `linear`)."""


@dataclass(frozen=True)
class Pack:
    """A weight as oneDNN's products want it; to a kernel's choice one is as good as another."""

    weight: Tensor = field(compare=False)


def packed(weight: Tensor, rows: int) -> Tensor | None:
    """A weight reordered for products of so many rows; None where this torch or this processor has no such order."""
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None


packed_product = kernel(
    "packed linear",
    lambda x, weight, bias, pack: F.linear(x, weight, bias),
    Way("packed", lambda x, weight, bias, pack: by_onednn(x, pack.weight, bias)),
)
"""x Wᵀ + b where a packed weight is at hand; no gradient passes."""


def pairs(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient.t() @ x


to_weight = kernel("linear to weight", pairs, Way("onednn", opened(pairs), has_door))


@torch.library.custom_op("skipway::linear", mutates_args=())
def operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight, bias)


@operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.biased = bias is not None


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    to_x = to_own = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = operator(gradient, weight.t().contiguous(), None)
    if ctx.needs_input_grad[1]:
        to_own = weight_operator(gradient.flatten(0, -2), x.flatten(0, -2))
    if ctx.biased and ctx.needs_input_grad[2]:
        to_bias = gradient.flatten(0, -2).sum(0)
    return to_x, to_own, to_bias


operator.register_autograd(backward, setup_context=keep)


@torch.library.custom_op("skipway::linear_weight", mutates_args=())
def weight_operator(gradient: Tensor, x: Tensor) -> Tensor:
    return to_weight(gradient, x).contiguous()


@weight_operator.register_fake
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(gradient.shape[1], x.shape[1])


def keep_pairs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward_pairs(ctx: Any, second: Tensor) -> tuple[Tensor, Tensor]:
    gradient, x = ctx.saved_tensors
    return operator(x, second, None), operator(gradient, second.t().contiguous(), None)


weight_operator.register_autograd(backward_pairs, setup_context=keep_pairs)


def worthwhile(x: Tensor, weight: Tensor) -> bool:
    """Whether a linear map may be quicker by a way of ours: large, in float32, on the CPU, kernels switched on."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.ndim >= 2
        and x.numel() * weight.shape[0] >= SMALL
        and enabled()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b, as `torch.nn.functional.linear`.

    On the CPU torch computes this in float32 with the BLAS that it was built with, MKL in its wheels, which on AMD
    processors stays behind oneDNN's rate at many sizes (`benchmarks/speed.py` measures both); convolutions and bfloat16
    go through oneDNN already.

    Shapes: x (…, in), weight (out, in), bias (out,) → (…, out). First and second derivatives exist.

    >>> linear(torch.ones(2, 3), torch.ones(4, 3)).shape
    torch.Size([2, 4])
    """
    x, weight, bias = lowered(x, weight, bias)  # type: ignore[assignment]
    return operator(x, weight, bias) if worthwhile(x, weight) else F.linear(x, weight, bias)


def as_convolution(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None])


def as_product(x: Tensor, weight: Tensor) -> Tensor:
    """Pixels as rows; no copy, since the map lies channels-last."""
    return product(x.movedim(1, -1).flatten(0, -2), weight, None).view(len(x), *x.shape[2:], -1).movedim(-1, 1)


def pixels(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


convolve = kernel("pointwise", as_convolution, Way("product", as_product, lambda x, weight: pixels(x)))


def weight_as_convolution(gradient: Tensor, x: Tensor) -> Tensor:
    weight = x.new_empty(gradient.shape[1], x.shape[1], 1, 1)
    found = torch.ops.aten.convolution_backward(
        gradient, x, weight, [0], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, (False, True, False)
    )
    return found[1].flatten(1)


def weight_as_product(gradient: Tensor, x: Tensor) -> Tensor:
    return to_weight(gradient.movedim(1, -1).flatten(0, -2), x.movedim(1, -1).flatten(0, -2))


to_weight_of_map = kernel(
    "pointwise to weight",
    weight_as_convolution,
    Way("product", weight_as_product, lambda gradient, x: pixels(gradient) and pixels(x)),
)


@torch.library.custom_op("skipway::pointwise", mutates_args=())
def map_operator(x: Tensor, weight: Tensor) -> Tensor:
    return convolve(x, weight)


@map_operator.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None])


@torch.library.custom_op("skipway::pointwise_weight", mutates_args=())
def map_weight_operator(gradient: Tensor, x: Tensor) -> Tensor:
    return to_weight_of_map(gradient, x).contiguous()


@map_weight_operator.register_fake
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(gradient.shape[1], x.shape[1])


def keep_map(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward_map(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    layout = torch.channels_last if pixels(x) else torch.contiguous_format
    gradient = gradient.contiguous(memory_format=layout)
    to_x = map_operator(gradient, weight.t().contiguous()) if ctx.needs_input_grad[0] else None
    return to_x, map_weight_operator(gradient, x) if ctx.needs_input_grad[1] else None


map_operator.register_autograd(backward_map, setup_context=keep_map)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1 × 1 convolution, y = W x + b at every pixel: as a convolution or as a product of matrices over all pixels,
    forward and for both gradients, whichever is quicker.

    Shapes: x (N, in, H, W), weight (out, in), bias (out,) → (N, out, H, W). First derivatives only; second ones exist
    under `off()`.

    >>> pointwise(torch.ones(1, 3, 2, 2), torch.ones(4, 3)).shape
    torch.Size([1, 4, 2, 2])
    """
    x, weight, bias = lowered(x, weight, bias)  # type: ignore[assignment]
    y = map_operator(x, weight) if enabled() and x.numel() else as_convolution(x, weight)
    return y if bias is None else y + bias.view(-1, 1, 1)
