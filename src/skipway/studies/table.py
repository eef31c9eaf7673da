"""The table of a study: a CSV file with one line per cell, intact after an interruption at any moment."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from skipway.errors import CheckpointError
from skipway.studies.cell import Row, Value

__all__ = ["StudyTable", "merge_rows", "parts_of"]

LEADING_COLUMNS = ("study", "key")
TRAILING_COLUMNS = (
    *("fingerprint", "error", "seconds", "budget", "date", "device", "machine", "skipway", "torch"),
    "python",
)


class StudyTable:
    """Rows in a CSV file. Text that could be read as a number is quoted as in JSON, so that values are read back
    exactly; an empty field is None.

    Args:
        path: of the file, which need not exist.
        settings: columns that come first, after study and key.

    >>> [decode_value(encode_value(value)) for value in (1e-05, "1e-05", True, "plain")]
    [1e-05, '1e-05', True, 'plain']
    """

    def __init__(self, path: Path, settings: Sequence[str] = ()) -> None:
        self.path, self.settings = path, tuple(settings)

    def rows(self) -> list[Row]:
        """Return the rows of all complete lines; a truncated last line is left out.

        Raises:
            CheckpointError: the file is not a table of a study.
        """
        try:
            content = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        complete = content[: content.rfind("\n") + 1]
        header, *lines = list(csv.reader(io.StringIO(complete, newline=""))) or [[]]
        if header and "key" not in header:
            raise CheckpointError(f"{self.path} is not a table of a study: its first line has no column 'key'")
        return [
            {name: decode_value(text) for name, text in zip(header, line, strict=True)}
            for line in lines
            if len(line) == len(header)
        ]

    def append(self, row: Row) -> None:
        """Append a row and flush it to disk."""
        header = self.header()
        names = self.order([*header, *row])
        if [*header] != names or not self.complete():
            self.rewrite([*self.rows(), row])
            return
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(csv_line(encode_value(row.get(name)) for name in names))
            file.flush()
            os.fsync(file.fileno())

    def rewrite(self, rows: Sequence[Row]) -> None:
        """Replace the file by these rows atomically."""
        names = self.order([name for row in rows for name in row])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with aside.open("w", encoding="utf-8", newline="") as file:
            file.write(csv_line(names))
            file.writelines(csv_line(encode_value(row.get(name)) for name in names) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.path)

    def header(self) -> list[str]:
        """Return the column names; none if the file does not exist."""
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            return next(csv.reader(file), [])

    def complete(self) -> bool:
        """Return whether the file ends with a complete line."""
        with self.path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            if not file.tell():
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def order(self, names: Iterable[str]) -> list[str]:
        """Order the column names, each once: study and key, settings, results, circumstances."""
        found = dict.fromkeys(names)
        first = [name for name in (*LEADING_COLUMNS, *self.settings) if name in found]
        last = [name for name in TRAILING_COLUMNS if name in found]
        return [*first, *(name for name in found if name not in first and name not in last), *last]


def merge_rows(tables: Iterable[Sequence[Row]]) -> list[Row]:
    """Merge the rows of several tables, one per key: the last without an error, else the last."""
    found: dict[Value, Row] = {}
    for row in (row for rows in tables for row in rows):
        known = found.get(row["key"])
        if known is None or known.get("error") or not row.get("error"):
            found[row["key"]] = row
    return list(found.values())


def parts_of(folder: Path, study: str) -> list[Path]:
    """Return the files with a study's rows, the table and the shares of a job array, by their last change."""
    found = [*folder.glob(f"{study}.csv"), *folder.glob(f"{study}.share-*.csv")]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def encode_value(value: Value) -> str:
    """Encode a value as text that `decode_value` reads back."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return json.dumps(value)
    # whitespace that a line of the table would lose is part of the cell's key
    plain = value and value == " ".join(value.split()) and not value.startswith('"')
    return value if plain and isinstance(decode_value(value), str) else json.dumps(value)


def decode_value(text: str) -> Value:
    """Decode JSON numbers, true, false and quoted text; other text is returned as it is."""
    if not text:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str | int | float | bool) else text


def csv_line(cells: Iterable[str]) -> str:
    """Format a line of CSV."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(list(cells))
    return buffer.getvalue()
