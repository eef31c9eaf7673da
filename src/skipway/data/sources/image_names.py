"""The files that the cells of a list name: with backslashes, without suffix, from a folder, or of another computer."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from skipway.data.sources.scan import is_below, scan_folder
from skipway.errors import counted, printable

__all__ = ["ImageNames"]


class ImageNames:
    """Finds the images below the folder of a list.

    A cell is a path from the folder of the list. Where there is no such file, an image below the folder is taken whose
    path ends in the cell, with or without suffix; leading folders that all cells have may be missing, as where a data
    set was moved. Of several, the one in the folder that most others are in.

    Args:
        path: the list.
    """

    def __init__(self, path: Path) -> None:
        self.root = path.parent
        self.home = os.path.realpath(path.parent)
        self.stem = path.stem
        self.by_name: dict[str, list[str]] | None = None

    def direct(self, cell: str) -> str | None:
        """The file that a cell names as it stands, or in another spelling of the same path."""
        for form in dict.fromkeys((cell, cell.strip(), cell.strip().replace("\\", "/"))):
            for name in dict.fromkeys((form, *(unicodedata.normalize(kind, form) for kind in ("NFC", "NFD")))):
                try:
                    if name and os.path.isfile(os.path.join(self.home, name)):
                        return self.relative(name)
                except ValueError:  # a null byte
                    return None
        return None

    def relative(self, name: str) -> str:
        """A path without empty parts and dots; relative to the folder of the list where it leads below that."""
        parts = "/".join(part for part in name.split("/") if part not in ("", "."))
        if not os.path.isabs(name):
            return parts
        return os.path.relpath(name, self.home) if is_below(os.path.normpath(name), self.home) else name

    def leads_out(self, name: str) -> bool:
        """Whether a name leads out of the folder of the list."""
        return "\0" not in name and not is_below(os.path.realpath(os.path.join(self.home, name)), self.home)

    def lookup(self, cells: Sequence[str]) -> dict[str, str]:
        """The files below the folder for cells that name none as they stand."""
        parts = {cell: split_path(cell) for cell in dict.fromkeys(cells) if cell.strip() and "\0" not in cell}
        parts = {cell: path for cell, path in parts.items() if path and ".." not in path}
        if not parts:
            return {}
        first, last = min(parts.values()), max(parts.values())
        common = 0  # leading folders of all cells
        while common < min(len(first), len(last)) - 1 and first[common] == last[common]:
            common += 1
        droppable = common if len(parts) > 1 else 0
        found = {cell: self.candidates(path, droppable) for cell, path in parts.items()}
        folders = Counter(start for starts in found.values() for start, _ in starts)
        chosen = {}
        for cell, starts in found.items():
            ranked = sorted(starts, key=lambda each: (self.is_own(each[0]), folders[each[0]]), reverse=True)
            rank = [(self.is_own(start), folders[start]) for start, _ in ranked]
            if len(ranked) == 1 or (ranked and rank[0] != rank[1]):
                chosen[cell] = ranked[0][1]
        return chosen

    def is_own(self, start: str) -> bool:
        """Whether a folder has the name of the list."""
        return self.stem.lower() in start.lower().split("/")

    def candidates(self, path: list[str], droppable: int) -> list[tuple[str, str]]:
        """(leading folders, file) of each image whose path ends in this one, without as few leading folders of it as
        possible.
        """
        if self.by_name is None:
            self.by_name = {}
            for image in scan_folder(self.root)[0].below():
                name = image.rpartition("/")[2]
                for key in {name, os.path.splitext(name)[0]}:
                    self.by_name.setdefault(unicodedata.normalize("NFC", key), []).append(image)
        files = self.by_name.get(path[-1], [])
        for dropped in range(droppable + 1):
            folders = path[dropped:-1]
            fitting = []
            for file in files:
                above = unicodedata.normalize("NFC", file).split("/")[:-1]
                if above[len(above) - len(folders) :] == folders and len(above) >= len(folders):
                    fitting.append(("/".join(above[: len(above) - len(folders)]), file))
            if fitting:
                return fitting
        return []

    def resolve(self, cells: Sequence[str]) -> dict[str, str]:
        """The file of each cell that has one."""
        found = {cell: name for cell in dict.fromkeys(cells) if (name := self.direct(cell)) is not None}
        return found | self.lookup([cell for cell in dict.fromkeys(cells) if cell not in found])

    def remarks(self, found: Iterable[tuple[str, str]]) -> list[str]:
        """Remarks about cells that do not name their file as it is."""
        added, folders = Counter[str](), Counter[str]()
        first: tuple[str, str] | None = None
        for cell, file in found:
            name = cell.strip().replace("\\", "/")
            if cell == file or unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", file):
                continue
            suffix = os.path.splitext(file)[1]
            bare = file.removesuffix(suffix)
            added[suffix] += name.endswith(bare.rpartition("/")[2]) and not name.endswith(suffix)
            start = bare.removesuffix(os.path.splitext(name)[0] if name.endswith(suffix) else name)
            folders[start if start != bare else "the folder of the list"] += bool(start)
            first = first or (cell, file)
        if first is None:
            return []
        places = ", ".join(f"{printable(place)} {count:,}" for place, count in folders.most_common(3) if count)
        endings = ", ".join(f"{suffix or 'none'} {count:,}" for suffix, count in added.most_common(3) if count)
        parts = [f"in {places}" if places else "", f"with the suffix {endings}" if endings else ""]
        cell, file = first
        total = counted(max(folders.total(), added.total()), "image")
        return [
            f"{total} of the list found {', '.join(filter(None, parts))}: {printable(cell)!r} is {printable(file)!r}"
        ]


def split_path(cell: str) -> list[str]:
    """The parts of a path of any system, without drive and root."""
    path = unicodedata.normalize("NFC", cell.strip().replace("\\", "/"))
    return [part for part in re.sub(r"^[A-Za-z]:", "", path).split("/") if part not in ("", ".")]
