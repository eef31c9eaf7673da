"""The files below a folder: those of a kind, images by default, subfolders, and what is left out with the reason.

A file with an image suffix is an image, to be judged when it is read; any other is one if its first bytes say so.
Hidden files and folders that a system makes are left out. Links are followed below the folder, and out of it where that
is allowed; a link to a folder that contains it is not, nor is one behind `MAX_LINKS` others.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from skipway.data.content import content_fault
from skipway.errors import counted, printable

__all__ = ["SUFFIXES", "LeftOut", "SourceFolder", "name_fault", "scan_folder"]

# suffixes of formats that Pillow reads and nothing else has: their files need not be opened to be found
SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2"),
    }
)
# folders that systems make; hidden ones begin with a dot
SYSTEM_FOLDERS = frozenset(
    {
        *("__MACOSX", "@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "lost+found"),
        *("__pycache__",),
    }
)
# links to folders on the way to a file, so that folders that link to each other end
MAX_LINKS = 2


@dataclass
class LeftOut:
    """The files of a source, or rows of a list, that are not read: their number and the first of them, by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    thing: str = "file"

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count `count` files that are left out for a reason, the first of them `name`."""
        if count:
            self.counts[reason] += count
            self.first.setdefault(reason, name)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def sentences(self, limit: int = 6) -> list[str]:
        """One sentence for each of the most frequent reasons.

        >>> left_out = LeftOut()
        >>> left_out.add("hidden", "cat/.x.jpg", 2)
        >>> left_out.sentences()
        ["2 files left out, hidden: 'cat/.x.jpg', …"]
        """
        shown = self.counts.most_common(limit)
        found = []
        for reason, count in shown:
            first = repr(printable(self.first[reason])) + (", …" if count > 1 else "")
            found.append(f"{counted(count, self.thing)} left out, {reason}: {first}")
        rest = self.counts.total() - sum(count for _, count in shown)
        return [*found, *([f"{counted(rest, f'more {self.thing}')} left out, for other reasons"] if rest else [])]


@dataclass
class SourceFolder:
    """A folder with the files in it that are read, as sorted paths below the root, and its subfolders by name."""

    path: str
    files: list[str] = field(default_factory=list)
    folders: dict[str, SourceFolder] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the folder itself."""
        return self.path.rpartition("/")[2]

    def enter(self, path: str) -> SourceFolder:
        """The folder at a path below this one, made where it is missing."""
        here = self
        for name in path.split("/"):
            if name not in ("", "."):
                here = here.folders.setdefault(name, SourceFolder(f"{here.path}/{name}" if here.path else name))
        return here

    def walk(self) -> Iterator[SourceFolder]:
        """This folder and all below it."""
        waiting = [self]
        while waiting:
            yield (folder := waiting.pop())
            waiting += list(folder.folders.values())

    def below(self) -> list[str]:
        """All files in this folder and below it, sorted."""
        return sorted(file for folder in self.walk() for file in folder.files)


@dataclass
class Scan:
    """One scan: where it began, where links may lead, why a file is not read, and what has been left out."""

    root: Path
    outside: bool
    fault: Callable[[os.DirEntry[str]], str]
    left_out: LeftOut = field(default_factory=LeftOut)
    home: str = ""

    def __post_init__(self) -> None:
        self.home = os.path.realpath(self.root)

    def fill(self, top: SourceFolder) -> None:
        """Fill a folder with everything below it.

        Raises:
            OSError: the folder itself cannot be opened; one below it is left out.
        """
        # with each folder, where the links lie that lead to it
        waiting: list[tuple[SourceFolder, tuple[str, ...]]] = [(top, ())]
        while waiting:
            here, links = waiting.pop()
            try:
                with os.scandir(self.root / here.path) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except OSError as error:
                if here is top:
                    raise
                self.left_out.add(f"folders that cannot be opened ({(error.strerror or '').lower()})", here.path)
                continue
            inside = []
            for entry in entries:
                path = f"{here.path}/{entry.name}" if here.path else entry.name
                kind = self.kind_of(entry, links)
                if kind == "file":
                    here.files.append(path)
                elif kind == "folder":
                    here.folders[entry.name] = SourceFolder(path)
                    passed = (os.path.realpath(self.root / here.path),) if entry.is_symlink() else ()
                    inside.append((here.folders[entry.name], links + passed))
                else:
                    self.left_out.add(kind, path, count_files(entry))
            waiting += reversed(inside)

    def kind_of(self, entry: os.DirEntry[str], links: tuple[str, ...]) -> str:
        """ "file", "folder", or the reason why an entry is left out."""
        folder = leads_to(entry, os.DirEntry.is_dir)
        if entry.name.startswith("."):
            return "in hidden folders" if folder and not entry.is_symlink() else "hidden"
        if folder and entry.name in SYSTEM_FOLDERS and not entry.is_symlink():
            return "in folders that a system made"
        if entry.is_symlink() and (reason := self.link_fault(entry, folder, links)):
            return reason
        if folder:
            return "folder"
        if not leads_to(entry, os.DirEntry.is_file) and not has_image_suffix(entry):
            return "a broken link" if entry.is_symlink() else "not a regular file"
        try:
            return self.fault(entry) or "file"
        except OSError as error:
            return f"cannot be opened ({(error.strerror or str(error)).lower()})"

    def link_fault(self, entry: os.DirEntry[str], folder: bool, links: tuple[str, ...]) -> str:
        """The reason why a link is not followed, else ""."""
        target = os.path.realpath(entry.path)
        if not self.outside and not is_below(target, self.home):
            return "a link out of the folder, which outside=True follows"
        if folder and any(is_below(place, target) for place in (*links, os.path.realpath(os.path.dirname(entry.path)))):
            return "a link to a folder that contains it"
        return f"a link to a folder behind {MAX_LINKS} others" if folder and len(links) >= MAX_LINKS else ""


def has_image_suffix(entry: os.DirEntry[str]) -> bool:
    """Whether the name of an entry ends as that of an image."""
    return os.path.splitext(entry.name)[1].lower() in SUFFIXES


def image_fault(entry: os.DirEntry[str]) -> str:
    """What a file is that is no image by its suffix or its first bytes, else ""."""
    if has_image_suffix(entry):
        return ""
    with open(entry.path, "rb") as file:
        return content_fault(file, os.path.splitext(entry.name)[1].lower())


def leads_to(entry: os.DirEntry[str], kind: Callable[[os.DirEntry[str]], bool]) -> bool:
    """Whether an entry, or what it links to, is a folder or a file; False for a link to itself."""
    try:
        return kind(entry)
    except OSError:
        return False


def name_fault(path: str) -> str:
    """The reason why a file in an archive is left out by its path, as below a folder, else "".

    >>> name_fault("./cat/1.png"), name_fault("cat/.1.png"), name_fault(".git/1.png"), name_fault("__MACOSX/cat/1.png")
    ('', 'hidden', 'in hidden folders', 'in folders that a system made')
    """
    *folders, file = path.split("/")
    for folder in folders:
        if folder.startswith(".") and folder != ".":
            return "in hidden folders"
        if folder in SYSTEM_FOLDERS:
            return "in folders that a system made"
    return "hidden" if file.startswith(".") else ""


def is_below(path: str, folder: str) -> bool:
    """Whether a path is a folder or below it; both are absolute and without links."""
    try:
        return os.path.commonpath([folder, path]) == folder
    except ValueError:  # on another drive
        return False


def count_files(entry: os.DirEntry[str]) -> int:
    """The number of files and links in a folder that is left out; 1 for a file or a link."""
    if entry.is_symlink() or not entry.is_dir():
        return 1
    count = 0
    for parent, folders, files in os.walk(entry.path):
        count += len(files) + sum(os.path.islink(os.path.join(parent, name)) for name in folders)
    return count


def scan_folder(
    root: Path, *, outside: bool = False, fault: Callable[[os.DirEntry[str]], str] = image_fault
) -> tuple[SourceFolder, LeftOut]:
    """Scan a folder.

    Args:
        root: the folder.
        outside: follow links that lead out of it.
        fault: says why a file is not read, "" for one that is.

    Returns:
        the folder with its files and subfolders, and the files that are left out; together every file below the root,
        and every link that is not followed, once.

    Raises:
        OSError: the folder cannot be opened.
    """
    scan, top = Scan(root, outside, fault), SourceFolder("")
    scan.fill(top)
    return top, scan.left_out
