"""`text_source`: detect the kind of a source of text."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from skipway.data.sources.hub import HUB_PREFIX, is_saved_dataset
from skipway.data.sources.scan import LeftOut, scan_folder
from skipway.data.sources.splits import Split, split_of
from skipway.data.text.choices import TextChoices
from skipway.data.text.compression import plain_name
from skipway.data.text.documents import FileSource, TextFile, TextSource, standard_library
from skipway.data.text.hub_tables import table_source
from skipway.data.text.rows import TextColumn
from skipway.errors import DataError, printable, spell

__all__ = ["text_source"]


def text_source(choices: TextChoices) -> TextSource:
    """Find the documents of a source, see `TextChoices`.

    Raises:
        DataError: there is no such source.
        MissingExtraError: it needs a library that is not installed.
    """
    source = choices.source
    if source is None:
        return with_no_effect(standard_library(), choices, ("column", "divider", "encoding"))
    if str(source).startswith(HUB_PREFIX):
        return with_no_effect(table_source(source, choices.column), choices, ("divider", "encoding"))
    path = Path(source)
    try:
        if path.is_dir():
            if is_saved_dataset(path):
                return with_no_effect(table_source(path, choices.column), choices, ("divider", "encoding"))
            return folder_source(path, choices)
        if path.is_file():
            return file_source(path.parent, (TextFile(path.name, None),), Path(plain_name(path.name)).stem, choices)
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read: {error.strerror}; see its rights, and the disk") from error
    fault = "is no regular file" if os.path.lexists(path) else "does not exist"
    raise DataError(f"{printable(path)} {fault}; without a source, the text is Python's standard library")


def folder_source(path: Path, choices: TextChoices) -> TextSource:
    """The files of a folder.

    Raises:
        DataError: it holds none.
        OSError: it cannot be opened.
    """
    top, left_out = scan_folder(path, outside=choices.outside, fault=lambda entry: "")
    files = top.below()
    if not files:
        raise DataError(
            "; ".join(
                [
                    f"{printable(path)} holds no text files",
                    *left_out.sentences(),
                    "give a folder of .txt, .md, .jsonl, …, or one file",
                ]
            )
        )
    parts, remarks = split_files(files)
    suffixes = Counter(Path(plain_name(part.path)).suffix.lower() or "no suffix" for part in parts)
    if len(suffixes) > 1:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes.most_common(8))
        remarks.append(f"every file that is text is read: {kinds}")
    return file_source(path, parts, path.resolve().name, choices, (*remarks, *left_out.sentences()))


def file_source(
    root: Path, files: tuple[TextFile, ...], name: str, choices: TextChoices, remarks: tuple[str, ...] = ()
) -> TextSource:
    """Some files, of which tables are read by their suffix."""
    source = FileSource(
        name=name,
        remarks=remarks,
        root=root,
        files=files,
        divider=choices.divider,
        encoding=choices.encoding,
        column=TextColumn(choices.column, choices.encoding),
    )
    tables = [source.reader_of(file) is not None for file in files]
    unused = [] if any(tables) else ["column"]
    return with_no_effect(source, choices, (*unused, *(["divider"] if all(tables) else [])))


def with_no_effect(source: TextSource, choices: TextChoices, names: Sequence[str]) -> TextSource:
    """A source with a remark for each choice that has no effect on it."""
    given = [spell(name, getattr(choices, name)) for name in names if getattr(choices, name) is not None]
    remarks = [f"{each} has no effect on {printable(source.name)}" for each in given]
    return replace(source, remarks=(*source.remarks, *remarks))


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
    """The split that the first folder of a path names, else the file itself; a number of shards does not matter.

    >>> split_of_path("val/x/a.txt"), split_of_path("data/train-00000-of-00002.parquet"), split_of_path("book.txt")
    ('validation', 'train', None)
    """
    first, _, rest = path.partition("/")
    if rest and (split := split_of(first)):
        return split
    return split_of(re.sub(r"-\d+-of-\d+$", "", Path(plain_name(Path(path).name)).stem))
