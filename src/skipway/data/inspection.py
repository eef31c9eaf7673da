"""Inspection of image files: readable or not, content hash, size, transparency; and remarks about a whole source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from skipway.data.augment.crops import random_box
from skipway.data.decode import MIN_SIDE, DecodeSpec, UnreadableImage, decode, decode_with_header
from skipway.data.fit import Fit
from skipway.data.sources.folders import UNSORTED
from skipway.data.sources.index import SourceIndex, name_list
from skipway.data.sources.readers import ImageStore
from skipway.errors import counted

__all__ = ["DecodeTask", "ImageInfo", "InspectTask", "content_remarks", "duplicate_groups"]

# ratio of class sizes from which imbalance is remarked
IMBALANCE = 10
LONGEST_ASPECT = 10
# share of the area that a central crop loses, over all images, from which it is remarked
LOST_AREA = 1 / 3
# difference between the fractions of transparent images of two classes that is remarked
ALPHA_DIFFERENCE = 0.5


class ImageInfo(NamedTuple):
    """The result of inspecting a file: the reason why it cannot be used, or "", and its header.

    `digest` is the SHA-256 of the content in hexadecimal, "" if nothing could be read.
    """

    reason: str
    digest: str = ""
    width: int = 0
    height: int = 0
    alpha: bool = False
    moving: bool = False


class InspectTask:
    """Task: inspect each image; with `pixels`, also decode it into its row."""

    def __init__(self, store: ImageStore, files: Sequence[str], spec: DecodeSpec, pixels: bool) -> None:
        self.store = store
        self.files = files
        self.spec = spec
        # without pixels, at the lowest resolution
        self.decoding = spec if pixels else spec._replace(channels=1, size=MIN_SIDE)
        self.shape = (spec.size, spec.size, spec.channels) if pixels else None

    def __call__(self, index: int, row: np.ndarray | None) -> ImageInfo:
        file = self.files[index]
        name = self.store.root / file
        digest = ""
        try:
            content = self.store.read(file)
            digest = hashlib.sha256(content).hexdigest()
            header, pixels = decode_with_header(content, self.decoding, limits=self.spec, name=name)
            if row is not None:
                row[:] = pixels
        except UnreadableImage as error:
            return ImageInfo(error.reason, digest)
        return ImageInfo("", digest, header.width, header.height, header.alpha, header.moving)


class DecodeTask:
    """Task: decode each image into its row, cropped by its own draws. Returns the reason of a failure, or "".

    Args:
        store: reads the files.
        files: names of the images.
        spec: format of the result.
        draws: random numbers of the crops, float (N, DRAWS); None: central crops.
    """

    def __init__(
        self, store: ImageStore, files: Sequence[str], spec: DecodeSpec, draws: np.ndarray | None = None
    ) -> None:
        self.store = store
        self.files = files
        self.spec = spec
        self.draws = draws
        self.shape = (spec.size, spec.size, spec.channels)

    def __call__(self, index: int, row: np.ndarray | None) -> str:
        file, box = self.files[index], None if self.draws is None else random_box(self.draws[index])
        try:
            pixels = decode(self.store.read(file), self.spec, box=box, name=self.store.root / file)
        except UnreadableImage as error:
            return error.reason
        if row is not None:
            row[:] = pixels
        return ""


def duplicate_groups(infos: dict[str, ImageInfo]) -> dict[str, tuple[str, ...]]:
    """For each file that has copies, the names of all files with its content.

    >>> duplicate_groups({"a": ImageInfo("", "1"), "b": ImageInfo("", "2"), "c": ImageInfo("", "1")})
    {'a': ('a', 'c'), 'c': ('a', 'c')}
    """
    by_digest: dict[str, list[str]] = {}
    for file, info in infos.items():
        if info.digest and not info.reason:
            by_digest.setdefault(info.digest, []).append(file)
    return {file: tuple(files) for files in by_digest.values() if len(files) > 1 for file in files}


def content_remarks(found: SourceIndex, infos: dict[str, ImageInfo], fit: Fit) -> list[str]:
    """Remarks about imbalance, transparency, animation and extreme shapes of the images."""
    remarks = []
    shapes = [(info.width, info.height) for info in infos.values() if info.width]
    lost = 1 - sum(min(shape) / max(shape) for shape in shapes) / max(1, len(shapes))
    if fit == "crop" and lost > LOST_AREA:
        remarks.append(
            f"the central crop leaves out {100 * lost:.0f} % of the area of the images; fit='pad' or fit='squeeze' "
            "keeps all of it"
        )
    counts, transparent, moving, long = {}, {}, 0, []
    for name in found.classes:
        usable = [info for file in found.train.get(name, []) if (info := infos.get(file)) and not info.reason]
        counts[name] = len(usable)
        transparent[name] = sum(info.alpha for info in usable) / max(1, len(usable))
    for file, info in infos.items():
        moving += info.moving
        if info.width and max(info.width, info.height) > LONGEST_ASPECT * min(info.width, info.height):
            long.append(file)
    full = {name: count for name, count in counts.items() if count}
    if full and max(full.values()) >= IMBALANCE * min(full.values()):
        most, least = max(full, key=full.__getitem__), min(full, key=full.__getitem__)
        remarks.append(
            f"classes differ in size: {name_list([most])} has {counted(full[most], 'image')}, "
            f"{name_list([least])} {full[least]}"
        )
    unsorted = [name for name in full if name.lower() in UNSORTED]
    if unsorted:
        remarks.append(
            f"{name_list(unsorted)} is a class like the others, though its name says that its images have none: "
            f"leave the {counted(full[unsorted[0]], 'image')} out by moving the folder"
        )
    high, low = max(transparent, key=transparent.__getitem__), min(transparent, key=transparent.__getitem__)
    if transparent[high] - transparent[low] > ALPHA_DIFFERENCE:
        remarks.append(
            f"transparent images: {100 * transparent[high]:.0f} % of {name_list([high])}, "
            f"{100 * transparent[low]:.0f} % of {name_list([low])}; they are put on white, so the background may "
            "reveal the class"
        )
    if moving:
        remarks.append(f"{counted(moving, 'animated image')}: only the first frame is used")
    if long:
        remarks.append(
            f"{counted(len(long), 'image')} more than {LONGEST_ASPECT} times as long as wide: {name_list(long, 3)}"
        )
    return remarks
