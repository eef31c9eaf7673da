"""What was found in a source, before any image is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from skipway.data.decode import readable
from skipway.data.sources.readers import Store
from skipway.errors import DataError

__all__ = ["SUFFIXES", "TEST_NAMES", "SourceIndex", "name_list", "part_of", "printable", "sorted_classes"]

SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2"),
    }
)
TEST_NAMES = ("test", "val", "valid", "validation")

FilesByClass = dict[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class SourceIndex:
    """The images of a source by class.

    Args:
        store: reads them.
        name: of the source.
        classes: in the order of their numbers, those without an image included.
        train: the images of each class by name; of all parts where the source brings no test part.
        test: likewise; None: the source brings none.
        ignored: files that are not images, counted by suffix; hidden files are not counted.
        unused: further test parts.
        remarks: sentences about what a user may not expect.
    """

    store: Store
    name: str
    classes: tuple[str, ...]
    train: FilesByClass
    test: FilesByClass | None = None
    ignored: Counter[str] = field(default_factory=Counter)
    unused: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """What the images' names are relative to."""
        return self.store.root

    @property
    def files(self) -> list[str]:
        """All images of both parts."""
        parts = (self.train, self.test or {})
        return [file for part in parts for name in self.classes for file in part.get(name, [])]


def printable(name: str | Path) -> str:
    r"""A name that a terminal can show: what is not text becomes an escape.

    >>> printable("caf\u00e9\x1b[31m")
    'café\\x1b[31m'
    """
    return (
        readable(Path(name))
        if isinstance(name, Path)
        else "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)
    )


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


def part_of(split: str, source: Path | str) -> str:
    """ "train" or "test", from the name of a split.

    >>> part_of("validation", "list.csv")
    'test'
    """
    name = split.strip().lower()
    if name in ("train", "training"):
        return "train"
    if name in (*TEST_NAMES, "testing"):
        return "test"
    raise DataError(
        f"{printable(Path(source))}: split {split!r} is not known; there are: train, {', '.join(TEST_NAMES)}"
    )


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


def check_test_classes(files: FilesByClass, classes: tuple[str, ...], where: str) -> None:
    """Class numbers come from the training part alone, so a test class that it lacks has none.

    Raises:
        DataError: there is such a class, or no test image at all.
    """
    unknown = [name for name in files if name not in classes and files[name]]
    if unknown:
        raise DataError(
            f"class {name_list(unknown)} in {where} is not in the training part, which has {name_list(classes)}"
        )
    if not any(files.values()):
        raise DataError(f"no images in {where}: fill it, or remove it and a part of train is held out")
