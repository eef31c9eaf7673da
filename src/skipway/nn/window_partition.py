"""Maps as windows and back, and which tokens of a shifted window must not meet: what modules and kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MASK", "shift_mask", "window_partition", "window_reverse"]

MASK = -100.0
"""Added to the attention logits of token pairs that must not attend to each other; the authors use −100, not −∞, and
pretrained weights depend on it."""


def window_partition(x: Tensor, side: int) -> Tensor:
    """The windows of a map of whole windows: (N, H, W, C) → (N, windows, T, C)."""
    windows = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    return windows.flatten(3, 4).flatten(1, 2)


def window_reverse(windows: Tensor, rows: int, side: int) -> Tensor:
    """Back to the map, of that many rows of windows: (N, windows, T, C) → (N, H, W, C)."""
    grid = windows.unflatten(2, (side, side)).unflatten(1, (rows, -1))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def shift_mask(height: int, width: int, side: int, down: int, across: int, device: torch.device) -> Tensor:
    """Mask of the token pairs of a window that come from opposite edges of a map that was shifted: (windows, T, T).

    Behind the shift the tokens that it carried over the edge are the last `down` rows and `across` columns.
    """
    over_top = torch.arange(height, device=device) >= height - down
    over_left = torch.arange(width, device=device) >= width - across
    edge = 2 * over_top[:, None] + over_left
    edge = window_partition(edge[None, :, :, None], side)[0, :, :, 0]
    return edge[:, :, None] != edge[:, None, :]
