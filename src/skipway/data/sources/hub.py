"""Hugging Face data sets: a folder that `save_to_disk` wrote, or `hf:NAME`, which is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from skipway.data.sources.columns import (
    COLUMNS,
    Columns,
    check_number,
    column_remarks,
    find_name,
    list_columns,
    plain,
)
from skipway.data.sources.index import (
    FilesByClass,
    SourceIndex,
    check_classes,
    check_known_classes,
    files_of_classes,
    name_list,
    sorted_classes,
)
from skipway.data.sources.readers import TableStore
from skipway.data.sources.splits import SPLITS, Split, split_of
from skipway.errors import DataError, MissingExtraError, first_line, printable

__all__ = ["HUB_PREFIX", "index_dataset", "is_saved_dataset", "load_tables"]

HUB_PREFIX = "hf:"


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def index_dataset(source: Path | str, *, columns: Sequence[str], outside: bool = False, fewest: int = 2) -> SourceIndex:
    """Index the images of a data set.

    Args:
        source: a folder that `save_to_disk` wrote, or "hf:NAME" or "hf:NAME:CONFIGURATION" to download. Code of a data
            set is never run.
        columns: names of the columns for image and label; by default the only column of images and the only column of
            classes where none is called so.
        outside: allow paths in the image column that lead out of the folder.

    Raises:
        DataError: it cannot be read, has no such columns, or fewer than two classes.
        MissingExtraError: the library `datasets` is not installed.
    """
    splits, datasets = load_tables(source)
    fetched, where = str(source).startswith(HUB_PREFIX), printable(str(source))
    chosen = choose_columns(splits, columns, where, datasets)
    image, label = (chosen.names[number] for number in (chosen.image, *chosen.label))
    tables: dict[str, Any] = {}
    by_split: dict[Split, FilesByClass] = {}
    unused, remarks = [], list(chosen.remarks)
    names: tuple[str, ...] | None = None
    for split, table in splits.items():
        known = split_of(split)
        if known is None or known in by_split:
            reason = f"there is another {known} split" if known else "its name is none of train, val, test"
            unused.append(f"{printable(split)!r}: {reason}")
            continue
        labels = table[label] if label in table.features else []
        if known != "train" and all(value is None or value == -1 for value in labels):
            remarks.append(
                f"{printable(split)!r} has no labels: it is left alone, and {known} images are split off the training "
                "split"
            )
            continue
        feature = table.features[label]
        own = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        names = names or own
        by_class: FilesByClass = {}
        for row, value in enumerate(labels):
            if value is None or (own and not 0 <= int(value) < len(own)):
                raise DataError(f"{where}: row {row} of {split} has no label: leave it out, by filter() of datasets")
            by_class.setdefault(own[int(value)] if own else str(value), []).append(f"{split}/{row}")
        by_split[known] = by_class
        if isinstance(table.features[image], datasets.Image):
            table = table.cast_column(image, datasets.Image(decode=False))
        tables[split] = table.select_columns([image])
    if "train" not in by_split and (fewest > 1 or not by_split):
        raise DataError(f"{where} has no split called train; it has {name_list(splits)}: rename one of them")
    files = files_of_classes(by_split, fewest)
    classes = tuple(name for name in names if name in files) if names else sorted_classes(files)
    check_classes(files, where, allow_empty=False, fewest=fewest)
    for other in SPLITS[1:]:
        if other in by_split:
            check_known_classes(by_split[other], classes, where, other)
    root = Path(str(source).replace(":", "/") if fetched else source)
    return SourceIndex(
        store=TableStore(root, image, tables, outside or fetched),
        name=root.name,
        classes=classes,
        train={name: by_split.get("train", {}).get(name, []) for name in classes},
        validation=by_split.get("validation"),
        test=by_split.get("test"),
        unused=tuple(unused),
        remarks=tuple(remarks),
    )


def load_tables(source: Path | str) -> tuple[dict[str, Any], Any]:
    """Load a data set: its tables by the names of their splits, and the library.

    Args:
        source: a folder that `save_to_disk` wrote, or "hf:NAME" or "hf:NAME:CONFIGURATION" to download. Code of a data
            set is never run.

    Raises:
        DataError: it cannot be read.
        MissingExtraError: the library `datasets` is not installed.
    """
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets", "a Hugging Face data set") from error
    try:
        if str(source).startswith(HUB_PREFIX):
            loaded: Any = datasets.load_dataset(*str(source)[len(HUB_PREFIX) :].split(":", 1))
        else:
            loaded = datasets.load_from_disk(str(source))
    except Exception as error:  # of many libraries: network, file system, Arrow, JSON
        raise DataError(
            f"{printable(str(source))} cannot be read as a data set: {first_line(error, 200)}; see "
            "its name and the network, or give a folder that save_to_disk wrote"
        ) from error
    splits = {str(split): table for split, table in loaded.items()} if isinstance(loaded, dict) else {"train": loaded}
    return splits, datasets


def choose_columns(splits: dict[str, Any], wanted: Sequence[str], where: str, datasets: Any) -> Columns:
    """Choose the columns of images and of labels; the rows of each split are apart.

    Raises:
        DataError: there is no such column, or by default none of that name and not exactly one of its kind.
    """
    check_number(wanted)
    features = next(iter(splits.values())).features
    names, numbers, remarks = tuple(features), [], []
    for name, kind in zip(wanted[:2], (datasets.Image, datasets.ClassLabel), strict=True):
        fitting = [number for number, feature in enumerate(features.values()) if isinstance(feature, kind)]
        by_kind = tuple(wanted) == COLUMNS and name not in names and len(fitting) == 1
        number = fitting[0] if by_kind else find_name(names, name)
        if number is None:
            raise DataError(f"{where} has no column {name!r}; {list_columns(names)}")
        numbers.append(number)
    if tuple(wanted[2:]) not in ((), COLUMNS[2:]) and plain(wanted[2]):
        remarks.append(f"the column {wanted[2]!r} is not used: the splits are those of the data set")
    found = Columns(numbers[0], (numbers[1],), (), names, headed=True)
    return replace(found, remarks=(*column_remarks(found, "data set"), *remarks))
