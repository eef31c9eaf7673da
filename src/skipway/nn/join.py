"""Joins that see both the skip and the branch, in place of the addition."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from skipway.nn.streams import as_float32

__all__ = ["OrthogonalSum"]


class OrthogonalSum(nn.Module):
    """y = x + f - x ⟨x, f⟩ / (|x|² + ε): only what is orthogonal to x is added, so |y|² = |x|² + |f⊥|² up to ε.

    Args:
        spatial: axes after the channel axis: 2 for (N, C, H, W), 0 for (N, T, C).
        over: "feature" takes the product over the channels of each token or pixel, "sample" over the whole sample.
        eps: ε.

    Shapes: (N, …), (N, …) → (N, …).

    >>> import torch
    >>> OrthogonalSum(spatial=0)(torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0]])).round(decimals=4)
    tensor([[6.2000, 1.6000]])
    """

    def __init__(self, *, spatial: int, over: Literal["feature", "sample"] = "feature", eps: float = 1e-6) -> None:
        super().__init__()
        self.channel, self.over, self.eps = -1 - spatial, over, eps

    def forward(self, skip: Tensor, f: Tensor) -> Tensor:
        x, g = as_float32(skip), as_float32(f)
        axes = (self.channel,) if self.over == "feature" else tuple(range(1, x.ndim))
        share = (x * g).sum(axes, keepdim=True) / (x.square().sum(axes, keepdim=True) + self.eps)
        return skip + (g - share * x).to(f.dtype)

    def extra_repr(self) -> str:
        return f"over={self.over!r}"
