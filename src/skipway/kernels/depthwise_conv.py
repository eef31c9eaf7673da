"""Depthwise k × k convolution and both of its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.kernels import triton_launch
from skipway.kernels.autotune import Implementation, add_kernel, enabled
from skipway.kernels.cast import to_autocast
from skipway.kernels.conv_gradients import convolution_gradients
from skipway.kernels.layout import lay_out, memory_layout, output_layout
from skipway.kernels.operator import Operator

__all__ = ["depthwise"]

TILE = 7
"""Side of the tiles of a map in the weight's gradient by matrix products."""


def depthwise_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve as torch does."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


def depthwise_in_other_layout(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve in the layout that x does not have: one layout may cost more than two copies and the other."""
    other = torch.contiguous_format if memory_layout(x) == torch.channels_last else torch.channels_last
    return lay_out(depthwise_reference(lay_out(x, other), weight, bias), output_layout(x, weight))


depthwise_forward = add_kernel(
    "depthwise",
    depthwise_reference,
    Implementation("other layout", depthwise_in_other_layout),
    Implementation("triton", triton_launch.launch_depthwise, triton_launch.supports_depthwise),
)


def depthwise_gradients(gradient: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> list[Tensor]:
    """Return torch's gradients of x, weight and bias where `mask` asks for them."""
    return convolution_gradients(gradient, x, weight, mask, padding=weight.shape[-1] // 2, groups=x.shape[1])


def input_gradient_reference(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return torch's gradient of x."""
    return depthwise_gradients(gradient, x, weight, (True, False, False))[0]


def input_gradient_by_flip(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Convolve the gradient with the weight rotated by 180°, the transpose of a depthwise convolution."""
    return depthwise_reference(gradient, weight.flip(-2, -1), None)


depthwise_input_gradient = add_kernel(
    "depthwise to input",
    input_gradient_reference,
    Implementation("flipped", input_gradient_by_flip),
    Implementation("triton", triton_launch.launch_depthwise_to_input, triton_launch.supports_depthwise_gradient),
)


def weight_gradient_reference(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return torch's gradient of the weight."""
    return depthwise_gradients(gradient, x, weight, (False, True, False))[1]


def weight_gradient_by_tiles(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Compute dW_ij = Σ g_t x_{t+(i, j)} from the products of all pairs in a tile: one matrix product per channel.

    The map is cut into tiles of T × T gradients, each with the (T + k − 1)² inputs around it. Summed over tiles and
    images, P[t, s] = Σ g_t x_s is a product of matrices for each channel, at the rate of matrix products; dW_ij is the
    sum of P over the pairs with s − t = (i, j). Of (T + k − 1)² T² products k² T² are used.
    """
    side, channels = weight.shape[-1], x.shape[1]
    half, span = side // 2, TILE + side - 1
    height, width = x.shape[-2:]
    below, right = -height % TILE, -width % TILE
    padded = F.pad(x.contiguous(), (half, half + right, half, half + below))
    gradient = F.pad(gradient.contiguous(), (0, right, 0, below)) if below or right else gradient.contiguous()
    inputs = padded.unfold(2, span, TILE).unfold(3, span, TILE).movedim(1, 0).reshape(channels, -1, span * span)
    outputs = gradient.unfold(2, TILE, TILE).unfold(3, TILE, TILE).movedim(1, 0).reshape(channels, -1, TILE * TILE)
    products = torch.bmm(outputs.mT, inputs)
    down, across = span * span * TILE + span, span * span + 1  # strides of one step of t, with s one step further
    diagonals = products.as_strided(
        (channels, side, side, TILE, TILE), (TILE**2 * span**2, span, 1, down, across), products.storage_offset()
    )
    return diagonals.sum((-2, -1), dtype=torch.promote_types(x.dtype, torch.float32)).to(weight.dtype).unsqueeze(1)


depthwise_weight_gradient = add_kernel(
    "depthwise to weight",
    weight_gradient_reference,
    Implementation("tiles", weight_gradient_by_tiles),
    Implementation("triton", triton_launch.launch_depthwise_to_weight, triton_launch.supports_depthwise_gradient),
)


class DepthwiseBackward(Operator, name="depthwise_backward"):
    """Gradients of x and of the weight, each empty where it is not needed."""

    @staticmethod
    def forward(
        gradient: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
    ) -> tuple[Tensor, Tensor]:
        to_x, to_weight = x.new_empty(0), weight.new_empty(0)
        if needs_x:
            to_x = depthwise_input_gradient(gradient, x, weight).contiguous(memory_format=memory_layout(x))
        if needs_weight:
            to_weight = depthwise_weight_gradient(gradient, x, weight).contiguous()
        return to_x, to_weight

    @staticmethod
    def fake(gradient: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
        to_x = torch.empty_like(x, memory_format=memory_layout(x)) if needs_x else x.new_empty(0)
        return to_x, weight.new_empty(weight.shape if needs_weight else 0)


class Depthwise(Operator, name="depthwise"):
    """The convolution, in the layout that torch's has."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return lay_out(depthwise_forward(x, weight, bias), output_layout(x, weight))

    @staticmethod
    def fake(x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return torch.empty_like(x, memory_format=output_layout(x, weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        to_x, to_weight = DepthwiseBackward.apply(gradient, x, weight, needs_x, needs_weight)
        to_bias = gradient.sum((0, 2, 3)) if needs_bias else None
        return to_x if needs_x else None, to_weight if needs_weight else None, to_bias


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel with a k × k filter of its own, k odd, stride 1, zero padding: y_c = W_c ∗ x_c + b_c.

    torch's gradient of the weight costs about ten times the forward pass on a CPU. Here both gradients are chosen by
    measurement: that of the input between torch's and a convolution with the rotated filter, that of the weight between
    torch's and a matrix product per channel over tiles; on a GPU all three may be computed by Triton.

    Shapes: x (N, C, H, W), weight (C, 1, k, k), bias (C,) → (N, C, H, W). First derivatives only; second derivatives
    exist under `off()`.

    Raises:
        SkipwayError: k is even, or the weight is not depthwise for x.

    >>> depthwise(torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3))[0, 0]
    tensor([[4., 6., 4.],
            [6., 9., 6.],
            [4., 6., 4.]])
    """
    rows, columns = weight.shape[-2:]
    if rows != columns or rows % 2 == 0 or weight.shape[:2] != (x.shape[1], 1):
        raise SkipwayError(f"weight of shape {tuple(weight.shape)}: the rule is ({x.shape[1]}, 1, k, k) with k odd")
    x, weight, bias = to_autocast(x, weight, bias)  # type: ignore[assignment]
    return Depthwise.apply(x, weight, bias) if enabled() and x.numel() else depthwise_reference(x, weight, bias)
