"""Lists of images: a table, as text or in Parquet, with columns of images, labels and, optionally, splits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from skipway.data.sources.columns import COLUMNS, Columns, choose_columns
from skipway.data.sources.image_names import ImageNames
from skipway.data.sources.index import (
    FilesByClass,
    SourceIndex,
    check_known_classes,
    class_name,
    files_of_classes,
    name_list,
    sorted_classes,
)
from skipway.data.sources.readers import FileStore
from skipway.data.sources.scan import LeftOut
from skipway.data.sources.splits import SPLITS, Split, known_names
from skipway.data.sources.tables import Table, read_parquet_table, read_text_table
from skipway.errors import DataError, counted, printable, spell

__all__ = ["LIST_SUFFIXES", "index_list"]

LIST_SUFFIXES = (".csv", ".tsv", ".tab", ".parquet")
# different numbers in a column from which they are no classes, where they are not whole
MOST_NUMBERS = 20


@dataclass
class ListRows:
    """The rows of a list, sorted into splits and classes.

    Args:
        table: the list.
        columns: what its columns hold.
        images: finds the files.
        outside: allow images outside the list's folder.
        fewest: training classes that the list must have; 1 for images that are not trained on, in any split.
    """

    table: Table
    columns: Columns
    images: ImageNames
    outside: bool
    splits: dict[Split, FilesByClass] = field(default_factory=lambda: {split: {} for split in SPLITS})
    left_out: LeftOut = field(default_factory=lambda: LeftOut(thing="row"))
    seen: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The list, for messages."""
        return printable(self.table.path)

    def sort(self) -> list[str]:
        """Sort all rows; returns remarks.

        Raises:
            DataError: an image outside the folder or listed with two labels, or an unknown split.
        """
        width, body = len(self.columns.names), []
        for number, cells in self.table.body(headed=self.columns.headed):
            row = [*cells, *[""] * (width - len(cells))]
            if not any(cell.strip() for cell in row):
                self.left_out.add("empty", f"row {number}")
            elif len(row) > width and any(cell.strip() for cell in row[width:]):
                self.left_out.add("with more cells than there are columns", f"row {number}")
            else:
                body.append((number, row))
        found = self.images.resolve([row[self.columns.image] for _, row in body])
        labels = Labels([self.columns.label_of(row) for _, row in body], self)
        used = []
        for (number, row), label in zip(body, labels.names, strict=True):
            cell = row[self.columns.image]
            if self.take(number, row, label, found.get(cell, cell.strip())) and cell in found:
                used.append((cell, found[cell]))
        return [*labels.remarks, *self.images.remarks(used)]

    def take(self, number: int, row: list[str], label: str, file: str) -> bool:
        """Enter a row, or leave it out with a reason; whether it was entered."""
        name = printable(row[self.columns.image] or f"row {number}")
        if not file:
            self.left_out.add("without an image", f"row {number}")
            return False
        if not self.outside and self.images.leads_out(file):
            raise DataError(
                f"{self.where}, row {number}: {name!r} leads out of {printable(self.table.path.parent)}; move the "
                f"images below the list, or allow it with {spell('outside', True)}"
            )
        if not label:
            self.left_out.add("without a label", name)
            return False
        split = self.columns.split_of(row)
        if split not in SPLITS:
            held = name_list(self.columns.names[number] for number in self.columns.split)
            if split is None:
                self.left_out.add(f"with an empty {held}", name)
                return False
            fault = f"split {printable(split)!r} is not known; known are {known_names()}"
            if len(self.columns.split) > 1:
                fault = f"{name!r} is {printable(split)!r} by {held}: the rule is 0 or 1, at most one of them 1"
            image, label = (self.columns.names[number] for number in (self.columns.image, self.columns.label[0]))
            unsplit = f"; {spell('columns', (image, label, '-'))} does not split by {held}"
            raise DataError(f"{self.where}, row {number}: {fault}{unsplit if len(self.columns.label) == 1 else ''}")
        before = self.seen.get(file)
        if before is not None and before != (label, split):
            raise DataError(
                f"{self.where}, row {number}: {name!r} is {printable(label)!r} in {split}, and above "
                f"{printable(before[0])!r} in {before[1]}; keep one of the rows"
            )
        if before is not None:
            self.left_out.add("listed more than once", name)
            return False
        self.seen[file] = (label, split)
        self.splits[split].setdefault(label, []).append(file)
        return True


class Labels:
    """The labels of a list as names of classes.

    Args:
        cells: as they stand.
        rows: the list they are from.

    Raises:
        DataError: they are measurements, or every image has its own.
    """

    def __init__(self, cells: Sequence[str], rows: ListRows) -> None:
        self.names = [class_name(cell) for cell in cells]
        self.remarks: list[str] = []
        counts = Counter(name for name in self.names if name)
        column = name_list([rows.columns.names[number] for number in rows.columns.label], 3)
        numbers = [re.fullmatch(r"[+-]?\d+(?:\.(\d+))?", name) for name in counts]
        if counts and all(numbers):
            fractions = [int(number[1] or 0) for number in numbers if number is not None]
            if any(fractions) and len(counts) > MOST_NUMBERS:
                raise DataError(
                    f"{rows.where}: the column {column} holds {len(counts):,} different numbers, which are no "
                    f"classes; {spell('columns', tuple(rows.columns.names[:2]))} for example names another"
                )
            if not any(fractions) and any("." in name for name in counts):
                self.names = [name.partition(".")[0] for name in self.names]
                self.remarks.append(
                    f"labels are numbers with a point: {next(iter(counts))!r} is class {self.names[0]!r}"
                )
        if len(counts) > 2 and len(counts) == counts.total():
            raise DataError(
                f"{rows.where}: each of {counts.total():,} images has a label of its own in the column {column}; "
                f"{spell('columns', tuple(rows.columns.names[:2]))} for example names others"
            )


def index_list(path: Path, *, columns: Sequence[str] = COLUMNS, outside: bool = False, fewest: int = 2) -> SourceIndex:
    """Index the images of a list.

    Args:
        path: the list; its images are relative to its folder.
        columns: names of the columns for image, label and split, of which the last is optional. By default the content
            decides, see `choose_columns`.
        outside: allow images outside the list's folder.
        fewest: training classes that the list must have; 1 for images that are not trained on, in any split.

    Raises:
        DataError: it is no table, a column is missing, an image outside the folder or listed with two labels, or a
            split has an unknown name.
        MissingExtraError: Parquet needs pyarrow.
    """
    table = read_parquet_table(path) if path.suffix.lower() == ".parquet" else read_text_table(path)
    images = ImageNames(path)
    chosen = choose_columns(table, columns, images)
    rows = ListRows(table, chosen, images, outside)
    remarks = [*table.remarks, *chosen.remarks, *rows.sort()]
    where, splits = printable(path), rows.splits
    classes = sorted_classes(files_of_classes(splits, fewest))
    if len(classes) < fewest:
        rest = "".join(f"; {sentence}" for sentence in rows.left_out.sentences())
        raise DataError(
            f"{where} lists training images of {counted(len(classes), 'class', 'classes')}; a classifier needs at "
            f"least two: add rows of another{rest}"
        )
    for split in SPLITS[1:]:
        if splits[split]:
            check_known_classes(splits[split], classes, where, split)
    return SourceIndex(
        store=FileStore(path.parent),
        name=path.stem,
        classes=classes,
        train={name: splits["train"].get(name, []) for name in classes},
        validation=splits["validation"] or None,
        test=splits["test"] or None,
        left_out=rows.left_out,
        remarks=tuple(remarks),
    )
