"""Which images of a source belong to which class and which split. No image is opened here, nothing is written."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from skipway.checkpoint.files import read_json
from skipway.data.randomness import draw_key
from skipway.data.sources.detect import index_source
from skipway.data.sources.index import FilesByClass, SourceIndex, name_list
from skipway.data.sources.readers import FileStore, ImageStore
from skipway.data.sources.scan import LeftOut
from skipway.data.sources.splits import SPLITS
from skipway.errors import CheckpointError, DataError, counted, printable

__all__ = [
    "Fold",
    "ImageSample",
    "Splits",
    "hold_out",
    "list_splits",
    "name_list",
    "read_split",
    "split_index",
    "take_fold",
]

# a class with fewer images left to train on gives none of them to the validation split
FEWEST_TO_VALIDATE = 3

Groups = Mapping[str, Sequence[str]]


class ImageSample(NamedTuple):
    """An image: its name in its source, for a file the path below the root with forward slashes, and its class."""

    file: str
    label: int


class Fold(NamedTuple):
    """The test split of a cross-validation: fold `number`, from 1, of `count`."""

    number: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The images of a source, sorted into classes and into a training, a validation and a test split.

    Args:
        root: the folder that the names of the files are relative to.
        classes: in the order of their numbers.
        train: images that are learned from.
        validation: images that the best epoch is chosen on; empty where there is no such split.
        test: images that the result is measured on.
        split_off: for each split that was split off the training images here, the fraction of each class.
        fold: the fold of a cross-validation that `test` is; None: no cross-validation.
        left_out: files that are not read, by reason.
        unused: folders, shards and splits that are left alone, with the reason.
        store: reads the images; None stands for files below the root.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[ImageSample, ...]
    validation: tuple[ImageSample, ...]
    test: tuple[ImageSample, ...]
    split_off: Mapping[str, float]
    fold: Fold | None = None
    left_out: LeftOut = field(default_factory=LeftOut)
    unused: tuple[str, ...] = ()
    store: ImageStore | None = field(default=None, repr=False, compare=False)

    @property
    def images(self) -> ImageStore:
        """The store that reads the images."""
        return FileStore(self.root) if self.store is None else self.store

    @property
    def samples(self) -> tuple[ImageSample, ...]:
        """The images of all splits."""
        return self.train + self.validation + self.test

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when a file is added, removed, renamed or changes its class or split."""
        digest = hashlib.blake2b(digest_size=8)
        for split in (self.train, self.validation, self.test):
            for sample in split:
                digest.update(f"{sample.label}\0{sample.file}\0".encode("utf-8", "surrogateescape"))
            digest.update(b"\n")
        return digest.hexdigest()


def list_splits(
    root: Path, *, holdout: float = 0.2, validation: float = 0.1, seed: int = 0, outside: bool = False
) -> Splits:
    """Find the images of a source, see `skipway.data.sources.detect.index_source`, and split them, see `split_index`.

    Raises:
        DataError: the source is missing or empty, has fewer than two classes, an empty class, or a class in its
            validation or test split that the training split lacks.
    """
    return split_index(index_source(root, outside=outside), holdout=holdout, validation=validation, seed=seed)


def split_index(
    index: SourceIndex,
    *,
    holdout: float,
    validation: float,
    seed: int,
    fold: Fold | None = None,
    without: Collection[str] = (),
    groups: Groups | None = None,
    listed: Mapping[str, Sequence[str]] | None = None,
) -> Splits:
    """The training, validation and test split of a source.

    A split that the source has is taken as it is. What it lacks is split off its training images, class by class:
    first the test split, then, of what remains, the validation split. Which images depends on their names and `seed`
    alone.

    Args:
        index: the images.
        holdout: fraction of each class for a test split that the source lacks, see `hold_out`.
        validation: fraction of what remains of each class for a validation split that the source lacks; a class of
            which fewer than three images remain gives none. 0: no validation split.
        seed: chooses the images.
        fold: take this fold of the training images as the test split, and leave the source's own test split alone.
        without: images to leave out.
        groups: for each image that has copies, the names of all of them: they stay together.
        listed: names of the images of each split, as an earlier call split them. If they are all images of the source,
            nothing is chosen anew.

    Raises:
        DataError: a class has too few images.
    """

    def kept(files: FilesByClass | None) -> FilesByClass:
        return {name: [file for file in (files or {}).get(name, []) if file not in without] for name in index.classes}

    groups = groups or {}
    train, held, test = kept(index.train), kept(index.validation), kept(index.test)
    split_off: dict[str, float] = {}
    unused = list(index.unused)
    elsewhere = {file for files in (held, test) for members in files.values() for file in members}
    pinned = {file for file, copies in groups.items() if not elsewhere.isdisjoint(copies)}
    if fold is not None:
        split_off["test"] = 1 / fold.count
        if own := sum(map(len, test.values())):
            unused.append(f"{counted(own, 'image')} of the test split: every fold tests on training images")
        test = {}
    elif index.test is None:
        split_off["test"] = holdout
    if index.validation is None and validation:
        split_off["validation"] = validation
    present = {"train": train, "validation": held, "test": test}
    known = None if listed is None else take_listed(index, present, listed)
    if known is not None:
        train, held, test = (known[split] for split in SPLITS)
    else:
        if fold is not None:
            train, test = take_fold(train, fold, seed, groups)
        elif "test" in split_off:
            train, test = hold_out(train, holdout, seed, groups, pinned=pinned)
        if "validation" in split_off:
            train, held = hold_out(
                train, validation, seed, groups, purpose="validation", least=FEWEST_TO_VALIDATE, pinned=pinned
            )
    numbers = {name: number for number, name in enumerate(index.classes)}
    return Splits(
        root=index.root,
        classes=index.classes,
        train=samples_of(train, numbers),
        validation=samples_of(held, numbers),
        test=samples_of(test, numbers),
        split_off=split_off,
        fold=fold,
        left_out=index.left_out,
        unused=tuple(unused),
        store=index.store,
    )


def hold_out(
    files: FilesByClass,
    fraction: float,
    seed: int,
    groups: Groups | None = None,
    *,
    purpose: str = "split",
    least: int = 2,
    pinned: Collection[str] = (),
) -> tuple[FilesByClass, FilesByClass]:
    """Split every class on its own: of n images max(1, round(fraction * n)) are held out, at most n - 1.

    The order in which images are taken depends only on the seed, the purpose and their names, so an image that is added
    moves at most one other. A group of copies takes the place of its first name and stays together, over classes as
    well; so a class may give a few images more or fewer.

    Args:
        files: names of the images of each class.
        fraction: of each class that is held out, 0 < fraction < 1.
        seed: chooses the images, together with their names.
        groups: for each image that has copies, the names of all of them.
        purpose: makes the choice independent of others with the same seed.
        least: images that a class needs to give one. Below 2 it raises; below `least` the class gives none.
        pinned: images that are not to be held out, with all of their copies.

    Returns:
        the images that stay, and those that are held out.

    Raises:
        DataError: a class has a single image, or nothing but copies of one.

    >>> train, test = hold_out({"cat": ["a", "b", "c", "d"], "dog": ["e", "f"]}, fraction=0.25, seed=0)
    >>> {name: len(members) for name, members in test.items()}
    {'cat': 1, 'dog': 1}
    """
    groups = groups or {}
    train, test, side = {}, {}, {}
    if least == 2:
        check_class_sizes(files, groups)
    for name, members in files.items():
        size = Counter(unit_of(member, groups) for member in members)
        count = min(max(1, round(fraction * len(members))), len(members) - 1) if len(members) >= least else 0
        order = sorted(size, key=lambda unit: (draw_key(seed, purpose, unit), unit))
        held = sum(size[unit] for unit in order if side.get(unit) == "test")
        free = [unit for unit in order if unit not in side]
        for place, unit in enumerate(free):
            # one unit stays to train on, unless an earlier class already has one of this class there
            last = place == len(free) - 1 and not any(side.get(other) == "train" for other in order)
            fits = held == 0 or held + size[unit] <= count
            side[unit] = "test" if held < count and fits and not last and unit not in pinned else "train"
            held += size[unit] * (side[unit] == "test")
        chosen = {member for member in members if side[unit_of(member, groups)] == "test"}
        train[name] = [member for member in members if member not in chosen]
        test[name] = [member for member in members if member in chosen]
    return train, test


def unit_of(file: str, groups: Groups) -> str:
    """The name under which an image and its copies are split."""
    return min(groups.get(file, (file,)))


def check_class_sizes(files: FilesByClass, groups: Groups) -> None:
    """Check that every class has two different images.

    Raises:
        DataError: one has a single image.
    """
    units = {name: len({unit_of(member, groups) for member in members}) for name, members in files.items() if members}
    single = [name for name, count in units.items() if count == 1]
    if not single:
        return
    name, copies = single[0], len(files[single[0]])
    what = "has a single image" if copies < 2 else f"has {copies} copies of a single image"
    more = f", as {len(single):,} of {len(units):,} classes do," if len(single) > 1 else ""
    raise DataError(
        f"class {printable(name)!r} {what}{more} and two are needed, one to train on and one to test on; add images, "
        "remove the class, or give test images in a folder named test"
    )


def take_fold(
    files: FilesByClass, fold: Fold, seed: int, groups: Groups | None = None
) -> tuple[FilesByClass, FilesByClass]:
    """The images outside and inside one fold; the folds of all numbers are disjoint and hold every image.

    Every class is divided evenly over the folds, in an order that depends only on the seed and the names of its images;
    an image that is added moves at most one other per fold. Copies are in the same fold.

    Raises:
        DataError: a class has fewer different images than there are folds.

    >>> files = {"cat": ["a", "b", "c", "d"], "dog": ["e", "f"]}
    >>> [take_fold(files, Fold(number, 2), seed=0)[1] for number in (1, 2)]
    [{'cat': ['c', 'd'], 'dog': ['f']}, {'cat': ['a', 'b'], 'dog': ['e']}]
    """
    groups = groups or {}
    train, test, number_of = {}, {}, {}
    units = {name: {unit_of(member, groups) for member in members} for name, members in files.items()}
    few = min((name for name in files if files[name]), key=lambda name: len(units[name]))
    if len(units[few]) < fold.count:
        have = f"{len(units[few])} different images" if len(units[few]) != 1 else "a single image"
        most = f"take at most {len(units[few])} folds" if len(units[few]) > 1 else "there can be no folds with it"
        raise DataError(
            f"folds={fold.count}: class {printable(few)!r} has {have}, and every fold needs one: {most}, add images, "
            "or remove the class"
        )
    for name, members in files.items():
        # classes begin at different folds, so that the larger folds of each are not the same ones
        first = draw_key(seed, "fold", name) % fold.count
        order = sorted(units[name], key=lambda unit: (draw_key(seed, "fold", unit), unit))
        for place, unit in enumerate(order):
            number_of.setdefault(unit, (place * fold.count // len(order) + first) % fold.count + 1)
        inside = [number_of[unit_of(member, groups)] == fold.number for member in members]
        train[name] = [member for member, chosen in zip(members, inside, strict=True) if not chosen]
        test[name] = [member for member, chosen in zip(members, inside, strict=True) if chosen]
    return train, test


def take_listed(
    index: SourceIndex, present: Mapping[str, FilesByClass], listed: Mapping[str, Sequence[str]]
) -> dict[str, FilesByClass] | None:
    """The images of each split as a file list has them; None if the source holds other images than the list."""
    split_of_file = {file: split for split in SPLITS for file in listed.get(split, ())}
    files = {name: [file for split in SPLITS for file in present[split].get(name, [])] for name in index.classes}
    if {file for members in files.values() for file in members} != split_of_file.keys():
        return None
    return {
        split: {name: [file for file in members if split_of_file[file] == split] for name, members in files.items()}
        for split in SPLITS
    }


def read_split(path: Path) -> dict[str, Any] | None:
    """The file list of a run, with the names of the images of each split; None: there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.exists():
        return None
    values = read_json(path)
    if not isinstance(values, dict) or not all(isinstance(values.get(split), list) for split in SPLITS):
        raise CheckpointError(f"{printable(path)} is damaged: it does not list {', '.join(SPLITS)}; start a new run")
    return {split: values[split] for split in SPLITS}


def samples_of(files: FilesByClass, numbers: Mapping[str, int]) -> tuple[ImageSample, ...]:
    """All files of a split with their class numbers, class by class."""
    return tuple(ImageSample(file, numbers[name]) for name, members in files.items() for file in members)
