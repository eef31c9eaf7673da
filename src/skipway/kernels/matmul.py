"""Linear maps through oneDNN where it is faster than torch's own library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skipway.kernels.autotune import Implementation, Packed, add_kernel, enabled
from skipway.kernels.cast import to_autocast
from skipway.kernels.onednn import supports_onednn_matmul, with_onednn_matmul
from skipway.kernels.operator import Operator

__all__ = [
    "PackedWeight",
    "is_large_linear",
    "linear",
    "linear_by_onednn",
    "pack_weight",
    "packed_linear",
]

SMALL = 1 << 22
"""Multiplications below which a map is left to torch: the operator's own overhead (some 20 µs) would be felt."""


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x Wᵀ + b by the operator that inductor emits, which uses oneDNN throughout; takes packed weights too."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear_by_onednn_unpacked(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same for a weight in any layout."""
    return linear_by_onednn(x, weight.contiguous(), bias)


def supports_onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether oneDNN's linear map can be used: in float32 on a CPU, in a torch that has it."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


linear_forward = add_kernel(
    "linear", F.linear, Implementation("onednn", linear_by_onednn_unpacked, supports_onednn_linear)
)
"""x Wᵀ + b without gradients (see `linear`)."""


@dataclass(frozen=True, eq=False)
class PackedWeight(Packed):
    """A weight in oneDNN's order for products, None where there is no such order."""

    weight: Tensor | None


def pack_weight(weight: Tensor, rows: int) -> Tensor | None:
    """Return a weight reordered for products with `rows` rows; None where this torch or processor has no such order."""
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None


packed_linear = add_kernel(
    "packed linear",
    lambda x, weight, bias, pack: F.linear(x, weight, bias),
    Implementation("packed", lambda x, weight, bias, pack: linear_by_onednn(x, pack.weight, bias)),
)
"""x Wᵀ + b with a packed weight beside the plain one, without gradients."""


def linear_weight_reference(gradient: Tensor, x: Tensor) -> Tensor:
    """Return dW = gᵀ x."""
    return gradient.t() @ x


linear_weight_gradient = add_kernel(
    "linear to weight",
    linear_weight_reference,
    Implementation("onednn", with_onednn_matmul(linear_weight_reference), supports_onednn_matmul),
)


class LinearWeight(Operator, name="linear_weight"):
    """Gradient of a linear map's weight, differentiable once more."""

    @staticmethod
    def forward(gradient: Tensor, x: Tensor) -> Tensor:
        return linear_weight_gradient(gradient, x).contiguous()

    @staticmethod
    def fake(gradient: Tensor, x: Tensor) -> Tensor:
        return x.new_empty(gradient.shape[1], x.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> tuple[Tensor, Tensor]:
        gradient, x = ctx.saved_tensors
        return LinearOperator.apply(x, second, None), LinearOperator.apply(gradient, second.t().contiguous(), None)


class LinearOperator(Operator, name="linear"):
    """x Wᵀ + b."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # as rows, whose number counts up to a factor of two: sequences of every length would be measured anew
        return linear_forward(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = LinearOperator.apply(gradient, weight.t().contiguous(), None)
        if ctx.needs_input_grad[1]:
            to_weight = LinearWeight.apply(gradient.flatten(0, -2), x.flatten(0, -2))
        if ctx.has_bias and ctx.needs_input_grad[2]:
            to_bias = gradient.flatten(0, -2).sum(0)
        return to_x, to_weight, to_bias


def is_large_linear(x: Tensor, weight: Tensor) -> bool:
    """Return whether a kernel may pay for a linear map: large, in float32, on the CPU, kernels switched on."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.ndim >= 2
        and x.numel() * weight.shape[0] >= SMALL
        and enabled()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute y = x Wᵀ + b, as `torch.nn.functional.linear` does.

    On the CPU torch computes float32 products with the BLAS that it was built with, in its wheels MKL, which on AMD
    processors is slower than oneDNN at many sizes (`benchmarks/speed.py` measures both). Convolutions and bfloat16
    products go through oneDNN already.

    Shapes: x (…, in), weight (out, in), bias (out,) → (…, out). First and second derivatives exist.

    >>> linear(torch.ones(2, 3), torch.ones(4, 3)).shape
    torch.Size([2, 4])
    """
    x, weight, bias = to_autocast(x, weight, bias)  # type: ignore[assignment]
    return LinearOperator.apply(x, weight, bias) if is_large_linear(x, weight) else F.linear(x, weight, bias)
