"""Decoding of an image file to an upright uint8 array, grey or RGB, or the reason why that is impossible.

| in the file | result |
|---|---|
| EXIF orientation | applied |
| alpha, transparent palette entries | laid on white |
| CMYK, YCbCr, LAB, HSV | converted to RGB |
| 16-bit grey | divided by 257, so that 65,535 becomes 255; or each image's own range stretched (`grey16="minmax"`) |
| animation, several pages | the first frame |
| 32-bit float, 32-bit integers beyond 16 bits | refused: their range is unknown |
| truncated, not an image, under 8 pixels, over 256 MB | refused |
| over 64 megapixels as decoded | refused; `max_megapixels` is the limit, and a large JPEG is decoded at reduced scale |
| raw photographs, whose readable part is a thumbnail | refused |
| EPS, PDF and other formats that run programs or have no pixels | refused, whatever the suffix |
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from skipway.data.content import describe_content, describe_raw, image_format
from skipway.data.fit import ChooseBox, Fit, Resample, central_share, fit_square
from skipway.data.jpeg import jpeg_pixels, jpeg_reduction
from skipway.errors import DataError, first_line, printable

__all__ = [
    *(
        "MAX_BYTES",
        "MAX_MEGAPIXELS",
        "MIN_SIDE",
        "DecodeSpec",
        "Grey16",
        "Header",
        "UnreadableImage",
        "decode",
        "decode_with_header",
    ),
    *("read_header", "reporting_faults", "silence_pillow", "upright_image"),
]

MAX_MEGAPIXELS = 64.0
MAX_BYTES = 256 * 1024**2
MIN_SIDE = 8
# entries that may hold an orientation: parsing them costs more than decoding a small image
ORIENTATION_KEYS = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})
ORIENTATION_TAG = 274
# EXIF 2.3, table 6: how the stored rows and columns are to be shown
ORIENTATION_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Grey16 = Literal["range", "minmax"]


class UnreadableImage(DataError):
    """A file that cannot be decoded; `reason` is a phrase."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{printable(path)}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableImage], tuple[Path, str]]:
        return type(self), (self.path, self.reason)


class Header(NamedTuple):
    """The header of a file: width and height as stored, and whether it is grey, transparent or animated."""

    width: int
    height: int
    grey: bool
    alpha: bool = False
    moving: bool = False


class DecodeSpec(NamedTuple):
    """How images are decoded.

    Args:
        channels: 1 (grey) or 3 (RGB).
        size: side of the square result in pixels.
        grey16: conversion of 16-bit grey to 8 bits, see above.
        fit: how a rectangle becomes a square, see `skipway.data.fit`.
        max_megapixels: images of more are refused. A baseline JPEG counts at the reduced scale that it is decoded at.
        crop_share: side of the central crop over the shorter side of the image, or of the square that `fit` makes.
        resample: the filter that images are scaled with.
    """

    channels: int
    size: int
    grey16: Grey16 = "range"
    fit: Fit = "crop"
    max_megapixels: float = MAX_MEGAPIXELS
    crop_share: float = 1.0
    resample: Resample = "bicubic"


def decode(
    source: Path | bytes,
    spec: DecodeSpec,
    *,
    box: ChooseBox | None = None,
    name: Path | None = None,
) -> np.ndarray:
    """Decode a file, or its bytes, into a uint8 array of shape (size, size, channels).

    Args:
        source: the file, or its bytes.
        spec: format of the result.
        box: `box(width, height)` returns the crop of the upright image that is scaled to size x size, in pixels (left,
            top, right, bottom); None: the central crop of the spec.
        name: name of the bytes in messages.

    Raises:
        UnreadableImage: the file is missing, damaged, not an image, or outside the limits above.
    """
    with reporting_faults(source, name) as (content, path), open_image(content, path) as image:
        return square_pixels(image, content, path, spec, box)


def decode_with_header(
    content: bytes, spec: DecodeSpec, *, limits: DecodeSpec, name: Path
) -> tuple[Header, np.ndarray]:
    """As `read_header` and `decode`: the file is opened once for both, and its size checked by the spec `limits`.

    Raises:
        UnreadableImage: as `decode`.
    """
    with reporting_faults(content, name) as (_, path), open_image(content, path) as image:
        choose_reduction(image, path, limits, 2 * limits.size)
        header = header_of(image)
        return header, square_pixels(image, content, path, spec)


def square_pixels(
    image: Image.Image, content: bytes, path: Path, spec: DecodeSpec, box: ChooseBox | None = None
) -> np.ndarray:
    """Decode an image that `open_image` has opened, as `decode` does."""
    upright = upright_pixels(image, content, path, spec, least=2 * spec.size)
    square = fit_square(upright, spec.size, box or central_share(spec.crop_share), spec.fit, spec.resample)
    return square.reshape(spec.size, spec.size, spec.channels)


def upright_image(content: bytes, path: Path, spec: DecodeSpec, *, least: int) -> Image.Image:
    """Decode the upright image, grey or RGB, with both sides at least `least` if those of the file are."""
    with open_image(content, path) as image:
        return upright_pixels(image, content, path, spec, least=least)


def upright_pixels(image: Image.Image, content: bytes, path: Path, spec: DecodeSpec, *, least: int) -> Image.Image:
    """As `upright_image`, of an image that `open_image` has opened.

    A JPEG decodes at 1/2, 1/4 or 1/8 of its size in a fraction of the time; one that would be over the limit of pixels
    is reduced further, while its sides are at least `spec.size`.
    """
    scale = choose_reduction(image, path, spec, least)
    pixels = jpeg_pixels(content, image, spec.channels, scale)
    if pixels is None:
        image.draft("RGB" if spec.channels == 3 else "L", (image.width // scale, image.height // scale))
        image.load()
        pixels = image
    return turn_upright(to_eight_bit(pixels, spec.channels, spec.grey16), image)


def read_header(source: Path | bytes, name: Path | None = None) -> Header:
    """Read the header of a file.

    Raises:
        UnreadableImage: as `decode`, as far as the header shows it.
    """
    with reporting_faults(source, name) as (content, path), open_image(content, path) as image:
        return header_of(image)


def choose_reduction(image: Image.Image, path: Path, spec: DecodeSpec, least: int) -> int:
    """The factor by which an image is reduced while it is decoded.

    Raises:
        UnreadableImage: it has too many pixels all the same.
    """
    megapixels = image.width * image.height / 1e6
    scale = jpeg_reduction(image, least)
    while megapixels > spec.max_megapixels * scale**2 and jpeg_reduction(image, spec.size) > scale:
        scale *= 2
    if megapixels > spec.max_megapixels * scale**2:
        raise UnreadableImage(
            path,
            f"{image.width}x{image.height}: more than {spec.max_megapixels:g} megapixels; "
            f"max_megapixels={math.ceil(megapixels / scale**2)} allows it",
        )
    return scale


def header_of(image: Image.Image) -> Header:
    """The header of an image that Pillow has opened."""
    grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    return Header(image.width, image.height, grey, image.has_transparency_data, getattr(image, "is_animated", False))


def silence_pillow() -> None:
    """Silence Pillow's warnings: what they are about is refused here, or harmless.

    Warning filters belong to the whole process and threads decode, so the filter stays.
    """
    pattern = r"PIL\."
    if not any(entry[0] == "ignore" and getattr(entry[3], "pattern", "") == pattern for entry in warnings.filters[:8]):
        warnings.filterwarnings("ignore", module=pattern)


@contextmanager
def reporting_faults(source: Path | bytes, name: Path | None) -> Iterator[tuple[bytes, Path]]:
    """Yield the bytes and their name; any exception in the block becomes an `UnreadableImage`."""
    path = source if isinstance(source, Path) else name or Path("image")
    silence_pillow()
    content: bytes | None = source if isinstance(source, bytes) else None
    try:
        if content is None:
            content = path.read_bytes()
        if len(content) > MAX_BYTES:
            raise UnreadableImage(path, f"a file of more than {MAX_BYTES >> 20} MB: convert it to PNG or JPEG")
        yield content, path
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsers do: OSError, SyntaxError, struct.error
        raise UnreadableImage(path, describe_fault(content or b"", error)) from error


@contextmanager
def open_image(content: bytes, path: Path) -> Iterator[Image.Image]:
    """Open an image by its first bytes and check its header; nothing is decoded."""
    form = image_format(content, path.suffix)
    if not form:
        raise UnreadableImage(path, describe_content(content))
    # Pillow's `open` without its limit of pixels, which belongs to the whole process: ours is checked before decoding
    with Image.OPEN[form][0](io.BytesIO(content), "") as image:
        if min(image.size) < MIN_SIDE:
            raise UnreadableImage(path, f"{image.width}x{image.height}: smaller than {MIN_SIDE} pixels: enlarge it")
        if image.mode == "F":
            raise UnreadableImage(path, "32-bit float values of unknown range; save it with 8 or 16 bits")
        if form == "TIFF" and (raw := describe_raw(image)):
            raise UnreadableImage(path, raw)
        yield image


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if the metadata is damaged."""
    if not (image.info.keys() & ORIENTATION_KEYS or image.format == "TIFF"):
        return 1
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:
        return 1


def turn_upright(flat: Image.Image, image: Image.Image) -> Image.Image:
    """Turn converted pixels as the orientation says of the image that they are from.

    To be called after loading: Pillow itself turns a TIFF then, and a PNG may store its orientation after its pixels.
    """
    orientation = orientation_of(image)
    return flat.transpose(ORIENTATION_TRANSPOSE[orientation]) if orientation in ORIENTATION_TRANSPOSE else flat


def to_eight_bit(image: Image.Image, channels: int, grey16: Grey16) -> Image.Image:
    """Convert to 8-bit grey (1 channel) or RGB (3 channels), with transparency on white."""
    if image.mode.startswith("I"):
        image = eight_bits(image, grey16)
    if image.mode == "LAB":  # Pillow converts it to RGB alone
        image = image.convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        image = white
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


def eight_bits(image: Image.Image, grey16: Grey16) -> Image.Image:
    """Scale 16-bit grey to 8 bits: round(value / 257), or by the range of the image. Pillow alone clips at 255."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65_535:
        raise ValueError("32-bit integers of unknown range; save it with 8 or 16 bits")
    if grey16 == "range":
        low, high = 0, 65_535
    table = np.arange(65_536, dtype=np.float64) - low
    table = np.floor(table.clip(0) * (255 / max(high - low, 1)) + 0.5).clip(0, 255).astype(np.uint8)
    return Image.fromarray(table[values])


def describe_fault(content: bytes, error: Exception) -> str:
    """Describe an exception in a phrase."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return "more pixels than Pillow allows"
    text = first_line(error, 100)
    if isinstance(error, (UnidentifiedImageError, SyntaxError, IndexError, TypeError, struct.error)):
        text = f"a damaged {image_format(content) or 'TGA'} image: {text}"
    return "".join(letter if letter.isprintable() else "?" for letter in text)
