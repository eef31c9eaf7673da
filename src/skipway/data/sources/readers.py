"""Image stores: the bytes of an image in a file, in a tar file, or in a cell of a table.

Decoding, inspection and caching know a source by its store alone, so they work for every source. Stores are picklable
and thread-safe.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, final

from skipway.data.decode import MAX_BYTES, UnreadableImage
from skipway.errors import DataError, first_line

__all__ = ["FileStore", "ImageStore", "ShardMember", "ShardStore", "Stamp", "TableStore"]

Stamp = tuple[int, int]


class ImageStore(ABC):
    """Images by name; messages call an image `root / name`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.png").write_bytes(b"pixels")
    ...     FileStore(Path(folder)).read("a.png")
    b'pixels'
    """

    root: Path

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Read all bytes of an image.

        Raises:
            UnreadableImage: they cannot be read, or are more than 256 MB.
        """

    @abstractmethod
    def stamp(self, name: str) -> Stamp:
        """Two numbers that change with the image: size and modification time in nanoseconds; (-1, -1): unknown."""


@final
@dataclass
class FileStore(ImageStore):
    """Files below a folder, or anywhere if the name is absolute."""

    root: Path

    def read(self, name: str) -> bytes:
        path = self.root / name
        try:
            # opening a pipe would block
            with open(
                os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb"
            ) as f:
                about = os.fstat(f.fileno())
                if not stat.S_ISREG(about.st_mode):
                    raise UnreadableImage(path, "not a regular file")
                check_file_size(path, about.st_size)
                return f.read()  # with a number of bytes, that many would be allocated
        except UnreadableImage:
            raise
        except FileNotFoundError as error:
            broken = " behind this link" if path.is_symlink() else ""
            raise UnreadableImage(path, f"no such file{broken}") from error
        except PermissionError as error:
            raise UnreadableImage(path, "no permission to read it") from error
        except (OSError, ValueError) as error:  # a loop of links, a null byte in the name, a disk that fails
            raise UnreadableImage(path, (getattr(error, "strerror", "") or str(error)).lower()) from error

    def stamp(self, name: str) -> Stamp:
        try:
            about = os.stat(self.root / name)
        except (OSError, ValueError):
            return -1, -1
        return about.st_size, about.st_mtime_ns


class ShardMember(NamedTuple):
    """A member of a tar file: the file, its offset and its size."""

    shard: str
    offset: int
    size: int


@final
@dataclass
class ShardStore(ImageStore):
    """Members of tar files, read in place; nothing is unpacked."""

    root: Path
    members: Mapping[str, ShardMember]

    def read(self, name: str) -> bytes:
        member = self.members[name]
        path = self.root / name
        check_file_size(path, member.size)
        try:
            with open(self.root / member.shard, "rb") as file:
                file.seek(member.offset)
                content = file.read(member.size)
        except OSError as error:
            raise UnreadableImage(path, (error.strerror or str(error)).lower()) from error
        if len(content) < member.size:
            raise UnreadableImage(path, "the shard ends before its member does")
        return content

    def stamp(self, name: str) -> Stamp:
        member = self.members[name]
        try:
            changed = os.stat(self.root / member.shard).st_mtime_ns
        except OSError:
            return -1, -1
        return member.size, changed + member.offset


@final
@dataclass
class TableStore(ImageStore):
    """Cells of Hugging Face data sets: `tables` by split, the name of an image is `split/row`.

    Cells hold bytes or paths; a path must not leave `root` unless `outside` is set.
    """

    root: Path
    column: str
    tables: Mapping[str, Any] = field(repr=False)
    outside: bool = False

    def read(self, name: str) -> bytes:
        split, row = name.rsplit("/", 1)
        path = self.root / name
        try:
            cell = self.tables[split][int(row)][self.column]
        except Exception as error:  # whatever the library's readers of a damaged table raise
            raise UnreadableImage(path, first_line(error, 100) if str(error) else "cannot be read") from error
        if not isinstance(cell, Mapping):
            raise UnreadableImage(path, f"the column {self.column!r} holds {type(cell).__name__}, not an image")
        content, file = cell.get("bytes"), cell.get("path")
        if content is not None:
            check_file_size(path, len(content))
            return bytes(content)
        if not file:
            raise UnreadableImage(path, "an empty cell")
        if not self.outside and not Path(file).resolve().is_relative_to(self.root.resolve()):
            raise UnreadableImage(path, "a path that leads out of the data set")
        return FileStore(self.root).read(file)

    def stamp(self, name: str) -> Stamp:
        split, row = name.rsplit("/", 1)
        print_of = str(getattr(self.tables[split], "_fingerprint", ""))
        if not print_of:
            return -1, -1
        return int(row), int.from_bytes(print_of.encode()[:8], "big") >> 1


def check_file_size(path: Path, size: int) -> None:
    """Check that an image has at most 256 MB.

    Raises:
        UnreadableImage: it has more.
    """
    if size > MAX_BYTES:
        raise UnreadableImage(path, f"a file of more than {MAX_BYTES >> 20} MB: convert it to PNG or JPEG")


def check_member_name(name: str, source: Path) -> None:
    """Check that the name of a member stays inside its archive.

    Raises:
        DataError: it is absolute or goes up.
    """
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name or (len(name) > 1 and name[1] == ":"):
        raise DataError(
            f"{source}: member {name!r} leads out of the archive, and is not read; pack it again with relative names"
        )
