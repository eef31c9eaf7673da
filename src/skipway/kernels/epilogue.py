"""Products of inference in one pass with what follows them: an activation, or another tensor that is added."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skipway.kernels.autotune import Implementation, Packed, add_kernel
from skipway.kernels.matmul import PackedWeight, pack_weight
from skipway.kernels.native import (
    has_native_gelu,
    native_depthwise,
    native_gelu_,
    takes_depthwise,
)

__all__ = [
    "Activation",
    "Epilogue",
    "Geometry",
    "PackedPatches",
    "pack_convolution",
    "pack_linear",
    "patches_in_one",
    "patches_in_place",
    "product_of_linear",
    "product_of_patches",
]


@dataclass(frozen=True)
class Activation:
    """An activation that oneDNN computes within a product.

    Args:
        name: oneDNN's.
        scalars: its numbers: the bounds of "hardtanh", the slope of "leaky_relu".
        algorithm: of "gelu": "none" or "tanh".
    """

    name: str
    scalars: tuple[float, ...] = ()
    algorithm: str = ""

    def __call__(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name](x, *self.scalars, *[self.algorithm] * bool(self.algorithm))

    @property
    def attributes(self) -> tuple[str, list[float], str]:
        """What torch's fused operators take."""
        return self.name, list(self.scalars), self.algorithm


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "swish": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "gelu": lambda x, algorithm: F.gelu(x, approximate=algorithm),
}
"""Activations in torch, by oneDNN's names."""
GELU, RELU = Activation("gelu", (), "none"), Activation("relu")
JOINED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"add": torch.add, "mul": torch.mul}


@dataclass(frozen=True)
class Epilogue:
    """What follows a product y: activation(y joined with another tensor).

    Args:
        joined: how another tensor of y's shape is joined, "add" or "mul"; None where there is none.
        activation: None for the identity.
    """

    joined: str | None = None
    activation: Activation | None = None

    def __call__(self, y: Tensor, other: Tensor | None) -> Tensor:
        if self.joined is not None:
            y = JOINED[self.joined](y, other)  # type: ignore[arg-type]
        return y if self.activation is None else self.activation(y)


@dataclass(frozen=True)
class Geometry:
    """Stride, padding and dilation of a convolution along its axes, and its groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def attributes(self) -> tuple[list[int], list[int], list[int], int]:
        """What torch's fused operators take."""
        return list(self.padding), list(self.stride), list(self.dilation), self.groups


@dataclass(frozen=True, eq=False)
class PackedPatches(Packed):
    """A kernel of a convolution in oneDNN's orders.

    Args:
        weight: for convolutions; None where there is no such order.
        rows: of a kernel of 1 × 1, for products with the pixels of a map in channels-last; None of another.
    """

    weight: Tensor | None = None
    rows: Tensor | None = None


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, epilogue: Epilogue, packed: PackedWeight
) -> Tensor:
    """The operators one after the other."""
    return epilogue(F.linear(x, weight, bias), other)


def linear_in_one(
    x: Tensor, weight: Any, bias: Tensor | None, other: Tensor | None, epilogue: Epilogue, packed: PackedWeight
) -> Tensor:
    """One of oneDNN's operators."""
    operator = torch.ops.mkldnn._linear_pointwise
    if epilogue.joined is not None:
        return operator.binary(x, other, packed.weight, bias, epilogue.joined)
    return operator(x, packed.weight, bias, *attributes_of(epilogue))


def linear_then_gelu(
    x: Tensor, weight: Any, bias: Tensor | None, other: Tensor | None, epilogue: Epilogue, packed: PackedWeight
) -> Tensor:
    """oneDNN's product, then GELU in place by a coarser and quicker function than oneDNN's."""
    return native_gelu_(torch.ops.mkldnn._linear_pointwise(x, packed.weight, bias, "none", [], ""))


def ends_in_gelu(
    x: Tensor, weight: Any, bias: Tensor | None, other: Tensor | None, epilogue: Epilogue, packed: PackedWeight
) -> bool:
    """Whether GELU, and that alone, follows a product in bfloat16."""
    return packed.weight is not None and epilogue == Epilogue(None, GELU) and has_native_gelu(x)


def attributes_of(epilogue: Epilogue) -> tuple[str, list[float], str]:
    """An epilogue's activation as torch's fused operators take it."""
    return ("none", [], "") if epilogue.activation is None else epilogue.activation.attributes


def fits_linear(*arguments: Any) -> bool:
    """Whether oneDNN has the product: it joins a tensor or computes an activation, not both."""
    epilogue, packed = arguments[-2:]
    return packed.weight is not None and (epilogue.joined is None or epilogue.activation is None)


product_of_linear = add_kernel(
    "linear with epilogue",
    linear_reference,
    Implementation("onednn", linear_in_one, fits_linear),
    Implementation("gelu", linear_then_gelu, ends_in_gelu),
)
"""activation(x Wᵀ + b, joined with another tensor), without gradients."""


def patches_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    epilogue: Epilogue,
    geometry: Geometry,
    packed: PackedPatches,
) -> Tensor:
    """The operators one after the other."""
    steps = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    return epilogue(F.conv2d(x, weight, bias, *steps), other)  # type: ignore[arg-type]


def patches_in_one(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    other: Tensor | None,
    epilogue: Epilogue,
    geometry: Geometry,
    packed: PackedPatches,
) -> Tensor:
    """One of oneDNN's operators."""
    operator, given = torch.ops.mkldnn._convolution_pointwise, (packed.weight, bias, *geometry.attributes)
    if epilogue.joined is None:
        return operator(x, *given, *attributes_of(epilogue))
    unary = (None, [], None) if epilogue.activation is None else epilogue.activation.attributes
    return operator.binary(x, other, *given, epilogue.joined, 1.0, *unary)


def patches_in_place(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    other: Tensor,
    epilogue: Epilogue,
    geometry: Geometry,
    packed: PackedPatches,
) -> Tensor:
    """`patches_in_one` where another tensor is added that nobody needs afterwards: the result is written over it."""
    unary = (None, [], None) if epilogue.activation is None else epilogue.activation.attributes
    operator = torch.ops.mkldnn._convolution_pointwise_
    return operator.binary(other, x, packed.weight, bias, *geometry.attributes, epilogue.joined, 1.0, *unary)


def fits_patches(*arguments: Any) -> bool:
    """Whether oneDNN has the convolution: of activations after a tensor that it joins, torch offers ReLU alone."""
    epilogue, _, packed = arguments[-3:]
    return packed.weight is not None and (epilogue.joined is None or epilogue.activation in (None, RELU))


def pixel_by_pixel(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    other: Tensor | None,
    epilogue: Epilogue,
    geometry: Geometry,
    packed: PackedPatches,
) -> Tensor:
    """A convolution of 1 × 1 as a linear map of the pixels."""
    rows = PackedWeight(packed.rows)
    return linear_in_one(x.permute(0, 2, 3, 1), weight, bias, None, epilogue, rows).permute(0, 3, 1, 2)


def fits_pixels(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    other: Tensor | None,
    epilogue: Epilogue,
    geometry: Geometry,
    packed: PackedPatches,
) -> bool:
    """Whether a convolution is a linear map of the pixels of a map in channels-last, to which nothing is added."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return packed.rows is not None and last and epilogue.joined is None


def channel_by_channel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    epilogue: Epilogue,
    geometry: Geometry,
    packed: PackedPatches,
) -> Tensor:
    """Our depthwise convolution."""
    return native_depthwise(x, weight, bias)


def fits_depthwise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    epilogue: Epilogue,
    geometry: Geometry,
    packed: PackedPatches,
) -> bool:
    """Whether our depthwise convolution computes it: nothing follows."""
    plain = epilogue == Epilogue() and geometry.groups == x.shape[1] and set(geometry.dilation) == {1}
    return plain and takes_depthwise(x, weight, bias, geometry.stride, geometry.padding)


product_of_patches = add_kernel(
    "convolution with epilogue",
    patches_reference,
    Implementation("onednn", patches_in_one, fits_patches),
    Implementation("pixels", pixel_by_pixel, fits_pixels),
    Implementation("native", channel_by_channel, fits_depthwise),
)
"""activation(convolution of x, joined with another tensor), without gradients."""


def pack_linear(weight: Tensor, rows: int) -> PackedWeight:
    """A weight in oneDNN's order; in none where it has no such order."""
    return PackedWeight(pack_weight(weight, rows))


def pack_convolution(weight: Tensor, geometry: Geometry, size: torch.Size) -> PackedPatches:
    """A kernel in oneDNN's orders for images of a size (N, C, H, W)."""
    padding, stride, dilation, groups = geometry.attributes
    try:
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(size))
    except (AttributeError, NotImplementedError, RuntimeError):
        packed = None
    pointwise = weight.shape[2:] == (1, 1) and groups == 1 and set(stride) == {1} and set(padding) == {0}
    rows = pack_weight(weight.flatten(1), size.numel() // size[1]) if pointwise else None
    return PackedPatches(packed, rows)
