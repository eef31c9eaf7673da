"""The images of a source by split and class, before any of them is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from skipway.data.sources.readers import ImageStore
from skipway.data.sources.splits import SPLITS
from skipway.errors import DataError, printable

__all__ = ["SUFFIXES", "FilesByClass", "SourceIndex", "name_list", "sorted_classes"]

SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2"),
    }
)

FilesByClass = dict[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class SourceIndex:
    """The images of a source by split and class.

    Args:
        store: reads the images.
        name: of the source.
        classes: in the order of their numbers, those without an image included.
        train: names of the training images of each class.
        validation: names of the validation images of each class; None: the source has no such split.
        test: names of the test images of each class; None: the source has no such split.
        ignored: number of files that are not images, by suffix; hidden files are not counted.
        unused: folders, shards and splits that are left alone, with the reason.
        remarks: sentences about what a user may not expect.
    """

    store: ImageStore
    name: str
    classes: tuple[str, ...]
    train: FilesByClass
    validation: FilesByClass | None = None
    test: FilesByClass | None = None
    ignored: Counter[str] = field(default_factory=Counter)
    unused: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """The folder that the names of the images are relative to."""
        return self.store.root

    @property
    def files(self) -> list[str]:
        """The names of all images, split by split and class by class."""
        splits = [getattr(self, split) or {} for split in SPLITS]
        return [file for files in splits for name in self.classes for file in files.get(name, [])]


def name_list(names: Iterable[str], limit: int = 5) -> str:
    """Some names for a message, the rest as a count.

    >>> name_list(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    names = [repr(printable(name)) for name in names]
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def sorted_classes(names: Iterable[str]) -> tuple[str, ...]:
    """By number where all are whole numbers, else by name.

    >>> sorted_classes(["10", "9"]), sorted_classes(["10", "9", "a"])
    (('9', '10'), ('10', '9', 'a'))
    """
    names = set(names)
    numeric = all(name.isascii() and name.isdigit() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name) if numeric else (0, name)))


def check_classes(files: FilesByClass, where: str, *, allow_empty: bool) -> tuple[str, ...]:
    """The classes, after checking that there are two and that none is empty.

    Raises:
        DataError: there are fewer, or one is empty and that is not allowed.
    """
    full = [name for name in files if files[name]]
    if not full:
        raise DataError(
            f"no images in {where}: the layout is <class>/<image>, with the suffixes {' '.join(sorted(SUFFIXES))}"
        )
    empty = [name for name in files if not files[name]]
    if empty and not allow_empty:
        raise DataError(
            f"class folder {name_list(empty)} in {where} holds no image; fill it, remove it, or keep the class without "
            "images with allow_empty"
        )
    if len(full) < 2:
        raise DataError(
            f"only one class, {printable(full[0])!r}, in {where}: a classifier needs at least two class folders"
        )
    return tuple(files)


def check_known_classes(files: FilesByClass, classes: tuple[str, ...], where: str, split: str) -> None:
    """Check that the classes of a validation or test split occur in the training split, which numbers them.

    Raises:
        DataError: a class is missing there, or the split holds no image at all.
    """
    unknown = [name for name in files if name not in classes and files[name]]
    if unknown:
        raise DataError(
            f"class {name_list(unknown)} in {where} is not in the training split, which has {name_list(classes)}"
        )
    if not any(files.values()):
        raise DataError(
            f"no images in {where}: fill it, or remove it and {split} images are split off the training split"
        )
