"""Operators of a fused graph, each computed by the fastest implementation of its kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skipway.kernels.autotune import REFERENCE, Implementation, Kernel
from skipway.kernels.epilogue import Epilogue, PackedPatches, patches_in_place, product_of_patches
from skipway.kernels.layer_norm import layer_norm
from skipway.kernels.matmul import PackedWeight
from skipway.kernels.max_pool import max_pool
from skipway.kernels.sdpa import attention_forward

__all__ = ["FusedAttention", "FusedNorm", "FusedPool", "FusedProduct", "Measured"]


IN_PLACE = Implementation("in place", patches_in_place)
"""A convolution that writes over what it adds; no kernel's, since a measurement would change its own input."""


class Measured(nn.Module):
    """An operator that is computed by the fastest implementation of a kernel, chosen in its first call.

    Args:
        kernel: the kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel
        self.chosen: Implementation | None = None

    def call(self, *arguments: Any) -> Any:
        """Call the kernel's fastest implementation."""
        if self.chosen is None:
            self.chosen = self.kernel.select(*arguments)
        return self.chosen.compute(*arguments)


class FusedProduct(Measured):
    """A linear map or convolution with its epilogue.

    Args:
        kernel: `product_of_linear` or `product_of_patches`.
        weight: of the product, (outputs, ...).
        bias: of the product, or None.
        pack: brings a weight into oneDNN's order.
        details: what the kernel takes between the epilogue and the packed weight.

    `overwrites` says that nobody needs the tensor that it adds afterwards.
    """

    def __init__(
        self,
        kernel: Kernel,
        weight: Tensor,
        bias: Tensor | None,
        pack: Callable[[Tensor], PackedWeight | PackedPatches],
        *details: Any,
    ) -> None:
        super().__init__(kernel)
        self.weight: Tensor | None = weight
        self.bias, self.details, self.pack = bias, details, pack
        self.packed: PackedWeight | PackedPatches = PackedWeight(None)
        self.epilogue = Epilogue()
        self.overwrites = False

    @property
    def of_patches(self) -> bool:
        """Whether it is a convolution, whose channels are the second axis; those of a linear map are the last."""
        return self.kernel is product_of_patches

    def scale_outputs(self, scale: Tensor | None, shift: Tensor | None) -> None:
        """Let the product compute what a factor and a summand for each of its outputs follow."""
        assert self.weight is not None
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        weight, bias, scale, shift = (
            None if each is None else each.detach().to(wide) for each in (self.weight, self.bias, scale, shift)
        )
        if scale is not None:
            weight = weight * scale.view(-1, *(1,) * (weight.ndim - 1))  # type: ignore[union-attr]
            bias = None if bias is None else bias * scale
        if shift is not None:
            bias = shift if bias is None else bias + shift
        dtype = self.weight.dtype
        self.weight = nn.Parameter(weight.to(self.weight), requires_grad=False)  # type: ignore[union-attr]
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype).contiguous(), requires_grad=False)

    def settle(self) -> None:
        """Release the weight in the orders that the chosen implementation does not read, and let a convolution write
        over what it adds where it may.
        """
        assert self.chosen is not None
        chosen = self.chosen.name
        if isinstance(self.packed, PackedPatches):
            kept = {"onednn": PackedPatches(self.packed.weight), "pixels": PackedPatches(rows=self.packed.rows)}
            self.packed = kept.get(chosen, PackedPatches())
        elif chosen == REFERENCE:
            self.packed = PackedWeight(None)
        if chosen not in (REFERENCE, "native"):
            self.weight = None
        if self.overwrites and chosen == "onednn":
            self.chosen = IN_PLACE

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if self.chosen is None:
            assert self.weight is not None
            self.packed = self.pack(self.weight.detach())
        return self.call(x, self.weight, self.bias, other, self.epilogue, *self.details, self.packed)


class FusedNorm(Measured):
    """Layer norm over the last axis."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        super().__init__(layer_norm)
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight, self.bias, self.eps)


class FusedPool(Measured):
    """Max-pooling over square windows."""

    def __init__(self, side: int, stride: int, padding: int) -> None:
        super().__init__(max_pool)
        self.sizes = side, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, *self.sizes)


class FusedAttention(Measured):
    """softmax(q kᵀ / √d + B) v; B (W, heads or 1, T, S) holds for image n the bias n modulo W."""

    def __init__(self, bias: Tensor | None, causal: bool) -> None:
        super().__init__(attention_forward)
        self.bias, self.causal = bias, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.call(q, k, v, self.bias, self.causal, False)[0]
