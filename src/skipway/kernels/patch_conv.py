"""Convolutions whose patches do not overlap, 1 × 1 among them, and the gradient of the map, as matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from skipway.kernels.autotune import Implementation, add_kernel
from skipway.kernels.conv_gradients import convolution_gradients
from skipway.kernels.layout import lay_out, output_layout
from skipway.kernels.matmul import linear_forward

__all__ = ["multiply_patches", "patches_forward", "patches_input_gradient"]


def is_by_pixels(x: Tensor) -> bool:
    """Return whether a map's pixels are the rows of a matrix as they lie in memory."""
    return x.is_contiguous(memory_format=torch.channels_last)


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
    return lay_out(y, output_layout(x, weight))


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


def input_gradient_reference(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return torch's gradient of x."""
    return convolution_gradients(gradient, x, weight, (True, False, False), stride=weight.shape[-1])[0]


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
