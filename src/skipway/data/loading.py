"""A folder of images, or the embedded digits, made ready to train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from skipway.data.augmentation import DRAWS, Augmentation, crop_and_flip
from skipway.data.decoding import UnreadableImage, probe
from skipway.data.embedded import digits
from skipway.data.listing import Listing, Sample, list_folder, named, printable
from skipway.data.parts import (
    Batch,
    FilePart,
    MemoryPart,
    Part,
    Progress,
    default_workers,
    find_unreadable,
    read_all,
)
from skipway.data.randomness import permutation, uniforms
from skipway.errors import DataError

__all__ = ["Data", "load"]

Crop = Literal["auto", "pad", "resized", "none"]

# the input size of He 2015 and of ImageNet practice since
LARGE_SIZE = 224
# images up to this side are trained on at their own size
SMALL_SIDE = 64
# headers that are read to choose the input
PROBED = 1_000
# decoded sets up to this many bytes are kept in memory
MEMORY_BYTES = 2 * 1024**3

# per-channel statistics of ImageNet's training set in [0, 1], as torchvision and timm use them
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Images to train and to test on, with everything that another image needs to be treated alike.

    Args:
        name: of the folder, or "digits".
        classes: names in the order of their numbers.
        channels: 1 (grey) or 3 (RGB).
        size: side of the square input in pixels.
        mean: per channel in [0, 1]; subtracted from the input.
        std: per channel; the input is divided by it.
        augmentation: how training images are varied.
        fingerprint: changes when the folder's files change.
        held_out: share of each class that was held out here to test on; None if the folder brought a test part.
        listing: which file is where; None for the embedded digits.
        unreadable: (file, reason) of every image that was left out.
        remarks: one sentence each about what a user may not expect.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    size: int
    train: Part
    test: Part
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    fingerprint: str
    held_out: float | None
    listing: Listing | None = None
    unreadable: tuple[tuple[str, str], ...] = ()
    remarks: tuple[str, ...] = ()

    def train_batches(
        self,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        device: torch.device,
        start: int = 0,
    ) -> Iterator[Batch]:
        """Batches `start`, `start + 1`, ... of an epoch: inputs (B, C, H, W), channels last, and class numbers (B,).

        Order and augmentation are functions of (seed, epoch, image), so a run that starts again at any batch sees
        what it would have seen. Incomplete last batches are dropped; another epoch leaves out other images.
        """
        order = permutation(len(self.train), seed, epoch)[start * batch_size : self.steps(batch_size) * batch_size]
        if not len(order):
            return
        draws = uniforms(len(self.train), DRAWS, seed, epoch)
        labels, on_device = self.train.labels.to(device), draws.to(device)
        vary = self.augmentation
        fill = torch.tensor(self.mean, device=device).mul(255).round()
        batches = self.train.fetch(order, batch_size, device, draws if vary.crop == "resized" else None)
        for images, numbers in batches:
            varied = crop_and_flip(images, on_device[numbers], fill, pad=vary.pad, flip=vary.flip)
            yield self.normalised(varied), labels[numbers]

    def test_batches(self, *, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """All test images once, in order and unvaried: inputs (B, C, H, W), channels last, and class numbers (B,)."""
        labels = self.test.labels.to(device)
        for images, numbers in self.test.fetch(torch.arange(len(self.test)), batch_size, device, None):
            yield self.normalised(images), labels[numbers]

    def sample(self, count: int, *, seed: int, device: torch.device) -> Tensor:
        """`count` training images as they are, drawn without regard to class: inputs (count, C, H, W)."""
        order = permutation(len(self.train), seed, 0)[:count]
        images, _ = next(self.train.fetch(order, count, device, None))
        return self.normalised(images)

    def steps(self, batch_size: int) -> int:
        """Complete batches in an epoch."""
        return len(self.train) // batch_size

    def normalised(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / std; uint8 (N, H, W, C) -> float32 (N, C, H, W) in channels-last memory."""
        mean = torch.tensor(self.mean, device=images.device).mul(255)
        scale = torch.tensor(self.std, device=images.device).mul(255).reciprocal()
        return images.float().sub_(mean).mul_(scale).permute(0, 3, 1, 2)


def load(
    folder: Path | None = None,
    *,
    size: int | None = None,
    channels: int | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    crop: Crop = "auto",
    flip: bool | None = None,
    unreadable: Literal["skip", "stop"] = "skip",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Data:
    """The images of `folder`, or scikit-learn's handwritten digits for None.

    Small images are decoded once into memory; larger ones stay in their files, which are all read once here so that
    a damaged one is found now and not in the middle of an epoch. Nothing is written into the folder.

    Args:
        size: side of the input in pixels; None takes the images' own up to 64, else 224.
        channels: 1 or 3; None takes 1 if all images are grey.
        held_out: share of each class to test on when the folder has no test part, 0 < share < 1.
        seed: chooses which images are held out.
        crop: see `Augmentation`; "auto" pads inputs up to 64 pixels by an eighth and cuts parts out of larger ones.
        flip: mirror half of the training images; None does, except for the digits, which it would turn into others.
        unreadable: leave damaged files out, or raise at the first.
        workers: processes that decode; None takes one per CPU core, none for a few files.
        progress: called with (done, all) while files are read.

    Raises:
        DataError: the folder cannot be trained on; the message names the file or class.
        MissingExtraError: the digits need scikit-learn.

    >>> data = load()
    >>> data.name, len(data.train) + len(data.test), len(data.classes), data.size, data.channels
    ('digits', 1797, 10, 8, 1)
    """
    if folder is None:
        return load_digits(size=size, channels=channels, held_out=held_out, seed=seed, crop=crop, flip=flip)
    listing = list_folder(folder, held_out=held_out, seed=seed)
    size, channels, remarks = choose_input(listing, size, channels)
    augmentation = choose_augmentation(crop, size, flip is not False)
    workers = default_workers(len(listing.train) + len(listing.test)) if workers is None else workers
    reader = Reader(listing, channels, size, workers, progress)
    needed = (len(listing.train) + len(listing.test)) * size * size * channels
    in_memory = augmentation.crop != "resized" and needed <= MEMORY_BYTES
    train, test, bad = reader.into_memory() if in_memory else reader.as_files(augmentation.crop == "resized")
    if bad and unreadable == "stop":
        raise UnreadableImage(listing.root / bad[0][0], f"{bad[0][1]} (unreadable images are set to stop, not skip)")
    check_classes_left(listing, train, test, bad)
    mean, std = statistics(train.images) if isinstance(train, MemoryPart) else known_statistics(channels)
    return Data(
        name=folder.resolve().name,
        classes=listing.classes,
        channels=channels,
        size=size,
        train=train,
        test=test,
        mean=mean,
        std=std,
        augmentation=augmentation,
        fingerprint=listing.fingerprint,
        held_out=listing.held_out,
        listing=listing,
        unreadable=tuple(bad),
        remarks=tuple(remarks + listing_remarks(listing)),
    )


def load_digits(
    *, size: int | None, channels: int | None, held_out: float, seed: int, crop: Crop, flip: bool | None
) -> Data:
    """The embedded digits; scaled and repeated in every channel where another size or colour is asked for."""
    classes, train, test = digits(held_out=held_out, seed=seed)
    size, channels = size or train.images.shape[1], channels or 1
    if crop == "resized":
        raise DataError("crop 'resized' cuts parts out of image files; the embedded digits have none: use 'pad'")
    for part in (train, test):
        part.images = enlarged(part.images, size, channels)
    mean, std = statistics(train.images)
    return Data(
        name="digits",
        classes=classes,
        channels=channels,
        size=size,
        train=train,
        test=test,
        mean=mean,
        std=std,
        augmentation=choose_augmentation("pad" if crop == "auto" else crop, size, flip is True),
        fingerprint="digits",
        held_out=held_out,
    )


class Reader:
    """Reads both parts of a listing, in either way, and reports progress over both."""

    def __init__(self, listing: Listing, channels: int, size: int, workers: int, progress: Progress | None) -> None:
        self.listing = listing
        self.channels = channels
        self.size = size
        self.workers = workers
        self.progress = progress

    def after(self, done: int) -> Progress | None:
        """The progress of a part when `done` files were read before it."""
        if self.progress is None:
            return None
        report, total = self.progress, len(self.listing.train) + len(self.listing.test)
        return lambda number, _: report(done + number, total)

    def into_memory(self) -> tuple[MemoryPart, MemoryPart, list[tuple[str, str]]]:
        """Both parts decoded, and the files that could not be."""
        root, shape = (
            self.listing.root,
            {"channels": self.channels, "size": self.size, "workers": self.workers},
        )
        train, bad_train = read_all(root, self.listing.train, **shape, progress=self.after(0))
        test, bad_test = read_all(root, self.listing.test, **shape, progress=self.after(len(self.listing.train)))
        return train, test, bad_train + bad_test

    def as_files(self, crop: bool) -> tuple[FilePart, FilePart, list[tuple[str, str]]]:
        """Both parts left in their files, and the files that cannot be decoded."""
        root, bad = self.listing.root, []
        parts = []
        for samples, done in ((self.listing.train, 0), (self.listing.test, len(self.listing.train))):
            failed = find_unreadable(root, samples, workers=self.workers, progress=self.after(done))
            names = {file for file, _ in failed}
            kept: list[Sample] = [sample for sample in samples if sample.file not in names]
            shape = {"channels": self.channels, "size": self.size, "workers": self.workers}
            parts.append(FilePart(root, kept, crop=crop, **shape))
            bad += failed
        return parts[0], parts[1], bad


def choose_input(listing: Listing, size: int | None, channels: int | None) -> tuple[int, int, list[str]]:
    """Input size and channels, from the headers of up to 1,000 images spread evenly over both parts."""
    files = listing.train + listing.test
    stride = max(1, len(files) // PROBED)
    probes: list[tuple[int, int, bool]] = []
    for sample in files[::stride]:
        try:
            probes.append(probe(listing.root / sample.file))
        except UnreadableImage:
            continue
    if not probes:
        first = listing.root / files[0].file
        raise DataError(f"none of the {len(files)} images in {printable(listing.root)} can be read; the first: {first}")
    shorter = max(min(width, height) for width, height, _ in probes)
    size = size or (shorter if shorter <= SMALL_SIDE else LARGE_SIZE)
    channels = channels or (1 if all(grey for _, _, grey in probes) else 3)
    shapes = Counter((width, height) for width, height, _ in probes)
    remarks = []
    if size <= SMALL_SIDE and set(shapes) != {(size, size)}:
        (width, height), _ = shapes.most_common(1)[0]
        remarks.append(f"images are scaled and cut to a central {size}x{size}; most are {width}x{height}")
    return size, channels, remarks


def choose_augmentation(crop: Crop, size: int, flip: bool) -> Augmentation:
    """Padding by an eighth of the side, 4 pixels at 32 as in He 2015, for small inputs; cut-out parts for large ones.

    >>> choose_augmentation("auto", 32, True)
    Augmentation(crop='pad', pad=4, flip=True)
    """
    if crop == "auto":
        crop = "pad" if size <= SMALL_SIDE else "resized"
    return Augmentation(crop=crop, pad=max(1, round(size / 8)) if crop == "pad" else 0, flip=flip)


def check_classes_left(listing: Listing, train: Part, test: Part, bad: list[tuple[str, str]]) -> None:
    """Leaving out damaged files must not leave a class without training images, or nothing to test on."""
    counts = torch.bincount(train.labels, minlength=len(listing.classes))
    empty = [name for name, count in zip(listing.classes, counts.tolist(), strict=True) if not count]
    if empty:
        file, reason = bad[0]
        raise DataError(
            f"class {named(empty)} has no readable training image; {len(bad)} files cannot be read, "
            f"the first: {printable(listing.root / file)}: {reason}"
        )
    if not len(test):
        raise DataError(f"no test image in {printable(listing.root)} can be read")


def listing_remarks(listing: Listing) -> list[str]:
    """What was found in the folder and is not used."""
    remarks = []
    if listing.ignored:
        counted = ", ".join(f"{count} {printable(suffix)}" for suffix, count in listing.ignored.most_common(5))
        remarks.append(f"files ignored as not images: {counted}")
    if listing.unused:
        remarks.append(f"folder not used: {', '.join(listing.unused)}")
    tested = {sample.label for sample in listing.test}
    missing = [name for number, name in enumerate(listing.classes) if number not in tested]
    if missing:
        remarks.append(f"no test image of class {named(missing)}")
    return remarks


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images (N, H, W, C), in [0, 1], exact by their histogram.

    A channel that is the same everywhere gets the standard deviation 1.

    >>> statistics(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
    ((0.5,), (0.5,))
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(images.shape[-1]):
        weights = torch.bincount(images[..., channel].flatten(), minlength=256).double()
        weights /= weights.sum()
        mean = float(weights @ values)
        means.append(mean)
        deviations.append(float(weights @ (values - mean) ** 2) ** 0.5 or 1.0)
    return tuple(means), tuple(deviations)


def known_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet's statistics, or their means over the colours for grey images."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)


def enlarged(images: Tensor, size: int, channels: int) -> Tensor:
    """Grey images (N, H, W, 1) at another size, repeated in every channel: (N, size, size, channels)."""
    if images.shape[1] != size:
        planes = images.permute(0, 3, 1, 2).float()
        planes = nn.functional.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
        images = planes.round().to(torch.uint8).permute(0, 2, 3, 1)
    return images.expand(-1, -1, -1, channels).contiguous()
