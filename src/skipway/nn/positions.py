"""Position tables, and what to do with one at another image size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["resample"]


def resample(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 0) -> Tensor:
    """A position table for another grid: bicubic with anti-aliasing, the rows of the prefix tokens untouched.

    Args:
        table: of shape (prefix + old[0] · old[1], dim).
        old: rows and columns of the grid that the table was learned on.
        new: those of the grid that it is wanted for.
        prefix: rows in front that belong to no place (class token).

    Shapes: → (prefix + new[0] · new[1], dim).

    >>> resample(torch.ones(1 + 4, 8), (2, 2), (3, 5), prefix=1).shape
    torch.Size([16, 8])
    """
    if old == new:
        return table
    front, grid = table[:prefix], table[prefix:]
    image = grid.unflatten(0, old).permute(2, 0, 1).unsqueeze(0).float()
    image = F.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    grid = image.squeeze(0).flatten(1).transpose(0, 1).to(table.dtype)
    return torch.cat((front, grid))
