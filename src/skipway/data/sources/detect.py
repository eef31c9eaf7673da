"""`index_source`: detect the kind of a source and index it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from skipway.data.sources.columns import COLUMNS
from skipway.data.sources.folders import Subfolders, index_folders
from skipway.data.sources.hub import HUB_PREFIX, index_dataset, is_saved_dataset
from skipway.data.sources.index import SourceIndex, idle_remarks, name_list
from skipway.data.sources.lists import LIST_SUFFIXES, index_list
from skipway.data.sources.scan import scan_folder
from skipway.data.sources.shards import index_shards
from skipway.data.sources.splits import split_of
from skipway.errors import DataError, SkipwayError, printable, similar_names

__all__ = ["COLUMNS", "index_source"]

# why a choice has no effect
NO_LIST, NO_FOLDERS = "is no list", "has no class folders"


def index_source(
    source: Path | str,
    *,
    allow_empty: bool = False,
    outside: bool = False,
    columns: Sequence[str] = COLUMNS,
    subfolders: Subfolders = "merge",
    fewest: int = 2,
) -> SourceIndex:
    """Index the images of a source.

    Args:
        source: a folder of class folders, of tar shards or of `save_to_disk`; a list in CSV, TSV or Parquet; a tar file
            or a brace pattern of them; or "hf:NAME".
        allow_empty: keep a class without an image.
        outside: follow links, and paths in lists, that lead out of the source.
        columns: names of the columns for image, label and split.
        subfolders: see `index_folders`.
        fewest: classes with images that there must be; 1 suffices to evaluate, where `allow_empty` and `subfolders` are
            the program's choice and not remarked upon.

    Raises:
        DataError: there is no such source, or it cannot be used for training.
        MissingExtraError: it needs a library that is not installed.
    """
    idle = {"allow_empty": allow_empty, "subfolders": subfolders} if fewest > 1 else {}
    named = None if tuple(columns) == COLUMNS else tuple(columns)
    if str(source).startswith(HUB_PREFIX):
        found = index_dataset(str(source), columns=columns, outside=outside, fewest=fewest)
        return remark_idle(found, NO_FOLDERS, **idle)
    path = Path(source)
    suffix = path.suffix.lower()
    try:
        if path.is_dir() and is_saved_dataset(path):
            found = index_dataset(path, columns=columns, outside=outside, fewest=fewest)
            return remark_idle(found, NO_FOLDERS, **idle)
        is_tar = suffix == ".tar" and (path.is_file() or "{" in path.name or "{" in str(path.parent))
        if holds_shards(path) if path.is_dir() else is_tar:
            found = index_shards(path, allow_empty=allow_empty, subfolders=subfolders, fewest=fewest)
            found = remark_idle(found, NO_LIST, columns=named)
            return remark_idle(found, "is read from tar files, in which links are refused", outside=outside)
        if path.is_dir():
            try:
                found = index_folders(
                    path, allow_empty=allow_empty, outside=outside, subfolders=subfolders, fewest=fewest
                )
                return remark_idle(found, NO_LIST, columns=named)
            except DataError as error:
                lists = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in LIST_SUFFIXES)
                hint = f"; if {name_list(lists, 2)} lists the images, give the list instead of the folder"
                raise DataError(f"{error}{hint}") if lists else error from None
        if suffix in (*LIST_SUFFIXES, ".txt", ".lst") and path.is_file():
            found = index_list(path, columns=columns, outside=outside, fewest=fewest)
            return remark_idle(found, NO_FOLDERS, **idle)
    except (OSError, ValueError) as error:
        if isinstance(error, SkipwayError):
            raise
        raise DataError(f"{printable(path)} cannot be read: {error}; see its rights, and the disk") from error
    missing = f"does not exist{similar_names(path)}; without a folder, training uses the embedded digits"
    raise DataError(f"data folder {printable(path)} {describe_file(path) if os.path.lexists(path) else missing}")


def remark_idle(found: SourceIndex, reason: str, **choices: object) -> SourceIndex:
    """The images of a source, with a remark for each choice that was made and has no effect on it."""
    return replace(found, remarks=(*found.remarks, *idle_remarks(found.name, reason, **choices)))


def describe_file(path: Path) -> str:
    """What a file is that is no source, and what to do with it."""
    suffix = path.suffix.lower()
    if suffix in (".xlsx", ".xls", ".ods", ".numbers"):
        return "is a spreadsheet; save the sheet as CSV and give that"
    if suffix in (".json", ".jsonl", ".ndjson", ".xml", ".yaml", ".yml"):
        return "is no table; write a CSV file with the columns image and label and give that"
    return "is a file; unpack it and give the folder"


def holds_shards(folder: Path) -> bool:
    """Whether a folder, or a training folder in it, holds tar files, and no folder in it holds images beside them, as
    after a download that was unpacked.
    """
    with os.scandir(folder) as entries:
        inside = [Path(entry.path) for entry in entries]
    training = [path for path in inside if split_of(path.name) == "train" and path.is_dir()]
    files = [*inside, *(path for place in training for path in place.iterdir())]
    if not any(path.suffix == ".tar" and path.is_file() for path in files):
        return False
    top, _ = scan_folder(folder)
    return not any(inner.files for inner in top.walk() if inner is not top)
