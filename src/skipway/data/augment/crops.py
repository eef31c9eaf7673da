"""Random crops and flips of whole batches, from numbers drawn beforehand for every image."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from skipway.data.fit import Box, ChooseBox

__all__ = ["DRAWS", "crop_and_flip", "random_box"]

# columns of the drawn numbers, one row per image: two for where the crop begins, one for the flip, two for its shape
DRAWS = 5
TOP, LEFT, FLIP, AREA, ASPECT = range(DRAWS)

# share of the area and width / height of a random crop that is scaled back (Szegedy 2014, section 6). The smallest
# share is 0.35, as fastai trains Imagenette, rather than 0.08: it suits short runs on folders of modest size.
SMALLEST_AREA = 0.35
WIDEST_ASPECT = 4 / 3


def crop_and_flip(images: Tensor, draws: Tensor, fill: Tensor, *, pad: int, flip: bool) -> Tensor:
    """Shift and mirror a batch; shapes (N, H, W, C) with draws (N, DRAWS) on the CPU and fill (C,) -> (N, H, W, C).

    Image n starts floor(draw * (2 pad + 1)) - pad pixels further down and further right, both uniform in [-pad, pad].

    >>> images = torch.arange(4).reshape(1, 1, 4, 1)
    >>> mirror = torch.tensor([[0.0, 0.0, 0.9, 0.0, 0.0]])
    >>> crop_and_flip(images, mirror, torch.zeros(1), pad=0, flip=True).flatten().tolist()
    [3, 2, 1, 0]
    """
    count, height, width, channels = images.shape
    device = images.device
    if pad:
        top = (draws[:, TOP] * (2 * pad + 1)).long().clamp(max=2 * pad).to(device)
        left = (draws[:, LEFT] * (2 * pad + 1)).long().clamp(max=2 * pad).to(device)
        rows = top[:, None] + torch.arange(height, device=device)
        columns = left[:, None] + torch.arange(width, device=device)
        padded = fill.to(images.dtype).expand(count, height + 2 * pad, width + 2 * pad, -1).clone()
        padded[:, pad : pad + height, pad : pad + width] = images
        # whole rows first: a copy of many bytes each
        chosen = padded[torch.arange(count, device=device)[:, None], rows]
        images = chosen.gather(2, columns[:, None, :, None].expand(count, height, width, channels))
    if flip:
        turned = (draws[:, FLIP] >= 0.5).nonzero()[:, 0].to(device)
        images = images.index_copy(0, turned, images[turned].flip(2))
    return images


def random_box(draws: Tensor | np.ndarray) -> ChooseBox:
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
