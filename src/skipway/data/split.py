"""Which images of a source belong to which class and to which part. No image is opened here, nothing is written."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from skipway.data.randomness import draw_key
from skipway.data.sources.detect import find
from skipway.data.sources.index import FilesByClass, SourceIndex, name_list, printable
from skipway.data.sources.readers import Files, Store
from skipway.errors import DataError

__all__ = ["Sample", "Splits", "hold_out", "list_splits", "name_list", "printable", "split_index"]


class Sample(NamedTuple):
    """One image: its name in its source, for a file the path below the root with forward slashes, and its class."""

    file: str
    label: int


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The images of a source, sorted into classes and into a training and a test part.

    `held_out` is the share of each class that was held out here, None when the source brings its own test part.
    `ignored` counts the files that are not images by suffix; hidden files are not counted. `store` reads the images;
    None stands for files below the root.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    held_out: float | None
    ignored: Counter[str]
    unused: tuple[str, ...] = ()
    store: Store | None = field(default=None, repr=False, compare=False)

    @property
    def images(self) -> Store:
        """What reads the images."""
        return Files(self.root) if self.store is None else self.store

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when a file is added, removed, renamed or changes its class or part."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.train, self.test):
            for sample in part:
                digest.update(f"{sample.label}\0{sample.file}\0".encode("utf-8", "surrogateescape"))
            digest.update(b"\n")
        return digest.hexdigest()


def list_splits(root: Path, *, held_out: float = 0.2, seed: int = 0) -> Splits:
    """Find the images of a source, see `skipway.data.sources.detect.find`, and divide them.

    Without a test part, the share `held_out` of each class is held out, the same files for the same seed.

    Raises:
        DataError: the source is missing or empty, has fewer than two classes, an empty class, or a class in its
            test part that the training part lacks.
    """
    return split_index(find(root), held_out=held_out, seed=seed)


def split_index(
    found: SourceIndex,
    *,
    held_out: float,
    seed: int,
    without: Collection[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Splits:
    """The two parts of a source.

    Args:
        found: the images.
        held_out: share of each class to hold out where the source brings no test part.
        seed: chooses which.
        without: images to leave out.
        groups: for images that must stand on the same side, all of their group.

    Raises:
        DataError: a class has a single image.
    """

    def kept(files: FilesByClass) -> FilesByClass:
        return {name: [file for file in files.get(name, []) if file not in without] for name in found.classes}

    if found.test is None:
        train, test = hold_out(kept(found.train), held_out, seed, groups)
    else:
        train, test = kept(found.train), kept(found.test)
    numbers = {name: number for number, name in enumerate(found.classes)}
    return Splits(
        root=found.root,
        classes=found.classes,
        train=samples(train, numbers),
        test=samples(test, numbers),
        held_out=held_out if found.test is None else None,
        ignored=found.ignored,
        unused=found.unused,
        store=found.store,
    )


def hold_out(
    files: FilesByClass, share: float, seed: int, groups: Mapping[str, Sequence[str]] | None = None
) -> tuple[FilesByClass, FilesByClass]:
    """Split every class on its own: about max(1, round(share * n)) of its n files are held out, at most n - 1.

    A file's turn depends only on the seed and its name, so a file that is added moves at most one other. A group, of
    files that are copies of each other, takes its turn by its first name and stays together, over classes as well; so
    a class may get some files more or fewer.

    Raises:
        DataError: a class has a single image, or nothing but copies of one, which cannot stand on both sides.

    >>> train, test = hold_out({"cat": ["a", "b", "c", "d"], "dog": ["e", "f"]}, share=0.25, seed=0)
    >>> {name: len(part) for name, part in test.items()}
    {'cat': 1, 'dog': 1}
    """
    groups = groups or {}
    train, test, side = {}, {}, {}
    for name, members in files.items():
        units = {min(groups.get(member, (member,))) for member in members}
        if members and (len(members) < 2 or len(units) < 2):
            single = "has a single image" if len(members) < 2 else f"has {len(members)} copies of a single image"
            raise DataError(f"class {printable(name)!r} {single}: two are needed, one to train on and one to test on")
        count = min(max(1, round(share * len(members))), len(members) - 1)
        size = Counter(min(groups.get(member, (member,))) for member in members)
        turns = sorted(units, key=lambda unit: (draw_key(seed, "split", unit), unit))
        held = sum(size[unit] for unit in turns if side.get(unit) == "test")
        free = [unit for unit in turns if unit not in side]
        for place, unit in enumerate(free):
            # one unit stays behind to train on, unless an earlier class already has one of this class there
            last = place == len(free) - 1 and not any(side.get(other) == "train" for other in turns)
            fits = held == 0 or held + size[unit] <= count
            side[unit] = "test" if held < count and fits and not last else "train"
            held += size[unit] * (side[unit] == "test")
        chosen = {member for member in members if side[min(groups.get(member, (member,)))] == "test"}
        train[name] = [member for member in members if member not in chosen]
        test[name] = [member for member in members if member in chosen]
    return train, test


def samples(files: FilesByClass, numbers: Mapping[str, int]) -> tuple[Sample, ...]:
    """All files of a part with their class numbers, class by class."""
    return tuple(Sample(file, numbers[name]) for name, members in files.items() for file in members)
