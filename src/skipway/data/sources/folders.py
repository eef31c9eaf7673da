"""Class folders: `train/<class>/*`, with `val/<class>/*` and `test/<class>/*` where they exist, or `<class>/*`.

`skipway.data.sources.splits` has the names of the splits. A folder whose name is not among them, beside `train`, is
named and left alone; so are validation and test folders whose images are not sorted into classes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from skipway.data.sources.index import (
    SUFFIXES,
    FilesByClass,
    SourceIndex,
    check_classes,
    check_known_classes,
    name_list,
)
from skipway.data.sources.readers import FileStore
from skipway.data.sources.splits import SPLIT_NAMES, SPLITS, Split, looks_like_split, split_of
from skipway.errors import DataError, printable

__all__ = ["index_folders", "is_hidden"]


@dataclass
class FolderWalk:
    """Collects the images below class folders, and counts the files that are ignored."""

    root: Path
    outside: bool
    ignored: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)
    home: str = ""

    def __post_init__(self) -> None:
        self.home = os.path.realpath(self.root)

    def by_class(self, folder: Path, skip: Collection[str] = ()) -> FilesByClass:
        """The image files below each subfolder of `folder` that is not in `skip`, as sorted paths below the root."""
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        found = {}
        for entry in entries:
            if is_hidden(entry.name) or entry.name in skip:
                continue
            if entry.is_dir() and self.stays(entry):
                found[entry.name] = sorted(self.below(folder / entry.name))
            elif entry.is_file():
                self.ignored[f"{Path(entry.name).suffix.lower() or 'no suffix'} outside the class folders"] += 1
        return found

    def below(self, folder: Path) -> list[str]:
        """The image files anywhere below `folder`; linked folders are not followed, so there are no cycles."""
        found: list[str] = []
        waiting = [folder]
        while waiting:
            for entry in os.scandir(waiting.pop()):
                if is_hidden(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif entry.is_symlink() and is_folder(entry):
                    self.links.append(self.relative(entry))
                elif (suffix := Path(entry.name).suffix.lower()) not in SUFFIXES:
                    self.ignored[suffix or "no suffix"] += 1
                elif self.stays(entry):
                    found.append(self.relative(entry))
        return found

    def relative(self, entry: os.DirEntry[str]) -> str:
        """The path below the root, with forward slashes."""
        return Path(entry.path).relative_to(self.root).as_posix()

    def stays(self, entry: os.DirEntry[str]) -> bool:
        """Whether an entry is not a link out of the root, or such links are allowed."""
        if self.outside or not entry.is_symlink():
            return True
        target = os.path.realpath(entry.path)
        if os.path.commonpath([self.home, target]) == self.home:
            return True
        self.links.append(self.relative(entry))
        return False


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; False for a link to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or made by the operating system or an archiver."""
    return name.startswith((".", "__MACOSX")) or name in ("Thumbs.db", "desktop.ini")


# folders of a validation or test split that stand for images without a class
PLACEHOLDERS = frozenset({"unknown", "unlabeled", "unlabelled", "images"})


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which folders of a source hold which split.

    Args:
        folders: the folder of each split; that of `train` is the source itself where it has no training folder.
        unused: the other folders beside `train`, each with the reason.
        splits: names of the folders in the source that are splits and therefore no classes.
    """

    folders: dict[Split, Path]
    unused: tuple[str, ...] = ()
    splits: frozenset[str] = frozenset()


def layout_of(root: Path) -> Layout:
    """The layout of a folder of images, by the names of its subfolders.

    A folder `train` that holds images but no folders is a class beside other classes: trains are vehicles.

    Raises:
        DataError: there are split folders but no training images, or class folders beside one whose name sounds like
            a split that is not known.
    """
    names = sorted(entry.name for entry in os.scandir(root) if not is_hidden(entry.name) and is_folder(entry))
    by_split: dict[Split | None, list[str]] = {}
    for name in names:
        by_split.setdefault(split_of(name), []).append(name)
    others = by_split.get(None, [])
    train = [name for name in by_split.get("train", []) if not others or holds_folders(root / name)]
    folders: dict[Split, Path] = {"train": root}
    unused = []
    for split in SPLITS:
        candidates = train if split == "train" else by_split.get(split, [])
        ranked = sorted(candidates, key=lambda name: rank_of(split, name))
        if ranked:
            folders[split] = innermost(root / ranked[0], split)
        unused += [f"{printable(name)!r}: {printable(ranked[0])!r} is the {split} split" for name in ranked[1:]]
    if folders["train"] != root:
        unused += [f"{printable(name)!r}: its name is none of train, val, test" for name in others]
        return Layout(folders=folders, unused=tuple(unused))
    where = printable(root)
    unclear = [name for name in others if looks_like_split(name)]
    if unclear:
        raise DataError(
            f"{name_list(unclear)} in {where} sounds like a split, not like a class: name it train, val or test, or, "
            "if it is a class, move all class folders into a folder named train"
        )
    splits = frozenset(name for split in ("validation", "test") for name in by_split.get(split, []))
    if splits and len(names) == len(splits):
        raise DataError(f"{where} has {name_list(splits)} but no training folder: add one named train")
    return Layout(folders=folders, unused=tuple(unused), splits=splits)


def rank_of(split: Split, name: str) -> tuple[int, str]:
    """The order in which folders that name the same split are preferred: by the vocabulary, then by name."""
    known = SPLIT_NAMES[split]
    return known.index(name.lower()) if name.lower() in known else len(known), name


def holds_folders(folder: Path) -> bool:
    """Whether a folder holds another one that is not hidden."""
    with os.scandir(folder) as entries:
        return any(not is_hidden(entry.name) and is_folder(entry) for entry in entries)


def innermost(folder: Path, split: Split) -> Path:
    """The folder itself, or, as archives unpack to `train/train`, the only folder in it that names the same split."""
    while True:
        inner = [entry for entry in os.scandir(folder) if not is_hidden(entry.name)]
        if len(inner) != 1 or split_of(inner[0].name) != split or not is_folder(inner[0]):
            return folder
        folder = folder / inner[0].name


def index_folders(root: Path, *, allow_empty: bool = False, outside: bool = False) -> SourceIndex:
    """Index the images of class folders.

    Args:
        root: the folder.
        allow_empty: keep a class whose folder holds no image.
        outside: follow links to files, and class folders that are links, out of the root.

    Raises:
        DataError: the folder is empty, has fewer than two classes, an empty class, or a class in its validation or
            test split that the training split lacks; or a name is neither clearly a split nor clearly a class.
    """
    layout = layout_of(root)
    folder = layout.folders["train"]
    walk = FolderWalk(root, outside)
    train = walk.by_class(folder, skip=layout.splits)
    classes = check_classes(train, printable(folder), allow_empty=allow_empty)
    held: dict[str, FilesByClass | None] = {}
    remarks = []
    for split, folder in layout.folders.items():
        if split == "train":
            continue
        own = FolderWalk(root, outside)
        held[split], unsorted = labelled(own, folder, classes)
        if unsorted:
            remarks.append(
                f"{printable(folder.name)!r} holds {unsorted:,} images that are not in class folders: it is left "
                f"alone, and {split} images are split off the training split"
            )
            continue
        check_known_classes(held[split] or {}, classes, printable(folder), split)
        walk.ignored.update(own.ignored)
        walk.links += own.links
    if walk.links:
        remarks.append(f"links not followed, to folders or out of the data: {name_list(walk.links, 3)}")
    return SourceIndex(
        store=FileStore(root),
        name=root.resolve().name,
        classes=classes,
        train=train,
        validation=held.get("validation"),
        test=held.get("test"),
        ignored=walk.ignored,
        unused=layout.unused,
        remarks=tuple(remarks),
    )


def labelled(walk: FolderWalk, folder: Path, classes: Collection[str]) -> tuple[FilesByClass | None, int]:
    """The images of a validation or test folder by class, and 0; or None and the number of images without a class."""
    files = walk.by_class(folder)
    full = {name for name in files if files[name]}
    if full - (PLACEHOLDERS - set(classes)):
        return files, 0
    with os.scandir(folder) as entries:
        loose = sum(Path(entry.name).suffix.lower() in SUFFIXES and not is_hidden(entry.name) for entry in entries)
    count = loose + sum(map(len, files.values()))
    return (None, count) if count else (files, 0)
