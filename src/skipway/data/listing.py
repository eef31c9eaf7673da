"""Which files of a folder belong to which class and to which part. No image is opened here, nothing is written."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from skipway.data.randomness import draw_key
from skipway.errors import DataError

__all__ = ["Listing", "Sample", "hold_out", "list_folder", "printable"]

SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2"),
    }
)
TEST_FOLDERS = ("test", "val", "valid", "validation")


class Sample(NamedTuple):
    """One image: its path below the root, with forward slashes, and its class number."""

    file: str
    label: int


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of a folder, sorted into classes and into a training and a test part.

    `held_out` is the share of each class that was held out here, None when the folder brings its own test part.
    `ignored` counts the files that are not images by suffix; hidden files are not counted.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    held_out: float | None
    ignored: Counter[str]
    unused: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when a file is added, removed, renamed or changes its class or part."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.train, self.test):
            for sample in part:
                digest.update(f"{sample.label}\0{sample.file}\0".encode("utf-8", "surrogateescape"))
            digest.update(b"\n")
        return digest.hexdigest()


def printable(name: str | Path) -> str:
    r"""A name that a terminal can show: what is not text becomes an escape.

    >>> printable("caf\u00e9\x1b[31m")
    'café\\x1b[31m'
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(name))


def list_folder(root: Path, *, held_out: float = 0.2, seed: int = 0) -> Listing:
    """Find the images of `root`: `train/<class>/*` with `test|val/<class>/*`, or `<class>/*`.

    Without a test folder, the share `held_out` of each class is held out, the same files for the same seed.

    Raises:
        DataError: the folder is missing or empty, has fewer than two classes, an empty class, or a class in its
            test part that the training part lacks.
    """
    if not root.is_dir():
        missing = "does not exist; without a folder, training uses the embedded digits"
        what = "is a file; unpack it and give the folder" if root.exists() else missing
        raise DataError(f"data folder {printable(root)} {what}")
    train_root = root / "train" if (root / "train").is_dir() else root
    tests = [] if train_root is root else [name for name in TEST_FOLDERS if (root / name).is_dir()]
    ignored: Counter[str] = Counter()
    train_files = files_by_class(train_root, root, ignored)
    classes = checked_classes(train_files, train_root)
    numbers = {name: number for number, name in enumerate(classes)}
    if tests:
        test_files = files_by_class(root / tests[0], root, ignored)
        check_test_classes(test_files, classes, root / tests[0])
        held_out_used = None
    else:
        train_files, test_files = hold_out(train_files, held_out, seed)
        held_out_used = held_out
    return Listing(
        root=root,
        classes=classes,
        train=samples(train_files, numbers),
        test=samples(test_files, numbers),
        held_out=held_out_used,
        ignored=ignored,
        unused=tuple(tests[1:]),
    )


def files_by_class(folder: Path, root: Path, ignored: Counter[str]) -> dict[str, list[str]]:
    """The image files below each subfolder of `folder`, as sorted paths relative to `root`."""
    subfolders = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not hidden(entry.name))
    found = {name: sorted(walk(folder / name, root, ignored)) for name in subfolders}
    for entry in os.scandir(folder):
        if entry.is_file() and not hidden(entry.name):
            ignored[f"{Path(entry.name).suffix.lower() or 'no suffix'} outside the class folders"] += 1
    return found


def walk(folder: Path, root: Path, ignored: Counter[str]) -> Iterable[str]:
    """The image files anywhere below `folder`; linked folders are not entered, so there are no loops."""
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not hidden(name)]
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in SUFFIXES and not hidden(name):
                yield Path(parent, name).relative_to(root).as_posix()
            elif not hidden(name):
                ignored[suffix or "no suffix"] += 1


def hidden(name: str) -> bool:
    """Whether a file or folder is the file system's or an archiver's own."""
    return name.startswith((".", "__MACOSX")) or name in ("Thumbs.db", "desktop.ini")


def checked_classes(files: dict[str, list[str]], folder: Path) -> tuple[str, ...]:
    """The class names in sorted order, after checking that there are two and that none is empty."""
    full = tuple(name for name in files if files[name])
    if not full:
        raise DataError(
            f"no images in {printable(folder)}: the layout is <class>/<image>, with the suffixes "
            f"{' '.join(sorted(SUFFIXES))}"
        )
    empty = [name for name in files if not files[name]]
    if empty:
        raise DataError(f"class folder {named(empty)} in {printable(folder)} holds no image; fill it or remove it")
    if len(full) < 2:
        raise DataError(
            f"only one class, {full[0]!r}, in {printable(folder)}: a classifier needs at least two class folders"
        )
    return full


def check_test_classes(files: dict[str, list[str]], classes: tuple[str, ...], folder: Path) -> None:
    """Class numbers come from the training part alone, so a test class that it lacks has none."""
    unknown = [name for name in files if name not in classes and files[name]]
    if unknown:
        raise DataError(
            f"class {named(unknown)} in {printable(folder)} is not in the training part, which has {named(classes)}"
        )
    if not any(files.values()):
        raise DataError(f"no images in {printable(folder)}: fill it, or remove it and a part of train is held out")


def named(names: Iterable[str], limit: int = 5) -> str:
    """Some names for a message, the rest as a count."""
    names = [repr(printable(name)) for name in names]
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def hold_out(files: dict[str, list[str]], share: float, seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Split every class on its own: max(1, round(share * n)) of its n files are held out, at most n - 1.

    A file's turn depends only on the seed and its name, so a file that is added moves at most one other.

    Raises:
        DataError: a class has a single image, which cannot stand on both sides.

    >>> train, test = hold_out({"cat": ["a", "b", "c", "d"], "dog": ["e", "f"]}, share=0.25, seed=0)
    >>> {name: len(part) for name, part in test.items()}
    {'cat': 1, 'dog': 1}
    """
    train, test = {}, {}
    for name, members in files.items():
        if len(members) < 2:
            raise DataError(
                f"class {printable(name)!r} has a single image: two are needed, one to train on and one to test on"
            )
        count = min(max(1, round(share * len(members))), len(members) - 1)
        chosen = set(sorted(members, key=lambda member: (draw_key(seed, "split", member), member))[:count])
        train[name] = [member for member in members if member not in chosen]
        test[name] = [member for member in members if member in chosen]
    return train, test


def samples(files: dict[str, list[str]], numbers: dict[str, int]) -> tuple[Sample, ...]:
    """All files of a part with their class numbers, class by class."""
    return tuple(Sample(file, numbers[name]) for name, members in files.items() for file in members)
