"""The images of one part of the data: decoded in memory, or in files that worker processes decode when asked."""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from skipway.data.augmentation import random_box
from skipway.data.decoding import UnreadableImage, central_share, check, decode
from skipway.data.listing import Sample

__all__ = ["Batch", "FilePart", "MemoryPart", "Part", "Progress", "find_unreadable", "read_all"]

Progress = Callable[[int, int], None]
Batch = tuple[Tensor, Tensor]

# He 2015 and torchvision test on the central 224 of a shorter side of 256
TEST_SHARE = 224 / 256
# below this many files, starting worker processes costs more than it saves
FEW_FILES = 2_000
CHUNK = 256


class Part(ABC):
    """Images with class numbers that can be asked for in any order.

    `labels` is int64 of shape (N,); `names` holds N names for messages.
    """

    labels: Tensor
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def fetch(self, order: Tensor, batch_size: int, device: torch.device, draws: Tensor | None) -> Iterator[Batch]:
        """Batches in the given order: uint8 images (B, H, W, C) and their numbers in this part (B,), on `device`.

        With `draws` each image is cut out by its own row, where this part decodes files; None is the central part.
        """


@final
class MemoryPart(Part):
    """Images decoded once: uint8 of shape (N, H, W, C)."""

    def __init__(self, images: Tensor, labels: Tensor, names: Sequence[str]) -> None:
        self.images = images
        self.labels = labels
        self.names = names

    def fetch(self, order: Tensor, batch_size: int, device: torch.device, draws: Tensor | None) -> Iterator[Batch]:
        images = self.images.to(device)
        for chosen in order.to(device).split(batch_size):
            yield images[chosen], chosen


@final
class FilePart(Part):
    """Images that stay in their files: each is decoded, and cut to size, when its batch comes."""

    def __init__(self, root: Path, samples: Sequence[Sample], *, channels: int, size: int, crop: bool, workers: int):
        self.root = root
        self.samples = samples
        self.channels = channels
        self.size = size
        self.crop = crop
        self.workers = workers
        self.labels = torch.tensor([sample.label for sample in samples])
        self.names = [sample.file for sample in samples]

    def fetch(self, order: Tensor, batch_size: int, device: torch.device, draws: Tensor | None) -> Iterator[Batch]:
        share = TEST_SHARE if self.crop else 1.0
        files = Decoded(self.root, self.samples, self.channels, self.size, draws if self.crop else None, share)
        batches = [chosen.tolist() for chosen in order.split(batch_size)]
        loader = make_loader(files, batches, self.workers, collate=collect, pin=device.type == "cuda")
        for images, numbers, failures in loader:
            for index, reason in failures:
                raise UnreadableImage(self.root / self.names[index], f"changed while training: {reason}")
            yield images.to(device, non_blocking=True), numbers.to(device, non_blocking=True)


Item = tuple[Tensor | None, int, str]
Collected = tuple[Tensor, Tensor, list[tuple[int, str]]]


class Decoded(Dataset[Item]):
    """Item i is (sample i as a uint8 tensor (H, W, C), i, ""), or (None, i, the reason why it cannot be read)."""

    def __init__(
        self,
        root: Path,
        samples: Sequence[Sample],
        channels: int,
        size: int,
        draws: Tensor | None,
        share: float,
    ) -> None:
        self.root = root
        self.samples = samples
        self.channels = channels
        self.size = size
        self.draws = draws
        self.share = share

    def __getitem__(self, index: int) -> Item:
        box = central_share(self.share) if self.draws is None else random_box(self.draws[index])
        path = self.root / self.samples[index].file
        try:
            pixels = decode(path, channels=self.channels, size=self.size, box=box)
        except UnreadableImage as error:
            return None, index, error.reason
        return torch.from_numpy(pixels.copy()), index, ""


def collect(items: list[Item]) -> Collected:
    """The images that were read as one tensor, their numbers, and (number, reason) of the others."""
    images = [image for image, _, _ in items if image is not None]
    numbers = [index for image, index, _ in items if image is not None]
    failures = [(index, reason) for image, index, reason in items if image is None]
    return (
        torch.stack(images) if images else torch.empty(0),
        torch.tensor(numbers, dtype=torch.int64),
        failures,
    )


class Checked(Dataset[tuple[int, str]]):
    """Item i is (i, the reason why the file cannot be used, or an empty string)."""

    def __init__(self, root: Path, samples: Sequence[Sample]) -> None:
        self.root = root
        self.samples = samples

    def __getitem__(self, index: int) -> tuple[int, str]:
        return index, check(self.root / self.samples[index].file)


def start_worker(_: int) -> None:
    """A worker leaves Ctrl-C to the main process, which finishes its step and ends the workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(
    dataset: Dataset[Any],
    batches: list[list[int]],
    workers: int,
    *,
    collate: Callable[..., Any],
    pin: bool = False,
) -> DataLoader[Any]:
    """A loader of exactly these batches of item numbers, in this order."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=min(workers, len(batches)),
        worker_init_fn=start_worker,
        collate_fn=collate,
        pin_memory=pin,
    )


def default_workers(files: int) -> int:
    """Worker processes for that many files: one per CPU core that this process may use, none for a few files."""
    if files < FEW_FILES:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


def chunks(count: int) -> list[list[int]]:
    """0 ... count - 1 in runs of CHUNK."""
    return [list(range(start, min(start + CHUNK, count))) for start in range(0, count, CHUNK)]


def read_all(
    root: Path,
    samples: Sequence[Sample],
    *,
    channels: int,
    size: int,
    workers: int,
    progress: Progress | None = None,
) -> tuple[MemoryPart, list[tuple[str, str]]]:
    """Decode all images into memory; the ones that cannot be read are left out and returned with their reasons."""
    files = Decoded(root, samples, channels, size, draws=None, share=1.0)
    images = torch.empty(len(samples), size, size, channels, dtype=torch.uint8)
    kept: list[int] = []
    unreadable: list[tuple[str, str]] = []
    for read, numbers, failures in make_loader(files, chunks(len(samples)), workers, collate=collect):
        if len(numbers):
            images[len(kept) : len(kept) + len(numbers)] = read
            kept.extend(numbers.tolist())
        unreadable.extend((samples[index].file, reason) for index, reason in failures)
        if progress is not None:
            progress(len(kept) + len(unreadable), len(samples))
    labels = torch.tensor([samples[index].label for index in kept], dtype=torch.int64)
    return MemoryPart(images[: len(kept)], labels, [samples[index].file for index in kept]), unreadable


def find_unreadable(
    root: Path, samples: Sequence[Sample], *, workers: int, progress: Progress | None = None
) -> list[tuple[str, str]]:
    """Decode every file once at the lowest resolution; the files that fail, with their reasons."""
    unreadable: list[tuple[str, str]] = []
    loader = make_loader(Checked(root, samples), chunks(len(samples)), workers, collate=list)
    for number, chunk in enumerate(loader):
        unreadable.extend((samples[index].file, reason) for index, reason in chunk if reason)
        if progress is not None:
            progress(min((number + 1) * CHUNK, len(samples)), len(samples))
    return unreadable
