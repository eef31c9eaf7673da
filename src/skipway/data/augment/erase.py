"""A rectangle of the image painted over: random erasing (Zhong et al. 2020, arXiv 1708.04896)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ERASING_DRAWS", "erase_rectangles"]

# columns of the drawn numbers: whether, how large, of which shape, where
ERASING_DRAWS = 5
WHETHER, AREA, ASPECT, TOP, LEFT = range(ERASING_DRAWS)

# section 4.1 of the paper: share of the area between 0.02 and 0.4, height / width between 0.3 and 1 / 0.3
AREAS = (0.02, 0.4)
WIDEST_ASPECT = 1 / 0.3


def erase_rectangles(images: Tensor, draws: Tensor, fill: Tensor, probability: float) -> Tensor:
    """Images (N, H, W, C) of which each has, with `probability`, a rectangle in the colour `fill` (C,).

    The paper draws a rectangle again until it fits; here one that would stick out is cut to the image's own height or
    width, so that one row of `draws` (N, ERASING_DRAWS) on the CPU decides. The colour is the paper's variant RE-M.

    >>> draws = torch.tensor([[0.1, 1.0, 0.5, 0.0, 0.0]])
    >>> int((erase_rectangles(torch.ones(1, 10, 10, 1), draws, torch.zeros(1), 0.5) == 0).sum())
    36
    """
    _, height, width, _ = images.shape
    area = (AREAS[0] + (AREAS[1] - AREAS[0]) * draws[:, AREA]) * height * width
    aspect = ((2 * draws[:, ASPECT] - 1) * math.log(WIDEST_ASPECT)).exp()
    high = (area * aspect).sqrt().round().clamp(1, height)
    wide = (area / aspect).sqrt().round().clamp(1, width)
    chosen = draws[:, WHETHER] < probability
    # a rectangle of no height erases nothing
    high = high * chosen
    top = (draws[:, TOP] * (height - high + 1)).floor()
    left = (draws[:, LEFT] * (width - wide + 1)).floor()
    inside = rectangles(top, left, high, wide, height, width).to(images.device)
    return torch.where(inside[..., None], fill.to(images.dtype), images)


def rectangles(top: Tensor, left: Tensor, high: Tensor, wide: Tensor, height: int, width: int) -> Tensor:
    """Masks (N, height, width), true within N rectangles.

    >>> one = torch.ones(1)
    >>> rectangles(one * 0, one, one, one, 2, 3).int().tolist()
    [[[0, 1, 0], [0, 0, 0]]]
    """
    down, right = torch.arange(height), torch.arange(width)
    rows = (down >= top[:, None]) & (down < (top + high)[:, None])
    columns = (right >= left[:, None]) & (right < (left + wide)[:, None])
    return rows[:, :, None] & columns[:, None, :]
