"""The images of a source by split and class, before any of them is opened."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from skipway.data.sources.readers import ImageStore
from skipway.data.sources.scan import LeftOut
from skipway.data.sources.splits import SPLITS, Split
from skipway.errors import DataError, counted, printable, spell

__all__ = [
    "FilesByClass",
    "Inventory",
    "SourceIndex",
    "class_name",
    "idle_remarks",
    "name_list",
    "names_alike",
    "sorted_classes",
]

FilesByClass = dict[str, list[str]]
# why an image is left out that no folder labels
OUTSIDE_CLASSES = "outside the class folders"


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Every file of a source: how many are read, by split and class, and how many are left out, by reason.

    >>> Inventory(read={("train", "cat"): 8, ("test", "cat"): 2}, left_out={"hidden": 1}).total
    11
    """

    read: Mapping[tuple[Split, str], int]
    left_out: Mapping[str, int]

    @property
    def total(self) -> int:
        """The number of all files."""
        return sum(self.read.values()) + sum(self.left_out.values())


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
        left_out: files that are not read, by reason.
        unused: folders, shards and splits that are left alone, with the reason.
        remarks: sentences about what a user may not expect.
    """

    store: ImageStore
    name: str
    classes: tuple[str, ...]
    train: FilesByClass
    validation: FilesByClass | None = None
    test: FilesByClass | None = None
    left_out: LeftOut = field(default_factory=LeftOut)
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

    @property
    def inventory(self) -> Inventory:
        """Every file of the source, before any image is read."""
        read: dict[tuple[Split, str], int] = {}
        for split in SPLITS:
            part: FilesByClass = getattr(self, split) or {}
            read.update({(split, name): len(files) for name, files in part.items() if files})
        return Inventory(read=read, left_out=dict(self.left_out.counts))


def name_list(names: Iterable[str], limit: int = 5) -> str:
    """Some names for a message, the rest as a count.

    >>> name_list(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    names = [repr(printable(name)) for name in names]
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def idle_remarks(name: str, reason: str, **choices: object) -> list[str]:
    """A remark for each choice that was made for a source, by its name, and has no effect on it.

    >>> idle_remarks("list", "has no class folders", allow_empty=True, subfolders="merge")
    ['allow_empty=True has no effect: list has no class folders']
    """
    made = [spell(choice, value) for choice, value in choices.items() if value not in (None, False, "merge")]
    return [f"{each} has no effect: {printable(name)} {reason}" for each in made]


def sorted_classes(names: Iterable[str]) -> tuple[str, ...]:
    """By number where all are whole numbers, else by name.

    >>> sorted_classes(["10", "9"]), sorted_classes(["10", "9", "a"])
    (('9', '10'), ('10', '9', 'a'))
    """
    names = set(names)
    numeric = all(name.isascii() and name.isdigit() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name) if numeric else (0, name)))


def files_of_classes(splits: Mapping[Split, FilesByClass], fewest: int) -> FilesByClass:
    """The images that say which classes there are: those to train on, or where one class suffices, of every split.

    >>> files_of_classes({"test": {"cat": ["a.jpg"]}}, fewest=1), files_of_classes({"test": {"cat": ["a.jpg"]}}, 2)
    ({'cat': ['a.jpg']}, {})
    """
    if fewest > 1:
        return splits.get("train", {})
    found: FilesByClass = {}
    for split in SPLITS:
        for name, files in splits.get(split, {}).items():
            found.setdefault(name, []).extend(files)
    return found


def class_name(name: str) -> str:
    """The name of a class from that of a folder: in Unicode's composed form, since systems store names in either."""
    return unicodedata.normalize("NFC", name)


def names_alike(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ by case or spaces only.

    >>> names_alike(["Cat", "dog", "cat "])
    [['Cat', 'cat ']]
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault("".join(name.casefold().split()), []).append(name)
    return [group for group in alike.values() if len(group) > 1]


def check_classes(
    files: FilesByClass, where: str, *, allow_empty: bool, left_out: LeftOut | None = None, fewest: int = 2
) -> tuple[str, ...]:
    """The classes, after checking that there are as many as are needed and that none is empty.

    Raises:
        DataError: there are fewer, or one is empty and that is not allowed.
    """
    full = [name for name in files if files[name]]
    others = [] if left_out is None else left_out.sentences()
    if not full:
        raise DataError("; ".join([f"no images in {where}{layout_advice(where, left_out)}", *others]))
    empty = [name for name in files if not files[name]]
    if empty and not allow_empty:
        raise DataError(
            "; ".join(
                [
                    f"class folder {name_list(empty)} in {where} holds no image",
                    "fill it, remove it, or keep the class without images with allow_empty=True",
                    *others,
                ]
            )
        )
    if len(full) < fewest:
        raise DataError(
            "; ".join(
                [
                    f"only one class, {printable(full[0])!r}, in {where}: a classifier needs two class folders; put "
                    "images of what it is to be told from into a folder beside it",
                    *others,
                ]
            )
        )
    return tuple(files)


def layout_advice(where: str, left_out: LeftOut | None) -> str:
    """What to do about a folder without images in class folders, as the end of a message."""
    loose = 0 if left_out is None else left_out.counts[OUTSIDE_CLASSES]
    if not loose:
        return ": the layout is <class>/<image>"
    return (
        f" lie in class folders, and {counted(loose, 'image')} outside: the name of its folder is the label of "
        f"an image. Move each into a folder named by its class, {where}/cat/1.jpg and {where}/dog/2.jpg for example, "
        "or write a CSV file with the columns image and label and give that; a trained network labels them by "
        f"skipway predict RUN {where}"
    )


def check_known_classes(files: FilesByClass, classes: Collection[str], where: str, split: str) -> None:
    """Check that the classes of a validation or test split occur in the training split, which numbers them.

    Raises:
        DataError: a class is missing there, or the split holds no image at all.
    """
    known = set(classes)
    unknown = [name for name in files if name not in known and files[name]]
    if unknown:
        alike = [group for group in names_alike([*classes, unknown[0]]) if unknown[0] in group]
        raise DataError(
            f"class {name_list(unknown)} in {where} is not in the training split, which has {name_list(classes)}; "
            + (
                f"{unknown[0]!r} differs from {alike[0][0]!r} by case or spaces only: name both alike"
                if alike
                else "images without labels belong into a folder named unlabeled there"
            )
        )
    if not any(files.values()):
        raise DataError(
            f"no images in {where}: fill it, or remove it and {split} images are split off the training split"
        )
