"""Reading the images of a source once: what the input is to be, which images are damaged, and what the cache knows."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from skipway.data.cache.images import open_square, write_rows, write_shrunk, write_square
from skipway.data.cache.store import (
    PixelFile,
    cache_folder,
    cache_key,
    cache_remark,
    load_image_infos,
    save_image_infos,
)
from skipway.data.content import readable_formats
from skipway.data.decode import DecodeSpec, Header, UnreadableImage, read_header
from skipway.data.image_dataset import DecodedImages, Progress, inspect_images
from skipway.data.inspection import DecodeTask, ImageInfo
from skipway.data.options import SMALL_SIDE, DataChoices
from skipway.data.pool import FEW_FILES, WorkerPool
from skipway.data.sources.index import SourceIndex
from skipway.errors import DataError, counted, printable, spell
from skipway.hardware.limits import available_memory

__all__ = ["SourceReader", "SourceSummary", "choose_input", "read_headers"]

# input size of He 2015, customary for ImageNet
LARGE_SIZE = 224
# headers that are read to choose size and channels of the input
MAX_HEADERS = 1_000
# data sets up to this size are decoded into memory
MEMORY_BYTES = 2 * 1024**3
# and up to this fraction of the memory that is left
MEMORY_SHARE = 0.8
SECONDS_BETWEEN_SAVES = 10.0
# of the time of a reading that saving may take
SAVE_SHARE = 1 / 20


@dataclass(frozen=True, kw_only=True)
class SourceSummary:
    """What is known of a source before its images are decoded.

    Args:
        classes: their names.
        images: how many it has in all.
        training: how many of them stand where training images do; what a source lacks is split off these.
        has_validation: whether the source has a validation split.
        has_test: whether it has a test split.
        side: the largest shorter side of the images in pixels.
        channels: 1 if all are grey, else 3.
    """

    classes: tuple[str, ...]
    images: int
    training: int
    has_validation: bool
    has_test: bool
    side: int
    channels: int

    @classmethod
    def of(cls, found: SourceIndex, headers: Sequence[Header]) -> SourceSummary:
        """The summary of a source of which some headers were read."""
        return cls(
            classes=found.classes,
            images=len(found.files),
            training=sum(map(len, found.train.values())),
            has_validation=found.validation is not None,
            has_test=found.test is not None,
            side=max(min(header.width, header.height) for header in headers),
            channels=1 if all(header.grey for header in headers) else 3,
        )


@dataclass
class SourceReader:
    """Reads every image of a source once, or what the cache knows about it.

    What is found is in `known`, and in the cache as it grows, so that a reading that is interrupted goes on.
    """

    found: SourceIndex
    files: list[str]
    choices: DataChoices
    spec: DecodeSpec
    pool: WorkerPool
    progress: Progress | None
    remarks: list[str]
    known: dict[str, ImageInfo] = field(default_factory=dict)
    save_after: float = 0.0

    @property
    def explicit(self) -> bool:
        """Whether the caller asked for a cache."""
        return self.choices.cache is not None and self.choices.cache is not False

    @property
    def caches(self) -> bool:
        """Whether anything is cached: on request, and by default where there are thousands of files."""
        return self.explicit or (self.choices.cache is None and len(self.files) >= FEW_FILES)

    @cached_property
    def folder(self) -> Path | None:
        """The folder of the cache; None if nothing is cached, with a remark if that is not by choice."""
        if not self.caches:
            return None
        try:
            folder = cache_folder(self.choices.cache)
        except OSError as error:
            self.remarks.append(f"nothing is cached: {error}")
            return None
        if not isinstance(self.choices.cache, Path):
            self.remarks.append(cache_remark("what is known of the images, or their pixels, are", folder))
        return folder

    def fits_in_memory(self, needed: int) -> bool:
        """Whether the decoded images fit into the memory that is left, with room for the network."""
        left = available_memory()
        if left is None or needed <= MEMORY_SHARE * left:
            return True
        self.remarks.append(
            f"the decoded images need {needed / 1e9:.1f} GB and {left / 1e9:.1f} GB of memory are left: they are "
            "decoded in every epoch"
        )
        return False

    @property
    def cuts(self) -> bool:
        """Whether training images are random crops of larger ones."""
        return self.choices.augmentation(self.spec.size).crop == "resized"

    @property
    def settings(self) -> list[Any]:
        """What an inspection depends on besides the files."""
        return [self.choices.max_megapixels, list(readable_formats())]

    def read(self) -> DecodedImages | PixelFile | None:
        """Inspect the images. Returns the pixels: decoded at input size, or a cache file to crop from, or None where
        they are decoded from the source.
        """
        folder, store = self.folder, self.found.store
        self.known = {} if folder is None else load_image_infos(folder, store, self.files, self.settings)
        needed = len(self.files) * self.spec.size**2 * self.spec.channels
        small = not self.cuts and needed <= MEMORY_BYTES and self.fits_in_memory(needed)
        kind = "-".join(map(str, ("parts" if self.cuts else "whole", *self.spec)))
        pixels = None
        if folder is not None and (self.explicit or small):
            pixels = PixelFile.of(folder, store, kind, cache_key(store, self.files, kind))
        complete = len(self.known) == len(self.files)
        if pixels is not None and complete and (ready := self.ready(pixels)) is not None:
            return ready
        images = self.inspect(self.files if small else self.unknown(sampled=pixels is None), decoded=small)
        if pixels is not None:
            try:
                refused = self.write(pixels, images)
            except OSError as error:
                self.uncached(error)
            else:
                if refused:
                    self.remarks.append(refused + ": they are decoded in every epoch")
                elif images is None:
                    return self.ready(pixels)
        return None if images is None else DecodedImages(images)

    def unknown(self, *, sampled: bool) -> list[str]:
        """The images that are still to be inspected: all that are not known, or a sample, evenly spread, by choice."""
        todo, count = self.files, self.choices.inspect
        if count is not None and count < len(self.files) and not sampled:
            self.remarks.append(f"{spell('inspect', count)} has no effect: all images are decoded into the cache")
        elif count is not None and count < len(self.files):
            todo = [self.files[place * len(self.files) // count] for place in range(count)]
            self.known = {file: self.known[file] for file in todo if file in self.known}
            self.remarks.append(
                f"{count:,} of {len(self.files):,} images were inspected: damaged images and copies among the others "
                "are not known; the next image of its class takes the place of a damaged one"
            )
        return [file for file in todo if file not in self.known]

    def inspect(self, todo: list[str], *, decoded: bool) -> Tensor | None:
        """Inspect images into `known`, and decode them where wanted; an interruption loses nothing that is cached."""
        self.save_after = time.monotonic() + SECONDS_BETWEEN_SAVES

        def keep(files: Sequence[str], infos: Sequence[ImageInfo]) -> None:
            self.known.update(zip(files, infos, strict=True))
            if time.monotonic() > self.save_after:
                self.save()

        try:
            return inspect_images(
                self.found.store, todo, self.pool, spec=self.spec, decoded=decoded, progress=self.progress, keep=keep
            )
        finally:
            if todo:
                self.save()

    def save(self) -> None:
        """Cache what is known; the longer it takes, the later is the next time."""
        if self.folder is None:
            return
        began = time.monotonic()
        try:
            save_image_infos(self.folder, self.found.store, self.known, self.settings)
        except OSError as error:
            self.uncached(error)
        now = time.monotonic()
        self.save_after = now + max(SECONDS_BETWEEN_SAVES, (now - began) / SAVE_SHARE)

    def uncached(self, error: OSError) -> None:
        """Remark once that the cache cannot be written to."""
        where = "" if self.folder is None else f" in {printable(self.folder)}"
        remark = f"nothing is cached{where}: {(error.strerror or str(error)).lower()}"
        if remark not in self.remarks:
            self.remarks.append(remark)

    def ready(self, pixels: PixelFile) -> DecodedImages | PixelFile | None:
        """Open the cached pixels; None if they are absent or of other images."""
        if self.cuts:
            pixels.hold()  # batches open it again and again
            if pixels.open(len(self.files), self.spec.channels) is None:
                return None
            pixels.remove_others()
            return pixels
        images = open_square(pixels, len(self.files), self.spec)
        return None if images is None else DecodedImages(images)

    def write(self, pixels: PixelFile, images: Tensor | None) -> str:
        """Cache the decoded images; return the reason if that is impossible, else ""."""
        if images is not None:
            return write_square(pixels, images)
        if self.cuts:
            return write_shrunk(pixels, self.found.store, self.files, self.spec, self.pool)
        work = DecodeTask(self.found.store, self.files, self.spec)
        return write_rows(pixels, work, len(self.files), self.spec, self.pool)


def read_headers(found: SourceIndex, files: list[str]) -> list[Header]:
    """The headers of up to 1,000 images, spread evenly over all splits.

    Raises:
        DataError: none of them can be read.
    """
    headers: list[Header] = []
    fault = ""
    for file in files[:: max(1, len(files) // MAX_HEADERS)]:
        try:
            headers.append(read_header(found.store.read(file), found.root / file))
        except UnreadableImage as error:
            fault = fault or str(error)
    if not headers:
        images = counted(len(files), "image")
        raise DataError(
            f"none of {images} in {printable(found.root)} can be read; the first: {fault}; see whether a viewer opens "
            "them, and copy or download them again if not"
        )
    return headers


def choose_input(
    headers: Sequence[Header], summary: SourceSummary, choices: DataChoices
) -> tuple[DecodeSpec, list[str]]:
    """Choose size and channels of the input; remarks about how images come to that size."""
    size = choices.size or (summary.side if summary.side <= SMALL_SIDE else LARGE_SIZE)
    channels = choices.channels or summary.channels
    shapes = Counter((header.width, header.height) for header in headers)
    remarks = []
    if size <= SMALL_SIDE and set(shapes) != {(size, size)}:
        (width, height), _ = shapes.most_common(1)[0]
        fitted = {"crop": "scaled and center-cropped", "pad": "scaled and padded", "squeeze": "squeezed"}[choices.fit]
        remarks.append(f"images are {fitted} to {size}x{size}; most are {width}x{height}")
    return choices.decode_spec(channels, size), remarks
