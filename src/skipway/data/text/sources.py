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
from skipway.data.text.rows import ROW_READERS, TextColumn
from skipway.errors import DataError, printable, spell

__all__ = ["text_source"]

# the end of the name of one of several files of a split
SHARD = re.compile(r"-\d+-of-\d+$")
DATA_SUFFIXES = frozenset((".txt", *ROW_READERS))
"""Of files that are no programs, whose names do not speak of what they do."""


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
    """The files with the splits that their first folders name, where one of them is the training split; else those that
    the files themselves name.

    Files beside them are left out. `train.txt` beside `test.txt` are splits, whatever stands beside them, and so are
    tables; of other suffixes files name splits where all of the suffix in their folder do, as `train.py` beside
    `model.py` does not. A file for training alone does where it is numbered as a shard,
    `train-00000-of-00002.parquet`.

    >>> split_files(["train/a.txt", "val/b.txt", "README"])
    ((TextFile(path='train/a.txt', split='train'), TextFile(path='val/b.txt', split='validation')),
     ["1 file left out, beside the folders of the splits: 'README'"])
    >>> split_files(["src/train.py", "src/model.py"])
    ((TextFile(path='src/train.py', split=None), TextFile(path='src/model.py', split=None)), [])
    """
    folders = [split_of(file.partition("/")[0]) if "/" in file else None for file in files]
    alike: dict[tuple[str, str], list[str]] = {}
    for file in files:
        alike.setdefault(kind_of(file), []).append(file)
    clear = {kind for kind, members in alike.items() if kind[1] in DATA_SUFFIXES or all(map(split_of_name, members))}
    names = [split_of_name(file) if kind_of(file) in clear else None for file in files]
    found = [folder or name for folder, name in zip(folders, names, strict=True)]
    numbered = any(SHARD.search(stem_of(file)) for file, split in zip(files, found, strict=True) if split == "train")
    if "train" not in found or not ("train" in folders or numbered or len({*found} - {None}) > 1):
        return tuple(TextFile(file, None) for file in files), []
    left_out = LeftOut()
    what = "folders" if "train" in folders else "files"
    for file, split in zip(files, found, strict=True):
        if split is None:
            left_out.add(f"beside the {what} of the splits", file)
    parts = zip(files, found, strict=True)
    return tuple(TextFile(file, split) for file, split in parts if split is not None), left_out.sentences()


def kind_of(path: str) -> tuple[str, str]:
    """The folder of a file and its suffix, that of a compressed one without the compression."""
    name = Path(plain_name(Path(path).name))
    return str(Path(path).parent), name.suffix.lower()


def stem_of(path: str) -> str:
    """The name of a file without its suffix."""
    return Path(plain_name(Path(path).name)).stem


def split_of_name(path: str) -> Split | None:
    """The split that a file itself names; a number of shards does not matter.

    >>> split_of_name("data/train-00000-of-00002.parquet"), split_of_name("val.txt.gz"), split_of_name("book.txt")
    ('train', 'validation', None)
    """
    return split_of(SHARD.sub("", stem_of(path)))
