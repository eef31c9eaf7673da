"""Texts in a column of a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from skipway.data.sources.hub import load_tables
from skipway.data.sources.splits import Split, split_of
from skipway.data.text.charset import Notes, NotText
from skipway.data.text.documents import Document, TextSource
from skipway.data.text.rows import TextColumn
from skipway.errors import DataError, first_line, printable, spell

__all__ = ["TableSource", "table_source"]

# rows that are read at once
ROWS = 1000


@final
@dataclass(frozen=True, kw_only=True)
class TableSource(TextSource):
    """A column of the tables of a data set, by split; the name of a document is `split/row`."""

    tables: dict[str, Any] = field(repr=False)
    column: TextColumn

    def documents(self, notes: Notes) -> Iterator[Document]:
        for name, table in self.tables.items():
            split = split_of(name) if len(self.tables) > 1 else None
            try:
                for row, text in enumerate(self.column.texts(self.rows(name, table), f"{self.name} {name}", notes)):
                    if text.strip():
                        yield Document(f"{name}/{row}", text, split)
                    else:
                        notes.add("left out, since it is empty", f"{name}/{row}")
            except NotText as error:
                raise DataError(f"{printable(self.name)} is {error}; name a column of text") from error

    def rows(self, name: str, table: Any) -> Iterator[dict[str, Any]]:
        """The rows of a table, from columns of text where their types are known."""
        try:
            for first in range(0, len(table), ROWS):
                columns = table[first : first + ROWS]
                yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        except Exception as error:  # whatever the library's readers of a damaged table raise
            raise DataError(
                f"{printable(self.name)}: {name} cannot be read: {first_line(error, 100)}; fetch it again"
            ) from error


def table_source(source: Path | str, column: str | None) -> TableSource:
    """The texts of a data set; a split with another name than train, validation and test is left alone.

    Args:
        source: see `load_tables`.
        column: that holds the text; None: see `TextColumn`.

    Raises:
        DataError: it cannot be read, or has no training split.
        MissingExtraError: the library `datasets` is not installed.
    """
    splits, _ = load_tables(source)
    remarks: list[str] = []
    tables: dict[str, Any] = {}
    taken: set[Split] = set()
    for name, table in splits.items():
        split = split_of(name)
        if split is None or split in taken:
            reason = f"there is another {split} split" if split else "its name is none of train, val, test"
            remarks.append(f"the split {printable(name)!r} is left alone: {reason}")
            continue
        taken.add(split)
        tables[name] = table if column is None else select(table, column, str(source))
    if "train" not in taken:
        raise DataError(f"{printable(str(source))} has no split called train; it has {', '.join(splits)}: rename one")
    return TableSource(name=Path(str(source)).name, remarks=tuple(remarks), tables=tables, column=TextColumn(column))


def select(table: Any, column: str, where: str) -> Any:
    """A table with one column.

    Raises:
        DataError: it has no such column.
    """
    if column not in table.column_names:
        has = ", ".join(table.column_names)
        another = f"; {spell('column', table.column_names[0])} names another" if has else ""
        raise DataError(f"{printable(where)} has no column {column!r}; it has {has or 'none'}{another}")
    return table.select_columns([column])
