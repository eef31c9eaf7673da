"""Depthwise k × k convolutions and both of their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.kernels import triton
from skipway.kernels.autotune import Way, enabled, kernel
from skipway.kernels.cast import lowered

__all__ = ["depthwise"]

TILE = 7
"""Side of the pieces of a map between which a weight's gradient is taken as a matrix product."""


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


def rearranged(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the layout that x does not have: a map of one layout may be much slower than a copy and the other."""
    other = torch.contiguous_format if channels_last(x) else torch.channels_last
    return plain(x.contiguous(memory_format=other), weight, bias).contiguous(memory_format=layout(x))


def channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def layout(x: Tensor) -> torch.memory_format:
    """That of x; planes where it lies in neither of the two."""
    return torch.channels_last if channels_last(x) else torch.contiguous_format


forward = kernel(
    "depthwise",
    plain,
    Way("other layout", rearranged),
    Way("triton", triton.depthwise, triton.serves_depthwise),
)


def to_input_plain(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return gradients(gradient, x, weight, (True, False, False))[0]


def to_input_flipped(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The transpose of a depthwise convolution is one with the kernel turned by half a turn."""
    return plain(gradient, weight.flip(-2, -1), None)


to_input = kernel(
    "depthwise to input",
    to_input_plain,
    Way("flipped", to_input_flipped),
    Way("triton", triton.depthwise_to_input, triton.serves_gradient),
)


def to_weight_plain(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return gradients(gradient, x, weight, (False, True, False))[1]


def gradients(gradient: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
    half = weight.shape[-1] // 2
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, [0], [1, 1], [half, half], [1, 1], False, [0, 0], x.shape[1], wanted
    )


def to_weight_tiled(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dW_ij = Σ g_t x_{t+(i, j)} from the products of all pairs in a tile: one matrix product per channel.

    The map is cut into tiles of T × T gradients, each with the (T + k − 1)² inputs around it. Summed over tiles and
    images, P[t, s] = Σ g_t x_s is a product of matrices for each channel, at the rate of matrix products; dW_ij is the
    sum of P over the pairs with s − t = (i, j). Of k² T² pairs that count, (T + k − 1)² T² are computed.
    """
    side, channels = weight.shape[-1], x.shape[1]
    half, span = side // 2, TILE + side - 1
    height, width = x.shape[-2:]
    below, right = -height % TILE, -width % TILE
    around = F.pad(x.contiguous(), (half, half + right, half, half + below))
    inside = F.pad(gradient.contiguous(), (0, right, 0, below)) if below or right else gradient.contiguous()
    near = around.unfold(2, span, TILE).unfold(3, span, TILE).movedim(1, 0).reshape(channels, -1, span * span)
    own = inside.unfold(2, TILE, TILE).unfold(3, TILE, TILE).movedim(1, 0).reshape(channels, -1, TILE * TILE)
    pairs = torch.bmm(own.mT, near)
    down, across = span * span * TILE + span, span * span + 1  # one step of t, with s one step further
    diagonals = pairs.as_strided(
        (channels, side, side, TILE, TILE), (TILE**2 * span**2, span, 1, down, across), pairs.storage_offset()
    )
    return diagonals.sum((-2, -1), dtype=torch.promote_types(x.dtype, torch.float32)).to(weight.dtype).unsqueeze(1)


to_weight = kernel(
    "depthwise to weight",
    to_weight_plain,
    Way("tiles", to_weight_tiled),
    Way("triton", triton.depthwise_to_weight, triton.serves_gradient),
)


@torch.library.custom_op("skipway::depthwise", mutates_args=())
def operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return forward(x, weight, bias).contiguous(memory_format=layout(x))


@operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Any) -> Tensor:
    return torch.empty_like(x, memory_format=layout(x))


@torch.library.custom_op("skipway::depthwise_backward", mutates_args=())
def backward_operator(gradient: Tensor, x: Tensor, weight: Tensor, passes: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x (empty where none passes) and of the weight."""
    found = to_input(gradient, x, weight).contiguous(memory_format=layout(x)) if passes else x.new_empty(0)
    return found, to_weight(gradient, x, weight).contiguous()


@backward_operator.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, passes: bool) -> tuple[Tensor, Tensor]:
    found = torch.empty_like(x, memory_format=layout(x)) if passes else x.new_empty(0)
    return found, weight.new_empty(weight.shape)


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.biased = bias is not None


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    passes = ctx.needs_input_grad[0]
    found, to_own = backward_operator(gradient, x, weight, passes)
    return found if passes else None, to_own, gradient.sum((0, 2, 3)) if ctx.biased else None


operator.register_autograd(backward, setup_context=keep)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A depthwise convolution with odd side k, stride 1 and zeros around: y_c = W_c ∗ x_c + b_c.

    torch's gradient of the weight costs about ten times the forward pass on a CPU. Here both gradients are chosen by
    measurement: of the input among torch's own and the convolution with the kernel turned round, of the weight among
    torch's own and a matrix product per channel over tiles; on a GPU all three by Triton as well.

    Shapes: x (N, C, H, W), weight (C, 1, k, k), bias (C,) → (N, C, H, W). First derivatives only; second ones exist
    under `off()`.

    Raises:
        SkipwayError: an even side, or a weight that is not depthwise for x.

    >>> depthwise(torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3))[0, 0]
    tensor([[4., 6., 4.],
            [6., 9., 6.],
            [4., 6., 4.]])
    """
    rows, columns = weight.shape[-2:]
    if rows != columns or rows % 2 == 0 or weight.shape[:2] != (x.shape[1], 1):
        raise SkipwayError(f"weight of shape {tuple(weight.shape)}: the rule is ({x.shape[1]}, 1, k, k) with k odd")
    x, weight, bias = lowered(x, weight, bias)  # type: ignore[assignment]
    return operator(x, weight, bias) if enabled() and x.numel() else plain(x, weight, bias)
