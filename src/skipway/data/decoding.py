"""One image file -> an upright uint8 array of grey or colour, whatever the file's own mode; or the reason why not.

| in the file | what comes out |
|---|---|
| EXIF orientation | applied |
| alpha, transparent palette entries | laid on white |
| CMYK, YCbCr, LAB, HSV | converted to RGB |
| 16-bit grey | divided by 257, so that 65,535 becomes 255 |
| animation, several pages | the first frame |
| 32-bit float, 32-bit integers beyond 16 bits | refused: their range is unknown |
| truncated, not an image, over 64 megapixels, under 8 pixels | refused |
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from skipway.errors import DataError

__all__ = ["UnreadableImage", "check", "decode", "probe"]

MOST_PIXELS = 64_000_000
LEAST_SIDE = 8
# what may hold an orientation; looking into it costs more than decoding a small image, so it is asked for first
ORIENTATION_KEYS = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})

Box = tuple[float, float, float, float]
Chooser = Callable[[int, int], Box]


class UnreadableImage(DataError):
    """A file that no training image can be made of; `reason` says why in a few words."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableImage], tuple[Path, str]]:
        return type(self), (self.path, self.reason)


def decode(path: Path, *, channels: int, size: int, box: Chooser | None = None) -> np.ndarray:
    """Decode `path` into a uint8 array of shape (size, size, channels).

    `box(width, height)` chooses the part of the upright image that is scaled to size x size, in pixels
    (left, top, right, bottom); None takes the largest central square.

    Raises:
        UnreadableImage: the file is missing, damaged, not an image, or outside the limits above.
    """
    try:
        with quiet_pillow(), opened(path) as image:
            # a JPEG decodes at 1/2, 1/4 or 1/8 scale in a fraction of the time; twice the size leaves room to crop
            image.draft("RGB" if channels == 3 else "L", (2 * size, 2 * size))
            flat = flattened(upright(image), channels)
            return np.asarray(scaled(flat, size, box or central_square)).reshape(size, size, channels)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsers do: OSError, SyntaxError, struct.error
        raise UnreadableImage(path, reason_for(path, error)) from error


def probe(path: Path) -> tuple[int, int, bool]:
    """Width and height as stored, and whether the file is grey; from the header alone.

    Raises:
        UnreadableImage: as `decode`, for what the header can tell.
    """
    try:
        with quiet_pillow(), opened(path) as image:
            return (
                image.width,
                image.height,
                image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I"),
            )
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(path, reason_for(path, error)) from error


def check(path: Path) -> str:
    """Read `path` to its end at the lowest resolution; the reason why it cannot be used, or an empty string."""
    try:
        decode(path, channels=1, size=LEAST_SIDE)
    except UnreadableImage as error:
        return error.reason
    return ""


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Within it Pillow's warnings are not printed: what they warn of is refused here, or harmless.

    Python's warning filters belong to the whole process, so decoding runs in processes here and not in threads.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The image with its header read and its size within the limits; nothing is decoded yet."""
    with Image.open(path) as image:
        if image.width * image.height > MOST_PIXELS:
            raise UnreadableImage(path, f"{image.width}x{image.height}: more than {MOST_PIXELS // 10**6} megapixels")
        if min(image.size) < LEAST_SIDE:
            raise UnreadableImage(path, f"{image.width}x{image.height}: smaller than {LEAST_SIDE} pixels")
        if image.mode == "F":
            raise UnreadableImage(path, "32-bit float values of unknown range; save it with 8 or 16 bits")
        yield image


def upright(image: Image.Image) -> Image.Image:
    """The decoded image with its EXIF orientation applied; an orientation that cannot be read counts as none."""
    image.load()
    if not (image.info.keys() & ORIENTATION_KEYS or image.format == "TIFF"):
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata around sound pixels
        return image


def flattened(image: Image.Image, channels: int) -> Image.Image:
    """The image as 8-bit grey (1 channel) or RGB (3 channels), laid on white where it is transparent."""
    if image.mode.startswith("I"):
        image = eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


def eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits: round(value / 257). Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65_535:
        raise ValueError("32-bit integers of unknown range; save it with 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def central_square(width: int, height: int) -> Box:
    """The largest square in the middle.

    >>> central_square(40, 20)
    (10.0, 0.0, 30.0, 20.0)
    """
    return central_share(1.0)(width, height)


def central_share(share: float) -> Chooser:
    """A chooser of the central square whose side is `share` of the shorter side."""

    def choose(width: int, height: int) -> Box:
        side = share * min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    return choose


def scaled(image: Image.Image, size: int, choose: Chooser) -> Image.Image:
    """The chosen part at size x size; bicubic, and antialiased when it shrinks."""
    box = choose(image.width, image.height)
    if box == (0, 0, size, size):
        return image
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def reason_for(path: Path, error: Exception) -> str:
    """A few words for what Pillow raised."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {MOST_PIXELS // 10**6} megapixels"
    if isinstance(error, UnidentifiedImageError):
        return what_it_is(path)
    return (str(error) or type(error).__name__).splitlines()[0][:100]


def what_it_is(path: Path) -> str:
    """What a file without a known image header seems to be."""
    with path.open("rb") as file:
        head = file.read(256).lstrip().lower()
    if not head:
        return "an empty file"
    if head.startswith((b"<!doctype html", b"<html")):
        return "not an image but HTML"
    if head.startswith((b"%pdf", b"pk\x03\x04", b"\x1f\x8b")):
        return "not an image but a document or an archive"
    return "not an image in a format that is known here"
