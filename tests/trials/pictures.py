"""Tiny images for trials on folders: noise of a different brightness in each folder."""

from __future__ import annotations

import io
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

__all__ = ["encoded", "write_images"]


def encoded(
    number: int, form: str = "PNG", *, side: tuple[int, int] = (10, 10), mode: str = "RGB", level: int = 0
) -> bytes:
    """An image of `side` = (width, height) as bytes."""
    noise = np.random.default_rng(number).integers(0, 100, (side[1], side[0], 3)) + level
    file = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).convert(mode).save(file, form)
    return file.getvalue()


def write_images(root: Path, counts: dict[str, int], *, suffix: str = ".png", form: str = "PNG", **options) -> Path:
    """Write `counts[folder]` images into each folder below `root`, all different."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        level = 150 * (crc32(folder.rpartition("/")[2].encode("utf-8", "surrogateescape")) % 2)
        for number in range(count):
            key = crc32(f"{folder}/{number}".encode("utf-8", "surrogateescape"))
            (root / folder / f"{number:03d}{suffix}").write_bytes(encoded(key, form, level=level, **options))
    return root
