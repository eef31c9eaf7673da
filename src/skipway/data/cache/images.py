"""Decoded images in the cache: written once, then cropped from a memory map instead of decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from skipway.data.augment.crops import random_box
from skipway.data.cache.store import PixelFile
from skipway.data.decode import DecodeSpec, UnreadableImage, reporting_faults, upright_image
from skipway.data.fit import central_share, fit_square, kept_size
from skipway.data.inspection import DecodeTask
from skipway.data.pool import WorkerPool
from skipway.data.sources.readers import ImageStore

__all__ = ["CropTask", "ShrinkTask", "open_square", "write_rows", "write_shrunk", "write_square"]

# shorter side of cached images for random crops, relative to the input's
KEPT_SHARE = 256 / 224
# images of a larger aspect ratio are cropped to their middle
KEPT_ASPECT = 4


class ShrinkTask:
    """Task: decode each image at the size that it is kept at for later crops, 256/224 of the input's, and return it."""

    shape = None

    def __init__(self, store: ImageStore, files: Sequence[str], spec: DecodeSpec) -> None:
        self.store = store
        self.files = files
        self.spec = spec

    def __call__(self, index: int, row: np.ndarray | None) -> np.ndarray:
        """The image, uint8 (H, W, C); one black pixel if it cannot be read."""
        file, side = self.files[index], round(KEPT_SHARE * self.spec.size)
        try:
            with reporting_faults(self.store.read(file), self.store.root / file) as (content, path):
                image = upright_image(content, path, self.spec, least=side)
                long, short = max(image.size), min(image.size)
                if self.spec.fit == "crop" and long > KEPT_ASPECT * short:
                    cut = (long - KEPT_ASPECT * short) // 2
                    wide = image.width > image.height
                    box = (cut, 0, image.width - cut, short) if wide else (0, cut, short, image.height - cut)
                    image = image.crop(box)
                size = kept_size(*image.size, side, self.spec.fit)
                if size != image.size:
                    image = image.resize(size, Image.Resampling.BICUBIC)
                return np.asarray(image).reshape(image.height, image.width, self.spec.channels)
        except UnreadableImage:
            return np.zeros((1, 1, self.spec.channels), np.uint8)


class CropTask:
    """Task: crop each image from a file of decoded images into its row.

    Args:
        pixels: the file.
        count: number of images in the file.
        rows: index in the file of each image of the data set.
        spec: format of the result.
        draws: random numbers of the crops; None: central crops.
    """

    def __init__(
        self,
        pixels: PixelFile,
        count: int,
        rows: np.ndarray,
        spec: DecodeSpec,
        draws: np.ndarray | None,
    ) -> None:
        self.pixels = pixels
        self.count = count
        self.rows = rows
        self.spec = spec
        self.draws = draws
        self.shape = (spec.size, spec.size, spec.channels)
        self.opened: tuple[np.ndarray, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leave out the memory map: a worker process opens the file itself."""
        return {**self.__dict__, "opened": None}

    def __call__(self, index: int, row: np.ndarray | None) -> str:
        if self.opened is None:
            self.opened = self.pixels.open(self.count, self.spec.channels)
        if self.opened is None or row is None:
            return "the decoded images in the cache are missing or damaged; start again to decode them anew"
        table, content = self.opened
        offset, height, width = table[self.rows[index]].tolist()
        channels = self.spec.channels
        flat = content[offset : offset + height * width * channels]
        image = Image.fromarray(flat.reshape(height, width, channels) if channels == 3 else flat.reshape(height, width))
        box = central_share(self.spec.crop_share) if self.draws is None else random_box(self.draws[index])
        row[:] = fit_square(image, self.spec.size, box, self.spec.fit, self.spec.resample).reshape(self.shape)
        return ""


def open_square(pixels: PixelFile, count: int, spec: DecodeSpec) -> Tensor | None:
    """Map all images at input size, uint8 (N, H, W, C); None if there is no valid file."""
    opened = pixels.open(count, spec.channels)
    if opened is None:
        return None
    table, content = opened
    start, shape = int(table[0, 0]), (count, spec.size, spec.size, spec.channels)
    return torch.from_numpy(content[start : start + int(np.prod(shape))].reshape(shape))


def write_square(pixels: PixelFile, images: Tensor) -> str:
    """Cache images that are decoded at input size. Returns the reason if that is impossible, else "".

    Raises:
        OSError: the cache cannot be written to.
    """
    count, height, width, channels = images.shape
    sizes = np.tile(np.array([[height, width]], np.int64), (count, 1))
    return pixels.write(sizes, channels, (image.numpy() for image in images))


def write_rows(
    pixels: PixelFile, work: DecodeTask, count: int, spec: DecodeSpec, pool: WorkerPool, chunk: int = 64
) -> str:
    """Decode all images at input size into the cache. Returns the reason if that is impossible, else "".

    Raises:
        OSError: the cache cannot be written to.
    """
    batches = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    sizes = np.full((count, 2), spec.size, np.int64)
    return pixels.write(sizes, spec.channels, (row for rows, _ in pool.batches(work, batches) for row in rows.numpy()))


def write_shrunk(
    pixels: PixelFile, store: ImageStore, files: Sequence[str], spec: DecodeSpec, pool: WorkerPool, chunk: int = 64
) -> str:
    """Decode all images into the cache, with their shorter side at 256/224 of the input's.

    They are decoded twice: for the table of sizes, which comes first, and for the pixels.

    Raises:
        OSError: the cache cannot be written to.
    """
    batches = [range(start, min(start + chunk, len(files))) for start in range(0, len(files), chunk)]
    work = ShrinkTask(store, files, spec)

    def decoded() -> Iterator[np.ndarray]:
        for _, images in pool.batches(work, batches):
            yield from images

    sizes = np.array([image.shape[:2] for image in decoded()], np.int64).reshape(-1, 2)
    return pixels.write(sizes, spec.channels, decoded())
