"""Squeeze-and-excitation: a gate per channel from the global average."""

from __future__ import annotations

from torch import Tensor, nn

from skipway.nn.maps import Conv2d

__all__ = ["SqueezeExcitation"]


class SqueezeExcitation(nn.Module):
    """y = x ⊙ σ(W₂ relu(W₁ mean(x))), the mean over pixels (Hu et al. 2018, eq. 2-4).

    Args:
        dim: channels C.
        reduction: C / reduction hidden units; 16 in the paper.
        least: but never fewer than this.

    Shapes: (N, C, H, W) → (N, C, H, W).

    >>> import torch
    >>> SqueezeExcitation(32)(torch.zeros(2, 32, 4, 4)).shape
    torch.Size([2, 32, 4, 4])
    """

    def __init__(self, dim: int, reduction: int = 16, least: int = 1) -> None:
        super().__init__()
        hidden = max(dim // reduction, least)
        self.squeeze = Conv2d(dim, hidden, 1, bias=True)
        self.act = nn.ReLU(inplace=True)
        self.excite = Conv2d(hidden, dim, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(self.act(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()
