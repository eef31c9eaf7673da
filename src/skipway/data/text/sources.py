"""`text_source`: detect the kind of a source of text."""

from __future__ import annotations

from pathlib import Path

from skipway.data.sources.scan import LeftOut, scan_folder
from skipway.data.sources.splits import Split, split_of
from skipway.data.text.compression import plain_name
from skipway.data.text.documents import FileSource, TextFile, TextSource, standard_library
from skipway.errors import DataError, printable

__all__ = ["text_source"]


def text_source(
    source: Path | str | None, *, divider: str | None = None, encoding: str | None = None, outside: bool = False
) -> TextSource:
    """Find the documents of a source.

    Args:
        source: a file, a folder, or None for the standard library of Python.
        divider: the text between two documents of a file.
        encoding: of the files.
        outside: follow links that lead out of a folder.

    Raises:
        DataError: there is no such source.
    """
    if source is None:
        return standard_library()
    path = Path(source)
    try:
        if path.is_dir():
            top, left_out = scan_folder(path, outside=outside, fault=lambda entry: "")
            files = top.below()
            if not files:
                raise DataError("; ".join([f"{printable(path)} holds no text files", *left_out.sentences()]))
            parts, remarks = split_files(files)
            return FileSource(
                name=path.resolve().name,
                root=path,
                files=parts,
                divider=divider,
                encoding=encoding,
                remarks=(*remarks, *left_out.sentences()),
            )
        if path.is_file():
            file = TextFile(path.name, None)
            return FileSource(
                name=Path(plain_name(path.name)).stem,
                root=path.parent,
                files=(file,),
                divider=divider,
                encoding=encoding,
            )
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read: {error.strerror}") from error
    raise DataError(f"{printable(path)} does not exist; without a source, training uses Python's standard library")


def split_files(files: list[str]) -> tuple[tuple[TextFile, ...], list[str]]:
    """The files with the splits that their folders name, where one of them is the training split.

    Beside such folders, other files are left out. A file `train.txt` names a split where another file names another.

    >>> split_files(["train/a.txt", "val/b.txt", "README"])
    ((TextFile(path='train/a.txt', split='train'), TextFile(path='val/b.txt', split='validation')),
     ["1 file left out, beside the folders of the splits: 'README'"])
    """
    named = [TextFile(file, split_of_path(file)) for file in files]
    splits = {file.split for file in named} - {None}
    folder = any(file.split == "train" and "/" in file.path for file in named)
    if "train" not in splits or not (folder or len(splits) > 1):
        return tuple(TextFile(file, None) for file in files), []
    left_out = LeftOut()
    for file in named:
        if file.split is None:
            left_out.add("beside the folders of the splits", file.path)
    return tuple(file for file in named if file.split is not None), left_out.sentences()


def split_of_path(path: str) -> Split | None:
    """The split that the first folder of a path names, or the file itself where it is in none.

    >>> split_of_path("val/x/a.txt"), split_of_path("train.txt"), split_of_path("book.txt")
    ('validation', 'train', None)
    """
    first, _, rest = path.partition("/")
    return split_of(first if rest else Path(plain_name(first)).stem)
