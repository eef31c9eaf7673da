"""How a rectangular image becomes a square input: which part is taken, and whether it is cropped, padded or squeezed.

| fit | the square that crops are taken from |
|---|---|
| `crop` | the image itself; in evaluation its central square |
| `pad` | the whole image, centred on grey (128) with its longer side as the square's |
| `squeeze` | the whole image, scaled to a square by different factors along its sides |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from PIL import Image

__all__ = [
    *("FITS", "RESAMPLES", "Box", "ChooseBox", "Fit", "Resample"),
    *("central_share", "evaluation_share", "fit_square", "kept_size"),
]

Fit = Literal["crop", "pad", "squeeze"]
FITS = get_args(Fit)
Resample = Literal["bicubic", "bilinear"]
RESAMPLES = get_args(Resample)
Box = tuple[float, float, float, float]
ChooseBox = Callable[[int, int], Box]

PAD_VALUE = 128
# He 2015 and torchvision test on the central 224 of a shorter side of 256 after training on random crops
TEST_SHARE = 224 / 256


def evaluation_share(crop: str, fit: Fit) -> float:
    """Side of the central crop in evaluation over the shorter side: all of it where the whole image is to be seen."""
    return TEST_SHARE if crop == "resized" and fit == "crop" else 1.0


def central_share(share: float) -> ChooseBox:
    """The crop to the central square whose side is `share` times the shorter side.

    >>> central_share(1.0)(40, 20)
    (10.0, 0.0, 30.0, 20.0)
    """

    def choose(width: int, height: int) -> Box:
        side = share * min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    return choose


def fit_square(
    image: Image.Image,
    size: int,
    choose: ChooseBox | None = None,
    fit: Fit = "crop",
    resample: Resample = "bicubic",
) -> np.ndarray:
    """Crop and scale to size x size, antialiased; uint8 (size, size) or (size, size, 3).

    Args:
        image: 8 bits, grey or RGB.
        size: side of the result.
        choose: the part to take of the image, or of the square that `fit` makes of it; None: its centre.
        fit: see above.
        resample: the filter; "bilinear" takes two thirds of the time.
    """
    pillow_filter = Image.Resampling[resample.upper()]
    choose = choose or central_share(1.0)
    if fit == "pad" and image.width != image.height:
        return padded(image, size, choose(*[max(image.size)] * 2), pillow_filter)
    if fit == "squeeze":
        side = max(image.size)
        left, top, right, bottom = choose(side, side)
        across, down = image.width / side, image.height / side
        box = (left * across, top * down, right * across, bottom * down)
    else:
        box = choose(image.width, image.height)
    if box != (0, 0, size, size) or image.size != (size, size):
        image = image.resize((size, size), pillow_filter, box=box)
    return np.asarray(image)


def padded(image: Image.Image, size: int, box: Box, resample: Image.Resampling) -> np.ndarray:
    """The part `box` of the square that has the image in its middle, at size x size, without making that square."""
    canvas = Image.new(image.mode, (size, size), (PAD_VALUE,) * 3 if image.mode == "RGB" else PAD_VALUE)
    ranges = []
    for side, first, last in ((image.width, box[0], box[2]), (image.height, box[1], box[3])):
        offset, scale = (max(image.size) - side) / 2, size / (last - first)
        # the image's own pixels within the box, and where they lie in the result
        start, stop = max(first - offset, 0), min(last - offset, side)
        place = round((start + offset - first) * scale)
        ranges.append((start, stop, place, max(1, min(size, round((stop + offset - first) * scale)) - place)))
    (left, right, x, wide), (top, bottom, y, high) = ranges
    if right > left and bottom > top:
        canvas.paste(image.resize((wide, high), resample, box=(left, top, right, bottom)), (x, y))
    return np.asarray(canvas)


def kept_size(width: int, height: int, side: int, fit: Fit) -> tuple[int, int]:
    """The size at which an image is kept for later crops, for a square of `side` pixels: never enlarged.

    >>> kept_size(400, 200, 100, "crop"), kept_size(400, 200, 100, "pad"), kept_size(400, 200, 100, "squeeze")
    ((200, 100), (100, 50), (100, 100))
    """
    if fit == "squeeze":
        return min(width, side), min(height, side)
    factor = min(1.0, side / (max(width, height) if fit == "pad" else min(width, height)))
    return max(1, round(width * factor)), max(1, round(height * factor))
