"""JPEG decoding by simplejpeg (libjpeg-turbo in one call), where it is installed.

Pillow reads the header, and decodes what simplejpeg does not: CMYK, files that libjpeg warns about, and everything
where simplejpeg is not installed. Both use libjpeg-turbo with the same settings and the same scale, so the pixels are
the same (`tests/data/test_decode.py`); `benchmarks/decoding.py` has the times.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from PIL import Image

__all__ = ["jpeg_pixels", "jpeg_reduction", "simplejpeg"]

# a progressive image is held in memory at its full size, whatever the scale
MAX_PROGRESSIVE = 64_000_000


@cache
def simplejpeg() -> Any:
    """The module simplejpeg; None if it is not installed."""
    try:
        return import_module("simplejpeg")
    except ImportError:
        return None


def jpeg_reduction(image: Image.Image, least: int) -> int:
    """The factor, 8, 4, 2 or 1, by which libjpeg reduces an image while both of its sides stay at least `least`.

    1 for other formats, and for progressive JPEG where it would not save memory: more than `MAX_PROGRESSIVE` pixels.
    """
    if image.format not in ("JPEG", "MPO"):
        return 1
    if image.info.get("progressive") and image.width * image.height > MAX_PROGRESSIVE:
        return 1
    factor = min(image.width // least, image.height // least)
    return next((scale for scale in (8, 4, 2) if scale <= factor), 1)


def jpeg_pixels(content: bytes, image: Image.Image, channels: int, scale: int) -> Image.Image | None:
    """Decode an image whose header Pillow has read, reduced by `scale` as `jpeg_reduction` has it.

    Returns a grey image for one channel or a grey file, else RGB; None: Pillow has to decode it.
    """
    library = simplejpeg()
    if library is None or image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    width, height = -(-image.width // scale), -(-image.height // scale)
    grey = channels == 1 or image.mode == "L"
    try:
        pixels = library.decode_jpeg(
            content, "GRAY" if grey else "RGB", min_height=height, min_width=width, strict=True
        )
    except (ValueError, MemoryError):
        return None
    if pixels.shape[:2] != (height, width):
        return None
    return Image.fromarray(pixels[..., 0] if grey else pixels)
