"""Convolutions over all channels, as matrix products over patches where that is faster: all passes where patches do
not overlap, the gradient of the weight elsewhere.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.hardware.processor import has_amx
from skipway.kernels.autotune import Implementation, add_kernel, enabled
from skipway.kernels.cast import at_least_float32, to_autocast
from skipway.kernels.conv_gradients import convolution_gradients
from skipway.kernels.layout import lay_out, memory_layout, output_layout
from skipway.kernels.matmul import linear_weight_gradient
from skipway.kernels.operator import Operator
from skipway.kernels.patch_conv import is_by_pixels, patch_rows, patches_forward, patches_input_gradient

__all__ = ["convolve", "convolve_patches", "has_slow_weight_gradient", "product_may_pay"]

PIECE = 1 << 24
"""Bytes of patches that are copied at a time."""
CHANNELS_PER_PIXEL = 4
"""Output channels per output pixel from which the product is the faster one, measured on one CPU with AMX."""
LARGE = 1 << 22
"""Elements of the weight, times images, below which torch's gradient takes well under a millisecond."""


def torch_weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Return torch's gradient of the weight."""
    return convolution_gradients(gradient, x, weight, (False, True, False), stride=stride, padding=padding)[1]


def weight_gradient_by_product(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Multiply the gradients of all pixels with the patches around them, dW = gᵀ P, in pieces of the batch that are
    summed in float32. P has as many columns as a filter has weights.

    oneDNN's own gradient in bfloat16 on AMX reads and writes the whole weight for each image, which is slow where
    images have few pixels and filters many channels (oneDNN 3.12, `brgconv_bwd_w`).
    """
    side, pixels = weight.shape[-1], gradient[0, 0].numel()
    images = max(1, PIECE // (weight[0].numel() * pixels * x.element_size()))
    found = None
    for part, its_gradient in zip(x.split(images), gradient.split(images), strict=True):
        rows = patch_rows(F.pad(part, [padding] * 4) if padding else part, side, stride)
        product = linear_weight_gradient(patch_rows(its_gradient, 1), rows)
        found = product if found is None else at_least_float32(found).add_(product)
    assert found is not None
    return found.to(weight.dtype).unflatten(1, (side, side, weight.shape[1])).movedim(-1, 1)


def output_sides(x: Tensor, weight: Tensor, stride: int, padding: int) -> list[int]:
    """Height and width of the output."""
    return [(side + 2 * padding - weight.shape[-1]) // stride + 1 for side in x.shape[2:]]


def product_may_pay(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Return whether a product is worth a measurement: not where patches take more memory than the weight, per image.

    >>> product_may_pay(torch.empty(1, 64, 56, 56), torch.empty(64, 64, 3, 3), stride=1, padding=1)
    False
    """
    return is_by_pixels(x) and len(weight) >= math.prod(output_sides(x, weight, stride, padding))


def supports_product(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Return whether a product is worth a measurement: not where it copies whole maps for 1 × 1 filters."""
    return weight.shape[-1] > 1 or (is_by_pixels(gradient) and is_by_pixels(x))


convolution_weight_gradient = add_kernel(
    "convolution to weight",
    torch_weight_gradient,
    Implementation("product", weight_gradient_by_product, supports_product),
)


def cuts_patches(weight: Tensor, stride: int, padding: int, by_rule: bool) -> bool:
    """Return whether patches do not overlap, so that `patch_conv` computes the convolution and the gradient of x."""
    return stride == weight.shape[-1] and not padding and not by_rule


def has_slow_weight_gradient(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Return whether torch's gradient of a weight in bfloat16 is slower than the product here, by a fixed rule.

    >>> x, weight = torch.empty(1, 64, 56, 56), torch.empty(64, 64, 3, 3)
    >>> has_slow_weight_gradient(x, weight, stride=1, padding=1)
    False
    """
    if not has_amx() or len(x) * weight.numel() < LARGE or not is_by_pixels(x):
        return False
    return weight.shape[-1] == 1 or len(weight) >= CHANNELS_PER_PIXEL * math.prod(
        output_sides(x, weight, stride, padding)
    )


class ConvolutionBackward(Operator, name="convolution_backward"):
    """Gradients of x and of the weight, each empty where it is not needed."""

    @staticmethod
    def forward(
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        stride: int,
        padding: int,
        by_rule: bool,
        needs_x: bool,
        needs_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        to_x, to_weight = x.new_empty(0), weight.new_empty(0)
        if needs_x:
            if cuts_patches(weight, stride, padding, by_rule):
                found = patches_input_gradient(gradient, x, weight)
            else:
                mask = (True, False, False)
                found = convolution_gradients(gradient, x, weight, mask, stride=stride, padding=padding)[0]
            to_x = found.contiguous(memory_format=memory_layout(x))
        if needs_weight:
            compute = weight_gradient_by_product if by_rule else convolution_weight_gradient
            to_weight = compute(gradient, x, weight, stride, padding).contiguous(memory_format=memory_layout(weight))
        return to_x, to_weight

    @staticmethod
    def fake(
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        stride: int,
        padding: int,
        by_rule: bool,
        needs_x: bool,
        needs_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        to_x = torch.empty_like(x, memory_format=memory_layout(x)) if needs_x else x.new_empty(0)
        if not needs_weight:
            return to_x, weight.new_empty(0)
        return to_x, torch.empty_like(weight, memory_format=memory_layout(weight))


class Convolution(Operator, name="convolution"):
    """The convolution, in the layout that torch's has."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, by_rule: bool) -> Tensor:
        if cuts_patches(weight, stride, padding, by_rule):
            y = patches_forward(x, weight, bias)
        else:
            y = F.conv2d(x, weight, bias, stride, padding)
        return lay_out(y, output_layout(x, weight))

    @staticmethod
    def fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, by_rule: bool) -> Tensor:
        sides = output_sides(x, weight, stride, padding)
        return lay_out(x.new_empty(x.shape[0], weight.shape[0], *sides), output_layout(x, weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.settings = inputs[3:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gradient = gradient.contiguous(memory_format=output_layout(x, weight))
        to_x, to_weight = ConvolutionBackward.apply(gradient, x, weight, *ctx.settings, needs_x, needs_weight)
        to_bias = gradient.sum((0, 2, 3)) if needs_bias else None
        return to_x if needs_x else None, to_weight if needs_weight else None, to_bias, None, None, None


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0, by_rule: bool = False
) -> Tensor:
    """Convolve as torch does, with the gradient of the weight by torch or as a product over patches; where patches do
    not overlap, all passes by one or the other.

    Shapes: x (N, in, H, W), weight (out, in, k, k), bias (out,) → (N, out, H', W'), H' = ⌊(H + 2p − k)/s⌋ + 1. First
    derivatives only; second derivatives exist under `off()`.

    Args:
        x: images.
        weight: square filters over all channels.
        bias: of the outputs.
        stride: of both axes.
        padding: zeros on each side of both axes.
        by_rule: take the product without a measurement, so that runs repeat bit for bit.

    Raises:
        SkipwayError: the filters are not square.

    >>> convolve(torch.ones(1, 3, 3, 3), torch.ones(2, 3, 3, 3), padding=1)[0, 0]
    tensor([[12., 18., 12.],
            [18., 27., 18.],
            [12., 18., 12.]])
    """
    rows, columns = weight.shape[-2:]
    if rows != columns:
        raise SkipwayError(f"weight of shape {tuple(weight.shape)}: the rule is square filters, (out, in, k, k)")
    x, weight, bias = to_autocast(x, weight, bias)  # type: ignore[assignment]
    if not enabled() or not x.numel():
        return F.conv2d(x, weight, bias, stride, padding)
    return Convolution.apply(x, weight, bias, stride, padding, by_rule)


def convolve_patches(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve with a stride as large as the filter, y[:, h, w] = Σ_ij W[:, :, i, j] x[:, kh + i, kw + j] + b: a patch
    embedding, a downsampling, or, for k = 1, a linear map of each pixel.

    The forward pass and each gradient are computed as torch does or as a product over all patches, whichever is faster
    here; where patches do not overlap, both compute as much.

    Shapes: x (N, in, H, W), weight (out, in, k, k), bias (out,) → (N, out, ⌊H/k⌋, ⌊W/k⌋). First derivatives only;
    second derivatives exist under `off()`.

    Raises:
        SkipwayError: the filter is not square, or larger than the map.

    >>> convolve_patches(torch.ones(1, 3, 4, 4), torch.ones(4, 3, 2, 2))[0, 0]
    tensor([[12., 12.],
            [12., 12.]])
    """
    rows, columns = weight.shape[-2:]
    if rows != columns or min(x.shape[-2:]) < rows:
        raise SkipwayError(
            f"weight of shape {tuple(weight.shape)}, map of {tuple(x.shape)}: the rule is a filter k × k in the map"
        )
    return convolve(x, weight, bias, stride=rows)
