"""Stochastic depth: whole branches dropped at random, sample by sample, while training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError

__all__ = ["DropPath"]


class DropPath(nn.Module):
    """y = m/(1-p) · x with m ~ Bernoulli(1-p) for each sample while training, y = x in eval (Huang et al. 2016).

    Kept branches are divided by 1-p, so the expectation is the same in both modes.

    Args:
        probability: p, with 0 ≤ p < 1.
        axis: that holds the samples.

    >>> drop = DropPath(0.5)
    >>> sorted(set(drop(torch.ones(100, 3)).flatten().tolist()))
    [0.0, 2.0]
    >>> drop.eval()(torch.ones(2))
    tensor([1., 1.])
    """

    axis: int = 0

    def __init__(self, probability: float, axis: int = 0) -> None:
        super().__init__()
        if not 0.0 <= probability < 1.0:
            raise SkipwayError(f"probability={probability}: the rule is 0 <= p < 1; at 1 nothing would be left")
        self.probability, self.axis = probability, axis

    def mask(self, x: Tensor) -> Tensor | None:
        """The factor of each sample in this pass, m/(1-p) of shape (N, 1, …) for axis 0; None in evaluation mode."""
        if not self.training or self.probability == 0.0:
            return None
        keep = 1.0 - self.probability
        shape = [1] * x.ndim
        shape[self.axis] = x.shape[self.axis]
        mask = torch.empty(shape, dtype=x.dtype, device=x.device)
        return mask.bernoulli_(keep).div_(keep)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(x)
        return x if mask is None else x * mask

    def extra_repr(self) -> str:
        return f"{self.probability:g}" + (f", axis={self.axis}" if self.axis else "")
