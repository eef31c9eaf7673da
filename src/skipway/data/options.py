"""The options of `skipway.data.load`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from skipway.data.augment import Augmentation
from skipway.data.augment.settings import Policy
from skipway.data.decode import MAX_MEGAPIXELS, DecodeSpec, Grey16
from skipway.data.fit import FITS, RESAMPLES, Fit, Resample, evaluation_share
from skipway.data.pool import WorkerKind
from skipway.data.sources.detect import COLUMNS
from skipway.data.split import Fold
from skipway.errors import DataError

__all__ = ["SMALL_SIDE", "Crop", "DataChoices"]

Crop = Literal["auto", "pad", "resized", "none"]

# images up to this side are used at their own size
SMALL_SIDE = 64

# field: (predicate, the rule in words)
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "size": (lambda value: value is None or 8 <= value <= 4096, "8 to 4096 pixels, or None"),
    "channels": (lambda value: value in (None, 1, 3), "1 (grey), 3 (colour) or None"),
    "holdout": (lambda value: 0 < value < 1, "between 0 and 1"),
    "validation": (lambda value: 0 <= value < 1, "from 0 to below 1"),
    "fold": (lambda value: value is None or 1 <= value[0] <= value[1] >= 2, "(number, count), 1 <= number <= count"),
    "crop": (lambda value: value in ("auto", "pad", "resized", "none"), "auto, pad, resized or none"),
    "unreadable": (lambda value: value in ("skip", "stop"), "skip or stop"),
    "most_unreadable": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "grey16": (lambda value: value in ("range", "minmax"), "range or minmax"),
    "fit": (lambda value: value in FITS, "crop, pad or squeeze"),
    "crop_share": (lambda value: value is None or 0 < value <= 1, "above 0, to 1, or None"),
    "resample": (lambda value: value is None or value in RESAMPLES, "bicubic or bilinear, or None"),
    "mean": (lambda value: value is None or all(0 <= each <= 1 for each in value), "numbers from 0 to 1, or None"),
    "std": (lambda value: value is None or all(0 < each <= 1 for each in value), "numbers above 0, to 1, or None"),
    "inspect": (lambda value: value is None or value >= 1, "1 or more, or None"),
    "max_megapixels": (lambda value: 0 < value <= 10_000, "above 0, to 10000"),
    "subfolders": (lambda value: value in ("merge", "classes"), "merge or classes"),
    "workers": (lambda value: value is None or 0 <= value <= 256, "from 0 to 256, or None"),
    "helpers": (lambda value: value in ("threads", "processes"), "threads or processes"),
    "policy": (lambda value: value in ("none", "trivial", "rand"), "none, trivial or rand"),
    "mixup": (lambda value: 0 <= value <= 100, "from 0 (off) to 100"),
    "cutmix": (lambda value: 0 <= value <= 100, "from 0 (off) to 100"),
    "erasing": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "columns": (
        lambda value: len(value) in (2, 3) and all(value),
        "two or three names: image, label and, if any, split",
    ),
}


@dataclass(frozen=True, kw_only=True)
class DataChoices:
    """The source of the images, and how they are split, decoded, checked, cached and augmented.

    Args:
        source: a folder of class folders, with or without `train`, `val` and `test`; a list in CSV, TSV or Parquet; a
            tar file, a folder or a brace pattern of tar shards; a folder that `datasets` saved, or "hf:NAME" to fetch;
            None: the embedded digits.
        size: side of the square input in pixels; None: the size of the images up to 64, else 224.
        channels: 1 (grey) or 3 (RGB); None: 1 if all images are grey.
        holdout: fraction of each class to hold out as the test split where the source has none, 0 < holdout < 1.
        validation: fraction of each class of the training split to hold out as the validation split where the source
            has none; 0: no validation split.
        fold: (number, count): fold `number`, from 1, of a cross-validation is the test split.
        listed: names of the images of each split, as `Data.listed` has them: taken if the images are still the same.
        seed: chooses the images that are held out.
        crop: random crop, see `Augmentation`; "auto": "pad" by an eighth of the side for inputs up to 64 pixels, else
            "resized".
        flip: random horizontal flip; None: on, but for the digits, which it would make illegible.
        unreadable: "skip" damaged files, or "stop" at the first with an error.
        most_unreadable: fraction of damaged files, rounded up to a whole file, above which it is an error in any case.
        grey16: scale 16-bit grey by its full range ("range"), or by the range of each image ("minmax").
        fit: how a rectangular image becomes a square input: its centre is cropped ("crop"), it is scaled as a whole and
            padded with grey ("pad"), or scaled to a square by different factors ("squeeze").
        crop_share: side of the central crop in evaluation, over the shorter side; None: 224/256 where training images
            are random crops, else 1.
        resample: the filter that images are scaled with; None: "bicubic". Random crops are always bilinear.
        mean: subtracted from each channel in [0, 1], one number or one per channel, of which grey images take the mean;
            None: the mean of the training images if they are decoded into memory, else that of ImageNet.
        std: each channel is divided by it; None: as `mean`.
        max_megapixels: limit for the pixels of one image as it is decoded; a larger one is refused. A JPEG that is not
            progressive is decoded at reduced scale and counts with that.
        subfolders: subfolders of class folders belong to the class ("merge"), or each folder that directly holds images
            is a class, named by its path ("classes").
        inspect: number of images to inspect before training, evenly spread, where they are not decoded into memory; the
            next image of its class takes the place of a damaged one among the others. None: all.
        allow_empty: keep a class that has no image.
        outside: follow links, and paths in lists, that lead out of the source's folder.
        workers: number of workers that decode; None: one per CPU core, and 0, this process, for few files.
        helpers: "threads" or "processes".
        cache: True: cache the inspection of the files and the decoded images, in the user cache folder of the platform
            or `$SKIPWAY_CACHE`; a path: in that folder. Images for random crops are cached at 256/224 of the input's
            side, which is faster and a little less sharp. None: cache thousands of files that are decoded into memory,
            and only the inspection of larger images. False: cache nothing.
        duplicates: look for files with the same content, and keep them together when images are split.
        policy: see `Augmentation`.
        mixup: see `Augmentation`.
        cutmix: see `Augmentation`.
        erasing: see `Augmentation`.
        columns: names of the columns of a list: image, label, and split, which is optional; by default the content
            decides.

    Raises:
        DataError: a value outside its rule.

    >>> DataChoices(holdout=2.0)
    Traceback (most recent call last):
    ...
    skipway.errors.DataError: holdout=2.0: the rule is between 0 and 1
    """

    source: Path | str | None = None
    size: int | None = None
    channels: int | None = None
    holdout: float = 0.2
    validation: float = 0.1
    fold: tuple[int, int] | None = None
    listed: Mapping[str, Sequence[str]] | None = None
    seed: int = 0
    crop: Crop = "auto"
    flip: bool | None = None
    unreadable: Literal["skip", "stop"] = "skip"
    most_unreadable: float = 0.01
    grey16: Grey16 = "range"
    fit: Fit = "crop"
    crop_share: float | None = None
    resample: Resample | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    max_megapixels: float = MAX_MEGAPIXELS
    subfolders: Literal["merge", "classes"] = "merge"
    inspect: int | None = None
    allow_empty: bool = False
    outside: bool = False
    workers: int | None = None
    helpers: WorkerKind = "threads"
    cache: bool | Path | None = None
    duplicates: bool = True
    policy: Policy = "none"
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0
    columns: tuple[str, ...] = COLUMNS

    def __post_init__(self) -> None:
        for name, (allowed, rule) in RULES.items():
            value = getattr(self, name)
            try:
                good = allowed(value)
            except TypeError:
                good = False
            if not good:
                raise DataError(f"{name}={value!r}: the rule is {rule}")

    @property
    def splitting(self) -> dict[str, Any]:
        """The arguments of `split_index` that are chosen here."""
        fold = None if self.fold is None else Fold(*self.fold)
        names = ("holdout", "validation", "seed", "listed")
        return {**{name: getattr(self, name) for name in names}, "fold": fold}

    def decode_spec(self, channels: int, size: int) -> DecodeSpec:
        """How images are decoded for inputs of a number of channels and a size."""
        share = evaluation_share(self.augmentation(size).crop, self.fit) if self.crop_share is None else self.crop_share
        return DecodeSpec(channels, size, self.grey16, self.fit, self.max_megapixels, share, self.resample or "bicubic")

    def statistics(
        self, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation for each channel: as chosen, else the given ones.

        Raises:
            DataError: another number of channels was chosen for.

        >>> DataChoices(mean=(0.5,)).statistics((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
        ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
        """
        found = []
        for name, own in (("mean", mean), ("std", std)):
            chosen = getattr(self, name)
            if chosen is None:
                found.append(own)
            elif len(chosen) in (1, len(own)):
                found.append(tuple(chosen) * (len(own) // len(chosen)))
            elif len(own) == 1:
                found.append((sum(chosen) / len(chosen),))
            else:
                raise DataError(
                    f"{name}={chosen}: the rule is one number, or one for each of the {len(own)} channels of the images"
                )
        return found[0], found[1]

    def augmentation(self, size: int) -> Augmentation:
        """The augmentation at an input size: padding is an eighth of the side, 4 pixels at 32 as in He 2015.

        >>> small, large = (DataChoices().augmentation(size) for size in (32, 224))
        >>> small.crop, small.pad, large.crop
        ('pad', 4, 'resized')
        """
        crop = self.crop
        if crop == "auto":
            crop = "pad" if size <= SMALL_SIDE else "resized"
        return Augmentation(
            crop=crop,
            pad=max(1, round(size / 8)) if crop == "pad" else 0,
            flip=self.source is not None if self.flip is None else self.flip,
            policy=self.policy,
            erasing=self.erasing,
            mixup=self.mixup,
            cutmix=self.cutmix,
        )
