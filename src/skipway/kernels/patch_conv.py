"""Convolutions whose patches do not overlap, 1 × 1 among them, and both of their gradients, as matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.kernels.autotune import Implementation, add_kernel, enabled
from skipway.kernels.cast import to_autocast
from skipway.kernels.conv_gradients import convolution_gradients
from skipway.kernels.matmul import linear_forward, linear_weight_gradient
from skipway.kernels.operator import Operator

__all__ = ["convolve_patches", "multiply_patches"]


def is_by_pixels(x: Tensor) -> bool:
    """Return whether a map's pixels are the rows of a matrix as they lie in memory."""
    return x.is_contiguous(memory_format=torch.channels_last)


def filter_layout(weight: Tensor) -> torch.memory_format:
    """The layout of a weight, and of its gradient; 1 × 1 filters have both."""
    return torch.channels_last if is_by_pixels(weight) and not weight.is_contiguous() else torch.contiguous_format


def output_layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The layout of what torch's convolution returns: channels-last where the map or a larger filter than 1 × 1 is."""
    return torch.channels_last if is_by_pixels(x) else filter_layout(weight)


def patch_rows(x: Tensor, side: int, stride: int | None = None) -> Tensor:
    """Return the patches of a map as rows, (N · H' · W', k · k · C); no copy of a channels-last map for k = 1.

    Args:
        x: (N, C, H, W).
        side: k.
        stride: from one patch to the next; k by default.
    """
    x, stride = x.movedim(1, -1), stride or side
    if side > 1:
        x = x.unfold(1, side, stride).unfold(2, side, stride).movedim(3, -1).flatten(3)
    elif stride > 1:
        x = x[:, ::stride, ::stride]
    return x.flatten(0, 2)


def filter_rows(weight: Tensor) -> Tensor:
    """Return a weight (out, in, k, k) as a matrix (out, k · k · in) for the rows of patches."""
    return weight.movedim(1, -1).flatten(1)


def patches_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve as torch does."""
    return F.conv2d(x, weight, bias, weight.shape[-1])


def multiply_patches(
    x: Tensor, weight: Tensor, bias: Tensor | None, product: Callable[..., Tensor] = F.linear
) -> Tensor:
    """Convolve with a stride as large as the filter by a product over all patches; with torch's own one for gradients.

    >>> x, weight = torch.randn(1, 3, 5, 7), torch.randn(4, 3, 2, 2)
    >>> torch.allclose(multiply_patches(x, weight, None), F.conv2d(x, weight, stride=2), atol=1e-5)
    True
    """
    side = weight.shape[-1]
    y = product(patch_rows(x, side), filter_rows(weight), bias)
    y = y.view(len(x), x.shape[2] // side, x.shape[3] // side, -1).movedim(-1, 1)
    return y.contiguous(memory_format=output_layout(x, weight))


def product_pays(x: Tensor, weight: Tensor) -> bool:
    """Return whether a product is worth a measurement: not where it copies a whole map for 1 × 1 filters."""
    return weight.shape[-1] > 1 or is_by_pixels(x)


patches_forward = add_kernel(
    "patches",
    patches_reference,
    Implementation(
        "product",
        lambda x, weight, bias: multiply_patches(x, weight, bias, linear_forward),
        lambda x, weight, bias: product_pays(x, weight),
    ),
)


def patches_gradients(gradient: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> list[Tensor]:
    """Return torch's gradients of x and weight where `mask` asks for them."""
    return convolution_gradients(gradient, x, weight, mask, stride=weight.shape[-1])


def input_gradient_reference(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return torch's gradient of x."""
    return patches_gradients(gradient, x, weight, (True, False, False))[0]


def input_gradient_by_product(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Multiply the gradients of all patches by the transposed weight; pixels beyond the last patch have none."""
    side, (height, width) = weight.shape[-1], gradient.shape[-2:]
    rows = linear_forward(patch_rows(gradient, 1), filter_rows(weight).t().contiguous(), None)
    found = rows.view(len(x), height, width, side, side, -1).transpose(2, 3)
    found = found.reshape(len(x), height * side, width * side, -1).movedim(-1, 1)
    return F.pad(found, (0, x.shape[3] - width * side, 0, x.shape[2] - height * side))


patches_input_gradient = add_kernel(
    "patches to input",
    input_gradient_reference,
    Implementation(
        "product",
        input_gradient_by_product,
        lambda gradient, x, weight: product_pays(gradient, weight),
    ),
)


def weight_gradient_reference(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return torch's gradient of the weight."""
    return patches_gradients(gradient, x, weight, (False, True, False))[1]


def weight_gradient_by_product(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Multiply the gradients of all patches with their inputs, dW = gᵀ P."""
    found = linear_weight_gradient(patch_rows(gradient, 1), patch_rows(x, weight.shape[-1]))
    return found.unflatten(1, (*weight.shape[2:], weight.shape[1])).movedim(-1, 1)


patches_weight_gradient = add_kernel(
    "patches to weight",
    weight_gradient_reference,
    Implementation(
        "product",
        weight_gradient_by_product,
        lambda gradient, x, weight: product_pays(gradient, weight) and product_pays(x, weight),
    ),
)


class PatchesBackward(Operator, name="patches_backward"):
    """Gradients of x and of the weight, each empty where it is not needed."""

    @staticmethod
    def forward(
        gradient: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
    ) -> tuple[Tensor, Tensor]:
        to_x, to_weight = x.new_empty(0), weight.new_empty(0)
        if needs_x:
            layout = torch.channels_last if is_by_pixels(x) else torch.contiguous_format
            to_x = patches_input_gradient(gradient, x, weight).contiguous(memory_format=layout)
        if needs_weight:
            found = patches_weight_gradient(gradient, x, weight)
            to_weight = found.contiguous(memory_format=filter_layout(weight))
        return to_x, to_weight

    @staticmethod
    def fake(gradient: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
        layout = torch.channels_last if is_by_pixels(x) else torch.contiguous_format
        to_x = torch.empty_like(x, memory_format=layout) if needs_x else x.new_empty(0)
        if not needs_weight:
            return to_x, weight.new_empty(0)
        return to_x, torch.empty_like(weight, memory_format=filter_layout(weight))


class Patches(Operator, name="patches"):
    """The convolution, in the layout that torch's has."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return patches_forward(x, weight, bias).contiguous(memory_format=output_layout(x, weight))

    @staticmethod
    def fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        sides = [side // weight.shape[-1] for side in x.shape[2:]]
        return x.new_empty(x.shape[0], weight.shape[0], *sides).contiguous(memory_format=output_layout(x, weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gradient = gradient.contiguous(memory_format=output_layout(x, weight))
        to_x, to_weight = PatchesBackward.apply(gradient, x, weight, needs_x, needs_weight)
        to_bias = gradient.sum((0, 2, 3)) if needs_bias else None
        return to_x if needs_x else None, to_weight if needs_weight else None, to_bias


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
    x, weight, bias = to_autocast(x, weight, bias)  # type: ignore[assignment]
    if not enabled() or not x.numel():
        return patches_reference(x, weight, bias)
    return Patches.apply(x, weight, bias)
