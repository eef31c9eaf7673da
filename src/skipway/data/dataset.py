"""`Data`: the splits of a source as batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skipway.data.augment import Augmentation
from skipway.data.batches import (
    AugmentationDraws,
    Batch,
    BatchTransform,
    normalize,
    rank_batches,
    rank_evaluation_batches,
)
from skipway.data.image_dataset import ImageDataset
from skipway.data.preprocessing import Preprocessing
from skipway.data.randomness import permutation
from skipway.data.ranks import check_ranks
from skipway.data.sources.index import Inventory
from skipway.data.sources.splits import SPLITS, Split
from skipway.data.split import Splits

__all__ = ["Data"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """The training, validation and test images of a source, with the preprocessing that any other image needs.

    Args:
        name: of the source, or "digits".
        preprocessing: classes, size, mean and deviation, and all else that any other image needs.
        augmentation: of the training images.
        train: images that are learned from.
        validation: images that the best epoch is chosen on; empty where there is no such split.
        test: images that the result is measured on, once, at the end.
        splits: which image is in which split, and which splits were split off here.
        unreadable: (file, reason) of every image that was skipped.
        duplicates: groups of files with the same content.
        leaked: (file of an earlier split, file of a later one) with the same content: training, validation, test.
        remarks: sentences about what a user may not expect.
    """

    name: str
    preprocessing: Preprocessing
    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset
    augmentation: Augmentation
    splits: Splits
    unreadable: tuple[tuple[str, str], ...] = ()
    remarks: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()
    leaked: tuple[tuple[str, str], ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their numbers."""
        return self.preprocessing.classes

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self.preprocessing.channels

    @property
    def size(self) -> int:
        """Side of the square input in pixels."""
        return self.preprocessing.size

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel in [0, 1]; subtracted from the input."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel; the input is divided by it."""
        return self.preprocessing.std

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when an image is added, removed, renamed or changes its split."""
        return self.splits.fingerprint

    @property
    def inventory(self) -> Inventory:
        """Every file of the source: read, by split and class, or left out, by reason; damaged ones are left out."""
        read: Counter[tuple[Split, str]] = Counter()
        for split in SPLITS:
            read.update((split, self.classes[sample.label]) for sample in getattr(self.splits, split))
        left_out = self.splits.left_out.counts + Counter(reason for _, reason in self.unreadable)
        return Inventory(read=read, left_out=left_out)

    @property
    def listed(self) -> dict[str, list[str]]:
        """The names of the images of each split; `DataChoices.listed` takes them."""
        return {split: list(getattr(self, split).names) for split in SPLITS}

    def train_batches(
        self,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        device: torch.device,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        size: int | None = None,
    ) -> Iterator[Batch]:
        """Yield the batches `start`, `start + 1`, … of an epoch, augmented and normalised.

        Order and augmentation are functions of (seed, epoch, image), so a run that resumes at any batch sees the same
        batches. The incomplete last batch is dropped; each epoch leaves out other images.

        Args:
            seed: of the run.
            epoch: from 0.
            batch_size: images per step, over all ranks.
            device: of the batches; augmentation runs there.
            start: the first batch.
            rank: the contiguous slice of every batch to yield; mixing is as in the whole batch.
            world: number of ranks.
            size: side to resize the batch to, for progressive resizing; None keeps the input size.

        Raises:
            DataError: `batch_size` is not divisible by the ranks, or by twice as many where images are mixed in pairs.
            UnreadableImage: a file changed since it was inspected.
        """
        check_ranks(batch_size, rank, world, self.augmentation.mixes)
        order = permutation(len(self.train), seed, epoch)
        batches = rank_batches(order, batch_size, start, rank, world)
        yield from self.augmented(self.augmentation, batches, seed, epoch, device, size)

    def view_batches(
        self, *, seed: int, view: int, batch_size: int, device: torch.device, start: int = 0
    ) -> Iterator[Batch]:
        """Yield the training images from number `start` on once, in order, augmented as in epoch `view` but not mixed.

        An image is a function of (seed, view, image), whatever the batch size.
        """
        batches = list(torch.arange(start, len(self.train)).split(batch_size))
        augmentation = replace(self.augmentation, mixup=0.0, cutmix=0.0)
        yield from self.augmented(augmentation, batches, seed, view, device, None)

    def augmented(
        self,
        augmentation: Augmentation,
        batches: Sequence[Tensor],
        seed: int,
        epoch: int,
        device: torch.device,
        size: int | None,
    ) -> Iterator[Batch]:
        """Yield batches of training images by their numbers, with the augmentation of an epoch."""
        if not batches:
            return
        draws = AugmentationDraws.of(augmentation, len(self.train), seed, epoch)
        vary = BatchTransform(augmentation, draws, self.mean, self.std, self.train.labels, len(self.classes), size)
        cut = draws.crop if augmentation.crop == "resized" else None
        for images, numbers in zip(self.train.fetch(batches, device, cut), batches, strict=True):
            yield vary(images, numbers)

    def evaluation_batches(
        self,
        split: Split,
        *,
        batch_size: int,
        device: torch.device,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Batch]:
        """Yield the images of a split from number `start` on once, in order and not augmented; each on exactly one of
        the ranks.
        """
        check_ranks(max(batch_size, world) // world * world, rank, world, False)
        images: ImageDataset = getattr(self, split)
        batches = [part + start for part in rank_evaluation_batches(len(images) - start, batch_size, rank, world)]
        if not batches:
            return
        for pixels, numbers in zip(images.fetch(batches, device, None), batches, strict=True):
            labels = images.labels[numbers].to(device)
            yield Batch(self.normalised(pixels), labels, labels, numbers)

    def sample(self, count: int, *, seed: int, device: torch.device) -> Batch:
        """Up to `count` training images, not augmented, drawn regardless of class."""
        order = permutation(len(self.train), seed, 0)[:count]
        inputs, labels = self.normalised(next(self.train.fetch([order], device, None))), self.train.labels[order]
        return Batch(inputs, labels.to(device), labels.to(device), order)

    def steps(self, batch_size: int) -> int:
        """Number of complete batches in an epoch."""
        return len(self.train) // batch_size

    def normalised(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / std; uint8 (N, H, W, C) -> float32 (N, C, H, W) in channels-last memory."""
        return normalize(images, self.mean, self.std)
