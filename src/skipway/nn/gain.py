"""Learned gains and biases, scalar or per channel, and constant factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipway.nn.role import BranchFactors, Role

__all__ = ["Bias", "Gain", "Multiply"]


class Gain(nn.Module):
    """y = c · g ⊙ x, with g learned: one number (`dim=None`), or one per channel.

    Args:
        dim: channels C, or None for a scalar; the parameter has shape (C,) or ().
        init: value g starts at; 0.0 is a value.
        spatial: axes after the channel axis: 2 for (N, C, H, W), 0 for (N, T, C).
        factor: the constant c.
        role: how an optimizer treats g; by default no weight decay and the full learning rate.

    >>> Gain(3, init=0.1, spatial=2)(torch.ones(1, 3, 1, 1)).flatten()
    tensor([0.1000, 0.1000, 0.1000], grad_fn=...)
    """

    def __init__(
        self,
        dim: int | None = None,
        *,
        init: float = 1.0,
        spatial: int = 2,
        factor: float = 1.0,
        role: Role = Role("gain"),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.init, self.factor, self.role = init, factor, role
        self.shape = () if dim is None else (dim, *(1,) * spatial)
        self.gain = nn.Parameter(torch.full(self.shape[:1], float(init)))

    def reset_parameters(self) -> None:
        """Back to `init`, not to one."""
        nn.init.constant_(self.gain, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.factor * self.gain).view(self.shape)

    def extra_repr(self) -> str:
        factor = "" if self.factor == 1.0 else f", factor={self.factor:g}"
        return f"{tuple(self.gain.shape)}, init={self.init:g}{factor}"


class Bias(nn.Module):
    """y = x + b, with b one learned number that starts at 0.

    >>> Bias()(torch.zeros(2))
    tensor([0., 0.], grad_fn=...)
    """

    def __init__(self, *, role: Role = Role("bias")) -> None:  # noqa: B008 - frozen
        super().__init__()
        self.role = role
        self.bias = nn.Parameter(torch.zeros(()))

    def reset_parameters(self) -> None:
        """Back to zero."""
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Multiply(nn.Module):
    """y = c · x, with c a constant.

    Args:
        factor: c.
        branch_factors: what c at the end of a branch asks an optimizer to do with the parameters of that branch, which
            `skipway.param_groups` does; None for nothing.

    >>> Multiply(0.5)(torch.ones(2))
    tensor([0.5000, 0.5000])
    """

    def __init__(self, factor: float, *, branch_factors: BranchFactors | None = None) -> None:
        super().__init__()
        self.factor, self.branch_factors = factor, branch_factors

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def extra_repr(self) -> str:
        return f"{self.factor:g}"
