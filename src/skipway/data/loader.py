"""`load`: read a source of images, or the embedded digits, and return a `Data` that is ready for training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipway.data.cache.store import PixelFile
from skipway.data.dataset import Data
from skipway.data.decode import DecodeSpec, UnreadableImage
from skipway.data.digits import digits
from skipway.data.image_dataset import DecodedImages, FileDataset, ImageDataset, MemoryDataset, Progress
from skipway.data.inspection import ImageInfo, content_remarks, duplicate_groups
from skipway.data.options import DataChoices
from skipway.data.pool import Remark, WorkerPool, default_workers
from skipway.data.preprocessing import Preprocessing
from skipway.data.source_reader import SourceReader, SourceSummary, choose_input, read_headers
from skipway.data.sources.detect import index_source
from skipway.data.sources.index import SourceIndex, name_list, names_alike, sorted_classes
from skipway.data.sources.readers import FileStore
from skipway.data.split import FEWEST_TO_VALIDATE, ImageSample, Splits, split_index
from skipway.errors import DataError, counted, printable

__all__ = ["load", "statistics"]


# per-channel statistics of ImageNet's training set in [0, 1], as torchvision and timm use them
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def load(
    source: Path | str | DataChoices | None = None,
    *,
    progress: Progress | None = None,
    remark: Remark | None = None,
    decide: Callable[[SourceSummary], Mapping[str, Any]] = lambda summary: {},
    **choices: Any,
) -> Data:
    """Read the images of `source`, or scikit-learn's handwritten digits for None, and split them.

    Small images are decoded into memory once; larger ones are decoded batch by batch. Every file is read to its end
    here, so that damaged ones are found now and not in the middle of an epoch. Nothing is written to the source.

    Args:
        source: see `DataChoices`; or a `DataChoices`.
        progress: called with (images done, images in all) while files are read.
        remark: called with a sentence when a later failure was recovered from, such as a worker that died.
        decide: called once before any image is decoded, with what is known of the source by then; returns fields of
            `DataChoices` that replace the given ones.
        choices: fields of `DataChoices`.

    Raises:
        DataError: the source cannot be trained on; the message names the file or class.
        MissingExtraError: the source needs a library that is not installed; the digits need scikit-learn.

    >>> data = load()
    >>> data.name, len(data.classes), data.size, data.channels
    ('digits', 10, 8, 1)
    >>> len(data.train), len(data.validation), len(data.test)
    (1295, 143, 359)
    """
    if isinstance(source, DataChoices):
        chosen = replace(source, **choices) if choices else source
    else:
        chosen = DataChoices(source=source, **choices)
    if chosen.source is None:
        return load_digits(chosen, decide)
    names = ("allow_empty", "outside", "columns", "subfolders")
    found = index_source(chosen.source, **{name: getattr(chosen, name) for name in names})
    files = found.files
    pool = WorkerPool(default_workers(len(files)) if chosen.workers is None else chosen.workers, chosen.helpers, remark)
    headers = read_headers(found, files)
    summary = SourceSummary.of(found, headers)
    chosen = replace(chosen, **decide(summary))
    spec, remarks = choose_input(headers, summary, chosen)
    reader = SourceReader(found, files, chosen, spec, pool, progress, remarks)
    pixels = reader.read()
    return assemble_data(reader, reader.known, pixels)


def assemble_data(reader: SourceReader, infos: dict[str, ImageInfo], pixels: DecodedImages | PixelFile | None) -> Data:
    """Split a source whose images have been inspected and make the `Data` of it."""
    found, choices, spec = reader.found, reader.choices, reader.spec
    bad = tuple((file, info.reason) for file, info in infos.items() if info.reason)
    check_readable(found, choices, bad, len(infos))
    groups = duplicate_groups(infos) if choices.duplicates else {}
    without = {file for file, _ in bad}
    try:
        splits = split_index(found, **choices.splitting, without=without, groups=groups)
    except DataError as error:
        raise DataError(f"{error}; not counted: {counted(len(bad), 'unreadable file')}") if bad else error from None
    if not splits.test:
        raise DataError(f"no test image in {printable(found.root)} can be read: repair them, or remove the test split")
    augmentation = choices.augmentation(spec.size)
    place = {file: number for number, file in enumerate(reader.files)}

    def part(samples: Sequence[ImageSample]) -> ImageDataset:
        rows = torch.tensor([place[sample.file] for sample in samples], dtype=torch.int64)
        if isinstance(pixels, DecodedImages):
            return memory_dataset(pixels, samples, rows)
        stored = None if pixels is None else (pixels, len(reader.files), rows.numpy())
        tolerated = None
        if len(infos) < len(reader.files):
            tolerated = math.ceil(choices.most_unreadable * len(samples)) if choices.unreadable == "skip" else 0
        return FileDataset(
            found.store, samples, spec=spec, crop=reader.cuts, pool=reader.pool, stored=stored, tolerated=tolerated
        )

    train, validation, test = part(splits.train), part(splits.validation), part(splits.test)
    mean, std = dataset_statistics(train) if isinstance(train, MemoryDataset) else imagenet_statistics(spec.channels)
    leaked = find_leaks(splits, groups)
    remarks = [
        *reader.remarks,
        *found.remarks,
        *split_remarks(splits),
        *content_remarks(found, infos, spec.fit),
        *copy_remarks(splits, groups, leaked),
    ]
    return Data(
        name=found.name,
        preprocessing=preprocessing_of(found.classes, spec, augmentation.crop, *choices.statistics(mean, std)),
        train=train,
        validation=validation,
        test=test,
        augmentation=augmentation,
        splits=splits,
        unreadable=bad,
        remarks=tuple(remarks),
        duplicates=tuple(dict.fromkeys(groups.values())),
        leaked=leaked,
    )


def preprocessing_of(
    classes: tuple[str, ...], spec: DecodeSpec, crop: Any, mean: tuple[float, ...], std: tuple[float, ...]
) -> Preprocessing:
    """The preprocessing that any other image needs, from what the images of the source were decoded with."""
    return Preprocessing(
        classes, spec.channels, spec.size, mean, std, crop, spec.grey16, spec.fit, spec.crop_share, spec.resample
    )


def memory_dataset(pixels: DecodedImages, samples: Sequence[ImageSample], rows: Tensor) -> MemoryDataset:
    """The data set of one split whose images are decoded: row `rows[i]` of `pixels` is sample i."""
    labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    return MemoryDataset(pixels, labels, [sample.file for sample in samples], rows)


def load_digits(choices: DataChoices, decide: Callable[[SourceSummary], Mapping[str, Any]]) -> Data:
    """The embedded digits, scaled to the requested size and repeated over the requested channels."""
    images, names = digits()
    classes = sorted_classes(name[0] for name in names)
    summary = SourceSummary(
        classes=classes,
        images=len(names),
        training=len(names),
        has_validation=False,
        has_test=False,
        side=images.shape[1],
        channels=1,
    )
    choices = replace(choices, **decide(summary))
    if choices.crop == "resized":
        raise DataError("crop='resized' needs image files, and the embedded digits are arrays: use 'pad' or 'none'")
    size, channels = choices.size or images.shape[1], choices.channels or 1
    pixels = DecodedImages(resize_digits(images, size, channels))
    by_class = {label: [name for name in names if name[0] == label] for label in classes}
    index = SourceIndex(store=FileStore(Path("digits")), name="digits", classes=classes, train=by_class)
    splits = split_index(index, **choices.splitting)

    def part(samples: Sequence[ImageSample]) -> MemoryDataset:
        return memory_dataset(pixels, samples, torch.tensor([int(sample.file[2:]) for sample in samples]).long())

    train, validation, test = part(splits.train), part(splits.validation), part(splits.test)
    mean, std = statistics(train.images)
    augmentation = replace(choices, crop="pad" if choices.crop == "auto" else choices.crop).augmentation(size)
    return Data(
        name="digits",
        preprocessing=preprocessing_of(
            classes, choices.decode_spec(channels, size), augmentation.crop, *choices.statistics(mean, std)
        ),
        train=train,
        validation=validation,
        test=test,
        augmentation=augmentation,
        splits=splits,
    )


def check_readable(found: SourceIndex, choices: DataChoices, bad: Sequence[tuple[str, str]], total: int) -> None:
    """Check that few of the inspected files are damaged, and that every class keeps training images.

    Raises:
        UnreadableImage: a file is damaged and `unreadable` is "stop".
        DataError: too many files are damaged, or all training images of a class.
    """
    if not bad:
        return
    (file, reason), without = bad[0], {file for file, _ in bad}
    first = f"{printable(found.root / file)}: {reason}"
    if choices.unreadable == "stop":
        raise UnreadableImage(found.root / file, f"{reason} (unreadable images are set to stop, not skip)")
    empty = [name for name, files in found.train.items() if files and without.issuperset(files)]
    if empty:
        raise DataError(
            f"class {name_list(empty)} has no readable training image; {counted(len(bad), 'file')} cannot be read, the "
            f"first: {first}; repair the files, or remove the class"
        )
    if len(bad) > math.ceil(choices.most_unreadable * total):
        raise DataError(
            f"{len(bad):,} of {counted(total, 'image')} cannot be read, the first: {first}. The rule is at "
            f"most most_unreadable={choices.most_unreadable:g} of all; repair or remove them, or raise that limit"
        )


def find_leaks(splits: Splits, groups: dict[str, tuple[str, ...]]) -> tuple[tuple[str, str], ...]:
    """Pairs (file, later file) of the same content, of which `file` is in an earlier split, in the order training,
    validation, test; one pair per image of the later split.
    """
    earlier = {sample.file for sample in splits.train}
    pairs = []
    for held in (splits.validation, splits.test):
        for sample in held:
            twin = next((file for file in groups.get(sample.file, ()) if file in earlier), None)
            if twin is not None:
                pairs.append((twin, sample.file))
        earlier |= {sample.file for sample in held}
    return tuple(pairs)


def copy_remarks(splits: Splits, groups: dict[str, tuple[str, ...]], leaked: Sequence[tuple[str, str]]) -> list[str]:
    """Remarks about files with the same content."""
    remarks = []
    label = {sample.file: sample.label for sample in splits.samples}
    distinct = [group for group in dict.fromkeys(groups.values()) if all(file in label for file in group)]
    if distinct:
        extra = sum(len(group) - 1 for group in distinct)
        pairs = "; ".join(" = ".join(printable(file) for file in group[:3]) for group in distinct[:3])
        rest = f"; and {len(distinct) - 3:,} more" if len(distinct) > 3 else ""
        remarks.append(f"{counted(extra, 'duplicate')}, kept: {pairs}{rest}")
    torn = [group for group in distinct if len({label[file] for file in group}) > 1]
    if torn:
        said = ", ".join(f"{printable(file)!r} as {printable(splits.classes[label[file]])!r}" for file in torn[0][:3])
        verb = "occurs" if len(torn) == 1 else "occur"
        remarks.append(f"{counted(len(torn), 'image')} {verb} in more than one class, the first: {said}")
    trained = {sample.file for sample in splits.train}
    for word, held in (("validation", splits.validation), ("test", splits.test)):
        files = {sample.file for sample in held}
        pairs = [pair for pair in leaked if pair[1] in files]
        if pairs:
            twin, file = pairs[0]
            verb = "is" if len(pairs) == 1 else "are"
            where = "also trained on" if all(pair[0] in trained for pair in pairs) else "in other splits as well"
            result = "accuracy" if word == "test" else "validation accuracy"
            remarks.append(
                f"{counted(len(pairs), f'{word} image')} {verb} {where}, so the {result} is too optimistic; the first: "
                f"{printable(file)!r} is {printable(twin)!r}"
            )
    return remarks


def split_remarks(splits: Splits) -> list[str]:
    """Remarks about files and folders that are not used, and about classes missing from a split."""
    remarks = splits.left_out.sentences()
    remarks += [f"not used: {entry}" for entry in splits.unused]
    for group in names_alike(splits.classes)[:3]:
        remarks.append(f"classes {name_list(group)} differ by case or spaces only: merge them if they mean the same")
    for word, samples in (("test", splits.test), ("validation", splits.validation), ("training", splits.train)):
        present = {sample.label for sample in samples}
        missing = [name for number, name in enumerate(splits.classes) if number not in present]
        if missing and samples:
            few = f", which has fewer than {FEWEST_TO_VALIDATE} to train on" if word in splits.split_off else ""
            remarks.append(f"no {word} image of class {name_list(missing)}{few}")
    return remarks


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images (N, H, W, C), in [0, 1], exact by their histogram.

    A constant channel gets the standard deviation 1.

    >>> statistics(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
    ((0.5,), (0.5,))
    """
    return moments(histogram(images))


def dataset_statistics(part: MemoryDataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a data set, computed in chunks."""
    chunks: Iterator[Tensor] = part.fetch(torch.arange(len(part)).split(1024), torch.device("cpu"), None)
    return moments(torch.stack([histogram(images) for images in chunks]).sum(0))


def histogram(images: Tensor) -> Tensor:
    """Histogram of uint8 images (N, H, W, C): counts, int64 (C, 256)."""
    return torch.stack([torch.bincount(images[..., c].flatten(), minlength=256) for c in range(images.shape[-1])])


def moments(counts: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each row of a histogram (C, 256), values in [0, 1]."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for weights in counts.double():
        weights = weights / weights.sum()
        mean = float(weights @ values)
        means.append(mean)
        deviations.append(float(weights @ (values - mean) ** 2) ** 0.5 or 1.0)
    return tuple(means), tuple(deviations)


def imagenet_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and standard deviation of ImageNet; for grey images, averaged over the colours."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)


def resize_digits(images: Tensor, size: int, channels: int) -> Tensor:
    """Resize grey images (N, H, W, 1) and repeat them over the channels: (N, size, size, channels)."""
    if images.shape[1] != size:
        planes = images.permute(0, 3, 1, 2).float()
        planes = nn.functional.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
        images = planes.round().to(torch.uint8).permute(0, 2, 3, 1)
    return images.expand(-1, -1, -1, channels).contiguous()
