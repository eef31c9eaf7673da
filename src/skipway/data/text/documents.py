"""Sources of documents: files of text and of tables, and Python's own standard library."""

from __future__ import annotations

import hashlib
import platform
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple, final

from skipway.data.sources.readers import FileStore
from skipway.data.sources.splits import Split
from skipway.data.text.charset import Notes, NotText, decode_text_file
from skipway.data.text.compression import decompress, plain_name
from skipway.data.text.rows import ROW_READERS, RowReader, TextColumn
from skipway.errors import DataError, counted, printable

__all__ = ["Document", "FileSource", "TextSource", "standard_library"]

# folders in the standard library that hold no part of it, tests, which not every installation has, or tables of letters
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__", "idle_test", "encodings"})


class Document(NamedTuple):
    """A text with its name, and the split that its source puts it in; None: it is to be split."""

    name: str
    text: str
    split: Split | None = None


@dataclass(frozen=True, kw_only=True)
class TextSource(ABC):
    """Documents in a fixed order, which can be read more than once.

    Args:
        name: for people.
        remarks: what a user may not expect of it.
    """

    name: str
    remarks: tuple[str, ...] = ()

    def stamp(self) -> str | None:
        """A text that changes with the documents, as far as that can be known without reading them; None: it cannot."""
        return None

    @abstractmethod
    def documents(self, notes: Notes) -> Iterator[Document]:
        """Read the documents; notes receive what is left out, and how bytes became text.

        Raises:
            DataError: the source cannot be read.
        """


class TextFile(NamedTuple):
    """A file of a source: its path below the root, and its split."""

    path: str
    split: Split | None


@final
@dataclass(frozen=True, kw_only=True)
class FileSource(TextSource):
    """Text files below a folder, one document each, or one for each row of a table.

    Args:
        root: the folder.
        files: paths below it, with their splits.
        divider: the text between two documents of a file; None: a file is one document.
        encoding: of the files; None: by content.
        column: of tables, that holds the text.
    """

    root: Path
    files: tuple[TextFile, ...]
    divider: str | None = None
    encoding: str | None = None
    column: TextColumn = field(default_factory=TextColumn)

    def stamp(self) -> str | None:
        """The paths, splits, sizes and modification times of the files, and how they are read."""
        digest = hashlib.sha256(ascii((self.divider, self.column, self.encoding)).encode())
        store = FileStore(self.root)
        for file in self.files:
            stamp = store.stamp(file.path)
            if stamp == (-1, -1):
                return None
            digest.update(ascii((file, stamp)).encode())
        return digest.hexdigest()[:32]

    def documents(self, notes: Notes) -> Iterator[Document]:
        for file in self.files:
            several = self.divider is not None or self.reader_of(file) is not None
            try:
                for number, text in enumerate(self.texts(file, notes)):
                    name = f"{file.path}#{number + 1}" if several else file.path
                    if text.strip():
                        yield Document(name, text, file.split)
                    else:
                        notes.add("left out, since it is empty", name)
            except NotText as error:
                if len(self.files) == 1:
                    raise DataError(
                        f"{printable(self.root / file.path)} is no text: it is {error}; give a file of text"
                    ) from error
                notes.add(f"left out, since it is no text but {error}", file.path)
            except OSError as error:
                if len(self.files) == 1:
                    raise DataError(
                        f"{printable(self.root / file.path)} cannot be read: {error.strerror}; see its rights"
                    ) from error
                notes.add(f"left out, since it cannot be read ({(error.strerror or '').lower()})", file.path)

    def reader_of(self, file: TextFile) -> RowReader | None:
        """What reads the rows of a file; None: it is no table."""
        return ROW_READERS.get(PurePosixPath(plain_name(file.path)).suffix.lower())

    def texts(self, file: TextFile, notes: Notes) -> Iterator[str]:
        """The texts in a file."""
        path = self.root / file.path
        try:
            content = decompress(path.read_bytes())
        except MemoryError as error:
            raise DataError(f"{printable(path)} does not fit into memory: divide it into several files") from error
        reader = self.reader_of(file)
        if reader is not None:
            yield from reader(content, file.path, self.column, notes)
            return
        text = decode_text_file(content, file.path, notes, self.encoding)
        yield from [text] if self.divider is None else text.split(self.divider)


def standard_library() -> FileSource:
    """The Python files of the standard library of this interpreter, with the documentation in them, without tests.

    Which modules belong to it is `sys.stdlib_module_names`; so the texts depend on the version of Python alone, as far
    as a distribution does not change them.

    Raises:
        DataError: this Python has no source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[str] = []
    for name in sorted(sys.stdlib_module_names):
        single, package = root / f"{name}.py", root / name
        if single.is_file():
            found.append(single.name)
        elif package.is_dir():
            paths = (path.relative_to(root) for path in package.rglob("*.py"))
            found += sorted(path.as_posix() for path in paths if NOT_LIBRARY.isdisjoint(path.parts))
    if not found:
        raise DataError(
            f"the default texts are the files of Python's standard library, and {root} has none: give a text"
        )
    version = platform.python_version()
    files = counted(len(found), "file")
    about = f"the text is the standard library of Python {version}, {files}: it differs between versions"
    return FileSource(
        name=f"python-{version}",
        root=root,
        files=tuple(TextFile(path, None) for path in found),
        encoding="utf-8",
        remarks=(about,),
    )
