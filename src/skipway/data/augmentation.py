"""Random crops and flips of whole batches, from numbers drawn beforehand for every image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from skipway.data.decoding import Box, Chooser

__all__ = ["DRAWS", "Augmentation", "crop_and_flip", "random_box"]

# columns of the drawn numbers, one row per image: two for where the crop begins, one for the flip, two for its shape
DRAWS = 5
TOP, LEFT, FLIP, AREA, ASPECT = range(DRAWS)

# share of the area and width / height of a random crop that is scaled back (Szegedy 2014, section 6). The smallest
# share is 0.35, as fastai trains Imagenette, rather than 0.08: it suits short runs on folders of modest size.
SMALLEST_AREA = 0.35
WIDEST_ASPECT = 4 / 3


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are varied.

    Args:
        crop: "pad": shift by up to `pad` pixels each way, filling with the mean colour (He 2015, section 4.2);
            "resized": cut out a random part and scale it to the input size; "none": the image as it is.
        pad: pixels of padding for "pad".
        flip: mirror each image left to right with probability 1/2.
    """

    crop: Literal["pad", "resized", "none"] = "none"
    pad: int = 0
    flip: bool = False


def crop_and_flip(images: Tensor, draws: Tensor, fill: Tensor, *, pad: int, flip: bool) -> Tensor:
    """Shift and mirror a batch; shapes (N, H, W, C) with draws (N, DRAWS) and fill (C,) -> (N, H, W, C).

    Image n starts floor(draw * (2 pad + 1)) - pad pixels further down and further right, both uniform in [-pad, pad].

    >>> images = torch.arange(4).reshape(1, 1, 4, 1)
    >>> mirror = torch.tensor([[0.0, 0.0, 0.9, 0.0, 0.0]])
    >>> crop_and_flip(images, mirror, torch.zeros(1), pad=0, flip=True).flatten().tolist()
    [3, 2, 1, 0]
    """
    if not pad and not flip:
        return images
    count, height, width, _ = images.shape
    down, right = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    columns = right.expand(count, width)
    if flip:
        columns = torch.where(draws[:, FLIP, None] >= 0.5, right.flip(0), columns)
    top = (draws[:, TOP] * (2 * pad + 1)).long().clamp(max=2 * pad)
    left = (draws[:, LEFT] * (2 * pad + 1)).long().clamp(max=2 * pad)
    rows = top[:, None] + down
    columns = left[:, None] + columns
    padded = fill.to(images.dtype).expand(count, height + 2 * pad, width + 2 * pad, -1).clone()
    padded[:, pad : pad + height, pad : pad + width] = images
    return padded[torch.arange(count, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def random_box(draws: Tensor) -> Chooser:
    """A chooser of a random part: area share uniform in [0.35, 1], log aspect uniform in ±log(4/3), place uniform.

    A part that would stick out is cut to the image's own width or height. One draw per image, never a retry, so that
    the part depends on the image's numbers alone.
    """
    top, left, _, area, aspect = draws.tolist()

    def choose(width: int, height: int) -> Box:
        pixels = (SMALLEST_AREA + (1 - SMALLEST_AREA) * area) * width * height
        ratio = math.exp((2 * aspect - 1) * math.log(WIDEST_ASPECT))
        wide = min(math.sqrt(pixels * ratio), width)
        high = min(math.sqrt(pixels / ratio), height)
        x, y = left * (width - wide), top * (height - high)
        return x, y, x + wide, y + high

    return choose
