"""The images of one part of the data: decoded in memory, or in their source and decoded when asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from skipway.data.cache.images import CropTask
from skipway.data.cache.store import PixelFile
from skipway.data.decode import DecodeSpec, UnreadableImage
from skipway.data.inspection import DecodeTask, ImageInfo, InspectTask
from skipway.data.pool import WorkerPool
from skipway.data.sources.readers import ImageStore
from skipway.data.split import ImageSample
from skipway.errors import printable

__all__ = [
    "DecodedImages",
    "FileDataset",
    "ImageDataset",
    "MemoryDataset",
    "Progress",
    "decode_files",
    "inspect_images",
]

Progress = Callable[[int, int], None]

# decoded images up to so many bytes are moved to the device as a whole
RESIDENT_BYTES = 2 * 1024**3
CHUNK = 256


class ImageDataset(ABC):
    """Images with class numbers, in any order.

    `labels` is int64 of shape (N,); `names` holds N names for messages.
    """

    labels: Tensor
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def subset(self, numbers: Tensor) -> ImageDataset:
        """The images of the given numbers, int64 (M,), which share what is decoded."""

    @abstractmethod
    def fetch(self, batches: Sequence[Tensor], device: torch.device, draws: Tensor | None) -> Iterator[Tensor]:
        """Yield, for each of `batches`, int64 numbers (B,) on the CPU, the uint8 images (B, H, W, C) on `device`.

        `draws` has a row for each image, which its random crop is made by where files are decoded; None: central
        crops.
        """


class DecodedImages:
    """Decoded images, uint8 (N, H, W, C), in memory or memory-mapped; several data sets may share them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.resident: Tensor | None = None

    def gather(self, rows: Tensor, device: torch.device) -> Tensor:
        """The images of `rows`, int64 (B,) on the CPU, on `device`; up to 2 GB are moved there once as a whole."""
        if device.type == "cpu":
            return self.images[rows]
        if self.images.nbytes > RESIDENT_BYTES:
            return self.images[rows].to(device)
        if self.resident is None or self.resident.device != device:
            self.resident = self.images.to(device)
        return self.resident[rows.to(device)]


@final
class MemoryDataset(ImageDataset):
    """Images that are decoded: the given rows of a `DecodedImages`."""

    def __init__(
        self, decoded: DecodedImages | Tensor, labels: Tensor, names: Sequence[str], rows: Tensor | None = None
    ) -> None:
        self.decoded = DecodedImages(decoded) if isinstance(decoded, Tensor) else decoded
        self.labels = labels
        self.names = names
        self.rows = torch.arange(len(labels)) if rows is None else rows

    def subset(self, numbers: Tensor) -> MemoryDataset:
        names = [self.names[number] for number in numbers.tolist()]
        return MemoryDataset(self.decoded, self.labels[numbers], names, self.rows[numbers])

    @property
    def images(self) -> Tensor:
        """All images: uint8 (N, H, W, C)."""
        return self.decoded.images[self.rows]

    def fetch(self, batches: Sequence[Tensor], device: torch.device, draws: Tensor | None) -> Iterator[Tensor]:
        for chosen in batches:
            yield self.decoded.gather(self.rows[chosen], device)


@final
class FileDataset(ImageDataset):
    """Images that stay in their source: each is decoded and cropped when its batch is fetched.

    Args:
        store: reads the files.
        samples: names and classes.
        spec: format of the result.
        crop: random crops in training; in evaluation always the central crop of the spec.
        pool: workers that decode.
        stored: images decoded at a higher resolution than the input's, which are cropped instead: (file, number of its
            images, row of each sample). None: decode the files.
        tolerated: number of damaged files, for each of which the next image of its class is taken; None: all files
            were inspected, and none may be damaged.
    """

    def __init__(
        self,
        store: ImageStore,
        samples: Sequence[ImageSample],
        *,
        spec: DecodeSpec,
        crop: bool,
        pool: WorkerPool,
        stored: tuple[PixelFile, int, np.ndarray] | None = None,
        tolerated: int | None = None,
    ) -> None:
        self.tolerated = tolerated
        self.damaged: dict[int, str] = {}
        self.store = store
        self.samples = samples
        self.spec = spec
        self.crop = crop
        self.pool = pool
        self.stored = stored
        self.labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
        self.names = [sample.file for sample in samples]

    def subset(self, numbers: Tensor) -> FileDataset:
        samples = [self.samples[number] for number in numbers.tolist()]
        stored = None if self.stored is None else (*self.stored[:2], self.stored[2][numbers.numpy()])
        choices = {"spec": self.spec, "crop": self.crop, "pool": self.pool, "tolerated": self.tolerated}
        return FileDataset(self.store, samples, **choices, stored=stored)  # type: ignore[arg-type]

    def fetch(self, batches: Sequence[Tensor], device: torch.device, draws: Tensor | None) -> Iterator[Tensor]:
        rows = draws.numpy() if self.crop and draws is not None else None
        # random crops are scaled bilinearly, in two thirds of the time
        spec = self.spec if rows is None else self.spec._replace(resample="bilinear")
        if self.stored is None:
            work = DecodeTask(self.store, self.names, spec, rows)
        else:
            work = CropTask(*self.stored, spec, rows)
        numbers = [chosen.tolist() for chosen in batches]
        for (images, reasons), batch in zip(
            self.pool.batches(work, numbers, pin=device.type == "cuda"), numbers, strict=True
        ):
            for place, reason in enumerate(reasons):
                if reason:
                    self.decode_other(work, batch[place], images[place].numpy(), reason)
            yield images.to(device, non_blocking=True)

    def decode_other(self, work: DecodeTask | CropTask, index: int, row: np.ndarray, reason: str) -> None:
        """Decode the next image of the same class in the place of a damaged one that was not inspected.

        Raises:
            UnreadableImage: all images were inspected, too many are damaged, or all of the class; or the cache of
                decoded images is lost.
        """
        if self.stored is not None:
            raise UnreadableImage(self.stored[0].path, reason)
        file = self.store.root / self.names[index]
        if self.tolerated is None:
            raise UnreadableImage(file, f"changed while training: {reason}")
        known = index in self.damaged
        self.damaged[index] = reason
        if len(self.damaged) <= self.tolerated:
            alike = (self.labels == self.labels[index]).nonzero().flatten().tolist()
            alike.sort(key=lambda other: other < index)
            for other in alike:
                if other not in self.damaged and not work(other, row):
                    if self.pool.remark is not None and not known:
                        text = f"{printable(file)}: {reason}; {printable(self.names[other])} takes its place"
                        self.pool.remark(text)
                    return
        raise UnreadableImage(file, f"not inspected before training: {reason}")


def inspect_images(
    store: ImageStore,
    files: Sequence[str],
    pool: WorkerPool,
    *,
    spec: DecodeSpec,
    keep: Callable[[Sequence[str], Sequence[ImageInfo]], object],
    decoded: bool = False,
    progress: Progress | None = None,
) -> Tensor | None:
    """Inspect every image, and give names and infos of each part to `keep` as soon as they are known; with `decoded`,
    also decode them: uint8 (N, H, W, C), zeros where one cannot be read.
    """
    shape = (len(files), spec.size, spec.size, spec.channels)
    pixels = torch.zeros(shape, dtype=torch.uint8) if decoded else None
    done = 0
    batches = [range(start, min(start + CHUNK, len(files))) for start in range(0, len(files), CHUNK)]
    for images, found in pool.batches(InspectTask(store, files, spec, decoded), batches):
        if pixels is not None:
            sound = torch.tensor([not info.reason for info in found])
            pixels[done : done + len(found)][sound] = images[sound]
        keep(files[done : done + len(found)], found)
        done += len(found)
        if progress is not None:
            progress(done, len(files))
    return pixels


def decode_files(
    store: ImageStore,
    samples: Sequence[ImageSample],
    *,
    channels: int,
    size: int,
    workers: int,
    progress: Progress | None = None,
) -> tuple[MemoryDataset, list[tuple[str, str]]]:
    """Decode images into memory. Returns the data set, and (file, reason) of each file that cannot be read."""
    files = [sample.file for sample in samples]
    infos: list[ImageInfo] = []
    pixels = inspect_images(
        store,
        files,
        WorkerPool(workers),
        spec=DecodeSpec(channels, size),
        keep=lambda _, found: infos.extend(found),
        decoded=True,
        progress=progress,
    )
    assert pixels is not None
    sound = [number for number, info in enumerate(infos) if not info.reason]
    labels = torch.tensor([samples[number].label for number in sound], dtype=torch.int64)
    bad = [(file, info.reason) for file, info in zip(files, infos, strict=True) if info.reason]
    return MemoryDataset(
        DecodedImages(pixels), labels, [files[number] for number in sound], torch.tensor(sound).long()
    ), bad
