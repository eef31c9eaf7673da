"""Twelve kinds of images that folders hold, and what comes out of each library's reader of folders."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["KINDS", "READERS", "outcomes"]

SIDE = 32
SOUND = 4
# how far a mean grey value may be off, of 255
CLOSE = 20.0
Pixels = np.ndarray


class LeftOut(Exception):
    """A reader that goes on without a file, and says which and why."""

    what = "left out"


class Replaced(LeftOut):
    """A reader that gives the next image instead, and says so in its log."""

    what = "the next image instead; in the log"


def sound(number: int, shade: int) -> Image.Image:
    """A grey image with some noise."""
    draw = np.random.default_rng(number)
    return Image.fromarray((draw.integers(0, 40, (SIDE, SIDE, 3)) + shade).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def halves(top: int, bottom: int) -> Image.Image:
    """An image whose upper half has one shade and whose lower half another."""
    pixels = np.full((SIDE, SIDE, 3), top, np.uint8)
    pixels[SIDE // 2 :] = bottom
    return Image.fromarray(pixels)


def truncated() -> bytes:
    content = encoded(halves(30, 220), "JPEG", quality=95)
    return content[: len(content) * 2 // 3]


def oversized() -> bytes:
    """A small file that says of itself that it has 3,600 megapixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + b"IHDR" + header
    return start + struct.pack(">I", zlib.crc32(b"IHDR" + header))


def bomb() -> bytes:
    """A file of some kilobytes that is an image of 100 megapixels."""
    return encoded(Image.new("L", (10_000, 10_000), 99), "PNG")


def wide_grey() -> bytes:
    ramp = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
    return encoded(Image.fromarray(ramp), "PNG")


def floating() -> bytes:
    ramp = np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)
    return encoded(Image.fromarray(ramp), "TIFF")


def turned() -> bytes:
    """Stored upside down, with the word of the camera that it is."""
    exif = Image.Exif()
    exif[0x0112] = 3
    return encoded(halves(220, 30), "JPEG", quality=95, exif=exif)


def hidden() -> bytes:
    """Wholly transparent, black underneath."""
    return encoded(Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0)), "PNG")


def palette() -> bytes:
    """A palette whose only colour is transparent, black underneath."""
    image = Image.new("P", (SIDE, SIDE), 0)
    image.putpalette([0, 0, 0] + [255] * 765)
    return encoded(image, "PNG", transparency=0)


def four_colours() -> bytes:
    return encoded(Image.new("CMYK", (SIDE, SIDE), (0, 0, 0, 128)), "JPEG", quality=95)


def animated() -> bytes:
    first, second = Image.new("L", (SIDE, SIDE), 60), Image.new("L", (SIDE, SIDE), 200)
    return encoded(first, "GIF", save_all=True, append_images=[second])


def upright(pixels: Pixels) -> bool:
    """Whether the upper half is the dark one."""
    half = len(pixels) // 2
    return bool(pixels[:half].mean() + 60 < pixels[half:].mean())


def around(shade: float) -> Callable[[Pixels], bool]:
    """Whether the mean is about this shade."""
    return lambda pixels: abs(float(pixels.mean()) - shade) < CLOSE


# name: file name, and what is right; None where only leaving it out by name is
Kind = tuple[Callable[[], bytes], tuple[str, Callable[[Pixels], bool] | None], str]
KINDS: dict[str, Kind] = {
    "truncated JPEG": (truncated, ("bad.jpg", None), "named"),
    "no bytes": (lambda: b"", ("bad.jpg", None), "named"),
    "HTML": (lambda: b"<html><body>404</body></html>" * 9, ("bad.jpg", None), "named"),
    "header of 3,600 megapixels": (oversized, ("bad.png", None), "named"),
    "100 megapixels in a small file": (bomb, ("bad.png", None), "named"),
    "grey of 16 bits": (wide_grey, ("bad.png", around(127)), "mean 127"),
    "float TIFF from 0 to 1": (floating, ("bad.tif", around(127)), "mean 127, or named"),
    "turned by EXIF": (turned, ("bad.jpg", upright), "upright"),
    "transparent": (hidden, ("bad.png", around(255)), "white"),
    "palette, transparent": (palette, ("bad.png", around(255)), "white"),
    "CMYK": (four_colours, ("bad.jpg", around(127)), "mean 127"),
    "animated": (animated, ("bad.gif", around(60)), "first frame"),
}


def torchvision_folder(root: Path) -> dict[str, Pixels]:
    """torchvision's ImageFolder"""
    from torchvision.datasets import ImageFolder

    data = ImageFolder(str(root))
    return {Path(path).name: np.asarray(data[number][0]) for number, (path, _) in enumerate(data.samples)}


def hugging_face_folder(root: Path) -> dict[str, Pixels]:
    """datasets' imagefolder with convert("RGB"), as run_image_classification.py"""
    from datasets import Image, load_dataset

    data = load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(root.parent / "hf"))
    paths = [row["image"]["path"] for row in data.cast_column("image", Image(decode=False))]
    return {Path(path).name: np.asarray(row["image"].convert("RGB")) for path, row in zip(paths, data, strict=True)}


def timm_folder(root: Path) -> dict[str, Pixels]:
    """timm's create_dataset"""
    import logging

    from timm.data import create_dataset

    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("timm.data.dataset")
    log.addHandler(listener)
    log.propagate = False
    data = create_dataset("", root=str(root))
    names = [Path(name).name for name in data.filenames()]
    found = {name: np.asarray(data[number][0]) for number, name in enumerate(names)}
    if said:
        raise Replaced(" ".join(said))
    return found


def skipway_folder(root: Path) -> dict[str, Pixels]:
    """skipway.data.loader"""
    from skipway.data import load

    data = load(root, size=SIDE, channels=3, holdout=0.25, validation=0.0, workers=0, cache=False, most_unreadable=0.5)
    if data.unreadable:
        raise LeftOut(" ".join(f"{file}: {reason}" for file, reason in data.unreadable))
    found: dict[str, Pixels] = {}
    for part in (data.train, data.test):
        for name, image in zip(part.names, part.images.numpy(), strict=True):  # type: ignore[attr-defined]
            found[Path(name).name] = image
    return found


READERS: dict[str, Callable[[Path], dict[str, Pixels]]] = {
    "plain torch": torchvision_folder,
    "Accelerate": torchvision_folder,
    "HF Trainer": hugging_face_folder,
    "timm": timm_folder,
    "Skipway": skipway_folder,
}


def tree(root: Path) -> dict[str, tuple[int, str]]:
    """Time of change and hash of every file."""
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def judged(reader: Callable[[Path], dict[str, Pixels]], root: Path, wanted: tuple[str, Any]) -> tuple[bool, str]:
    """Whether a kind is handled, and in words what happened."""
    name, right = wanted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = reader(root)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            named = name in str(error)
            may = right is None or name.endswith(".tif")
            what = error.what if isinstance(error, LeftOut) else type(error).__name__
            return named and may, f"{what}, {'named' if named else 'not named'}"
    image = found.get(name, found.get("bad"))
    if image is None:
        return False, "left out without a word"
    if right is not None:
        return bool(right(image)), "right" if right(image) else f"mean {image.mean():.0f}" + (
            ", upside down" if right is upright else ""
        )
    return False, "used" if image.shape[0] == SIDE or image.shape[0] > 1000 else "used in part"


def outcomes(peer: str, root: Path) -> dict[str, dict[str, Any]]:
    """What a library's reader makes of each kind, beside sound images."""
    os.environ["XDG_CACHE_HOME"] = str(root.parent / "cache")
    told = {}
    for kind, (make, wanted, _) in KINDS.items():
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(root.parent / "hf", ignore_errors=True)
        for place, shade in (("a", 20), ("b", 180)):
            (root / place).mkdir(parents=True)
            for number in range(SOUND):
                sound(number, shade).save(root / place / f"{number}.png")
        (root / "a" / wanted[0]).write_bytes(make())
        before = tree(root)
        fine, what = judged(READERS[peer], root, wanted)
        told[kind] = {"fine": fine, "what": what, "changed": tree(root) != before}
    return told
