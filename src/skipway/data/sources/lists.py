"""Lists of images: CSV, TSV or Parquet with the columns image, label and, optionally, split."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from skipway.data.sources.index import FilesByClass, SourceIndex, check_known_classes, name_list, sorted_classes
from skipway.data.sources.readers import FileStore
from skipway.data.sources.splits import SPLITS, known_names, split_of
from skipway.errors import DataError, MissingExtraError, printable

__all__ = ["LIST_SUFFIXES", "index_list"]

LIST_SUFFIXES = {".csv": ",", ".tsv": "\t", ".parquet": ""}

Row = tuple[str, str, str]


def index_list(path: Path, *, columns: Sequence[str], outside: bool = False) -> SourceIndex:
    """Index the images of a list.

    Args:
        path: the list; its images are relative to its folder.
        columns: names of the columns for image, label and split; the last is optional.
        outside: allow images outside the list's folder.

    Raises:
        DataError: a column is missing, a row incomplete, an image outside the folder or listed with two labels, or a
            split has an unknown name.
        MissingExtraError: Parquet needs pyarrow.
    """
    rows = parquet_rows(path, columns) if path.suffix.lower() == ".parquet" else csv_rows(path, columns)
    where, root = printable(path), path.parent
    home = os.path.realpath(root)
    splits: dict[str, FilesByClass] = {split: {} for split in SPLITS}
    seen: dict[str, tuple[str, str]] = {}
    repeated = distinct = 0
    for number, (image, label, split) in enumerate(rows, 2):
        if not image or not label:
            raise DataError(f"{where}, row {number}: the {columns[0] if not image else columns[1]} is empty")
        if not outside and "\0" not in image:
            target = os.path.realpath(os.path.join(home, image))
            if os.path.commonpath([home, target]) != home:
                raise DataError(
                    f"{where}, row {number}: {printable(image)!r} leads out of {printable(root)}; move the images "
                    "below the list, or allow it with outside"
                )
        part = split_of(split) if split else "train"
        if part is None:
            raise DataError(
                f"{where}, row {number}: split {printable(split)!r} is not known; known are {known_names()}"
            )
        before = seen.setdefault(image, (label, part))
        if before != (label, part):
            raise DataError(
                f"{where}, row {number}: {printable(image)!r} is {printable(label)!r} in {part}, and above "
                f"{printable(before[0])!r} in {before[1]}"
            )
        if len(seen) == distinct:
            repeated += 1
            continue
        distinct = len(seen)
        splits[part].setdefault(label, []).append(image)
    return index_of_list(path, splits, repeated)


def index_of_list(path: Path, splits: dict[str, FilesByClass], repeated: int) -> SourceIndex:
    """The index of a list's splits, after checking their classes."""
    where = printable(path)
    classes = sorted_classes(name for name, files in splits["train"].items() if files)
    if len(classes) < 2:
        raise DataError(f"{where} lists training images of {len(classes)} classes; a classifier needs at least two")
    for split in SPLITS[1:]:
        if splits[split]:
            check_known_classes(splits[split], classes, where, split)
    remarks = (f"{repeated} images are listed more than once; each is used once",) if repeated else ()
    return SourceIndex(
        store=FileStore(path.parent),
        name=path.stem,
        classes=classes,
        train={name: splits["train"][name] for name in classes},
        validation=splits["validation"] or None,
        test=splits["test"] or None,
        remarks=remarks,
    )


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a CSV or TSV file with a header."""
    delimiter = LIST_SUFFIXES[path.suffix.lower()]
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            check_columns(path, columns, reader.fieldnames or ())
            for row in reader:
                image, label, split = (row.get(name) or "" for name in columns)
                yield image, label.strip(), split
    except csv.Error as error:
        raise DataError(f"{printable(path)}: not a list that can be read: {error}") from error


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a Parquet file."""
    try:
        pyarrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "a list in Parquet") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            check_columns(path, columns, names)
            present = [name for name in columns if name in names]
            for batch in file.iter_batches(columns=present):
                for row in batch.to_pylist():
                    image, label, split = (cell_text(path, name, row.get(name)) for name in columns)
                    yield image, label, split
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{printable(path)}: not a list that can be read: {str(error).splitlines()[0]}") from error


def cell_text(path: Path, column: str, value: object) -> str:
    """Convert a cell to text."""
    if isinstance(value, (bytes, dict, list)):
        raise DataError(
            f"{printable(path)}: column {column!r} holds {type(value).__name__}, not paths or labels; a data set that "
            "holds its images is read with datasets.load_dataset('parquet', ...).save_to_disk(FOLDER), then FOLDER"
        )
    return "" if value is None else str(value)


def check_columns(path: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    """Check that the list has the columns for images and labels."""
    missing = [name for name in columns[:2] if name not in names]
    if missing:
        raise DataError(
            f"{printable(path)} has no column {name_list(missing)}; it has {name_list(names) or 'none'}. Name them "
            "with columns=(image, label, split)"
        )
