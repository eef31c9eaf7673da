"""Colour operations on batches, value for value as Pillow's ImageOps and ImageEnhance do them on one image.

Every function takes float images (N, H, W, C) that hold whole numbers from 0 to 255, C = 1 or 3, and an amount per
image (N, 1, 1, 1), and gives the same shape and range.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipway.hardware.precision import widest

__all__ = ["autocontrast", "brightness", "colour", "contrast", "equalize", "posterize", "sharpness", "solarize"]


def blend(low: Tensor, images: Tensor, amount: Tensor) -> Tensor:
    """low + (1 + amount) (images - low), cut off at 0 and 255 and rounded down."""
    return (low + (1 + amount) * (images - low)).clamp(0, 255).floor()


def luma(images: Tensor) -> Tensor:
    """Grey (N, H, W, 1) by ITU-R BT.601, in Pillow's 16-bit weights."""
    if images.shape[-1] == 1:
        return images
    weights = torch.tensor([19595.0, 38470.0, 7471.0], device=images.device)
    return (((images * weights).sum(-1, keepdim=True) + 32768) / 65536).floor()


def brightness(images: Tensor, amount: Tensor) -> Tensor:
    """Towards or away from black.

    >>> brightness(torch.full((1, 1, 1, 1), 100.0), torch.full((1, 1, 1, 1), 0.5)).item()
    150.0
    """
    return blend(torch.zeros_like(images), images, amount)


def colour(images: Tensor, amount: Tensor) -> Tensor:
    """Towards or away from grey."""
    return blend(luma(images), images, amount)


def contrast(images: Tensor, amount: Tensor) -> Tensor:
    """Towards or away from the image's mean grey."""
    return blend((widest(luma(images)).mean((1, 2, 3), keepdim=True) + 0.5).floor().float(), images, amount)


def sharpness(images: Tensor, amount: Tensor) -> Tensor:
    """Towards or away from the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, whose border is the image's own."""
    planes = images.permute(0, 3, 1, 2)
    smooth = planes.clone()
    if min(planes.shape[2:]) > 2:
        kernel = torch.ones(3, 3, device=images.device)
        kernel[1, 1] = 5
        # sums of whole numbers are exact in any order, so an image comes out alike in every batch
        sums = nn.functional.conv2d(planes, kernel.expand(planes.shape[1], 1, 3, 3), groups=planes.shape[1])
        smooth[:, :, 1:-1, 1:-1] = (sums / 13 + 0.5).floor()
    return blend(smooth.permute(0, 2, 3, 1), images, amount)


def posterize(images: Tensor, amount: Tensor) -> Tensor:
    """The round(|amount|) lowest bits cleared.

    >>> posterize(torch.full((1, 1, 1, 1), 255.0), torch.full((1, 1, 1, 1), 4.0)).item()
    240.0
    """
    step = 2 ** amount.abs().round()
    return (images / step).floor() * step


def solarize(images: Tensor, amount: Tensor) -> Tensor:
    """Values from 255 - |amount| on inverted."""
    return torch.where(images >= 255 - amount.abs(), 255 - images, images)


def autocontrast(images: Tensor, amount: Tensor) -> Tensor:
    """Each channel stretched to 0 ... 255; a channel of one value stays."""
    low, high = images.amin((1, 2), keepdim=True), images.amax((1, 2), keepdim=True)
    flat = high <= low
    scale = 255 / torch.where(flat, 1, high - low)
    # in float32 a product that should be a whole number may fall just below it
    stretched = ((images - low) * scale + 1e-3).floor().clamp(0, 255)
    return torch.where(flat, images, stretched)


def equalize(images: Tensor, amount: Tensor) -> Tensor:
    """Each channel's values made about equally frequent: Pillow's table from the channel's histogram."""
    count, height, width, channels = images.shape
    values = images.permute(0, 3, 1, 2).reshape(count * channels, height * width).long()
    histogram = torch.zeros(count * channels, 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(1, values, torch.ones_like(values))
    # the number of pixels of the highest value that occurs
    last = histogram.gather(1, values.amax(1, keepdim=True))
    step = (height * width - last) // 255
    before = histogram.cumsum(1) - histogram
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.gather(1, values).reshape(count, channels, height, width).permute(0, 2, 3, 1).float()
