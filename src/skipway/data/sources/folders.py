"""Class folders: `train/<class>/*` with `test|val/<class>/*`, or `<class>/*`."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from skipway.data.sources.index import (
    SUFFIXES,
    TEST_NAMES,
    FilesByClass,
    SourceIndex,
    check_classes,
    check_test_classes,
    name_list,
    printable,
)
from skipway.data.sources.readers import Files

__all__ = ["find_folders", "hidden"]


@dataclass
class Walk:
    """Finds the images below class folders and counts what it passes by."""

    root: Path
    outside: bool
    ignored: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)
    home: str = ""

    def __post_init__(self) -> None:
        self.home = os.path.realpath(self.root)

    def by_class(self, folder: Path) -> FilesByClass:
        """The image files below each subfolder of `folder`, as sorted paths relative to the root."""
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        found = {}
        for entry in entries:
            if hidden(entry.name):
                continue
            if entry.is_dir() and self.stays(entry):
                found[entry.name] = sorted(self.below(folder / entry.name))
            elif entry.is_file():
                self.ignored[f"{Path(entry.name).suffix.lower() or 'no suffix'} outside the class folders"] += 1
        return found

    def below(self, folder: Path) -> list[str]:
        """The image files anywhere below `folder`; linked folders are not entered, so there are no loops."""
        found: list[str] = []
        waiting = [folder]
        while waiting:
            for entry in os.scandir(waiting.pop()):
                if hidden(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif entry.is_symlink() and entry_is_folder(entry):
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
        """Whether an entry is no link, or a link that does not lead out of the root, or leading out is asked for."""
        if self.outside or not entry.is_symlink():
            return True
        target = os.path.realpath(entry.path)
        if os.path.commonpath([self.home, target]) == self.home:
            return True
        self.links.append(self.relative(entry))
        return False


def entry_is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether a link leads to a folder; a link to itself leads nowhere."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def hidden(name: str) -> bool:
    """Whether a file or folder is the file system's or an archiver's own."""
    return name.startswith((".", "__MACOSX")) or name in ("Thumbs.db", "desktop.ini")


def find_folders(root: Path, *, allow_empty: bool = False, outside: bool = False) -> SourceIndex:
    """The images of class folders.

    Args:
        root: the folder.
        allow_empty: keep a class whose folder holds no image.
        outside: follow links to files, and class folders that are links, out of the root.

    Raises:
        DataError: the folder is empty, has fewer than two classes, an empty class, or a class in its test part that
            the training part lacks.
    """
    train_root = root / "train" if (root / "train").is_dir() else root
    tests = [] if train_root is root else [name for name in TEST_NAMES if (root / name).is_dir()]
    walk = Walk(root, outside)
    train = walk.by_class(train_root)
    classes = check_classes(train, printable(train_root), allow_empty=allow_empty)
    test = None
    if tests:
        test = walk.by_class(root / tests[0])
        check_test_classes(test, classes, printable(root / tests[0]))
    remarks = []
    if walk.links:
        remarks.append(f"links not followed, to folders or out of the data: {name_list(walk.links, 3)}")
    return SourceIndex(
        store=Files(root),
        name=root.resolve().name,
        classes=classes,
        train=train,
        test=test,
        ignored=walk.ignored,
        unused=tuple(tests[1:]),
        remarks=tuple(remarks),
    )
