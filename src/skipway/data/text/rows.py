"""Documents in the rows of a table: JSON lines, CSV and TSV, Parquet; and which column holds the text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, islice
from typing import Any

from skipway.data.sources.index import name_list
from skipway.data.text.charset import Notes, NotText, decode_text_file
from skipway.errors import DataError, MissingExtraError, first_line, printable, spell

__all__ = ["ROW_READERS", "RowReader", "TextColumn"]

# usual names of the column, by preference
TEXT_COLUMNS = ("text", "content", "document", "body", "article", "story", "passage", "sentence", "code")
# rows that the column is chosen by
SAMPLED = 100
# the column of the longest texts is taken for the text where the next one is this many times shorter
LONGER = 2.0
# letters of a cell; more than a C long holds is refused by the csv module
LONGEST_CELL = 2**31 - 1


@dataclass(frozen=True)
class TextColumn:
    """The column that holds the text: the one that is named, or the one that names and cells speak for.

    Args:
        name: of the column; None: chosen by usual names, else by the length of the texts.
        encoding: of tables that are text; None: by content.
    """

    name: str | None = None
    encoding: str | None = None

    def choose(self, rows: Sequence[Mapping[str, Any]], where: str, notes: Notes) -> str:
        """The name of the column in a sample of the rows; a choice among several is noted.

        Raises:
            DataError: there is no column of the name that is asked for.
            NotText: no column holds text, or several could.

        >>> TextColumn().choose([{"id": "7", "body": "once upon a time"}], "a.jsonl", Notes())
        'body'
        """
        names = list(dict.fromkeys(name for row in rows for name in row))
        if self.name is not None:
            if self.name in names:
                return self.name
            has = (
                f"it has {name_list(names, 12)}; {spell('column', names[0])} names another" if names else "it has none"
            )
            raise DataError(f"{printable(where)} has no column {self.name!r}; {has}")
        lengths = {name: [len(row[name]) for row in rows if isinstance(row.get(name), str)] for name in names}
        means = {name: sum(found) / len(found) for name, found in lengths.items() if found}
        if not means:
            raise NotText("a table without a column of text")
        usual = [name for wanted in TEXT_COLUMNS for name in means if name.lower() == wanted]
        ranked = sorted(means, key=lambda name: -means[name])
        if not usual and len(ranked) > 1 and means[ranked[0]] < LONGER * means[ranked[1]]:
            raise NotText(
                f"a table in which several columns may hold the text: {name_list(ranked, 12)}; name one, with "
                f"{spell('column', ranked[0])} for example"
            )
        chosen = (usual or ranked)[0]
        others = name_list([name for name in names if name != chosen])
        if others or not usual:
            notes.add(f"the text is the column {chosen!r}" + (f"; not used: {others}" if others else ""), where)
        return chosen

    def texts(self, rows: Iterator[Mapping[str, Any]], where: str, notes: Notes) -> Iterator[str]:
        """The texts in rows; "" for one that has none."""
        sample = list(islice(rows, SAMPLED))
        if not sample:
            return
        name = self.choose(sample, where, notes)
        for row in chain(sample, rows):
            value = row.get(name)
            yield with_whole_letters(value, where, notes) if isinstance(value, str) else ""


def with_whole_letters(text: str, where: str, notes: Notes) -> str:
    """A text in which halves of surrogate pairs, which JSON can hold, are U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        notes.add("halves of surrogate pairs are read as U+FFFD", where)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


RowReader = Callable[[bytes, str, TextColumn, Notes], Iterator[str]]


def json_line_texts(content: bytes, where: str, column: TextColumn, notes: Notes) -> Iterator[str]:
    """The texts in JSON lines: objects with a column, or strings.

    Raises:
        DataError: a line is no JSON.
    """

    def rows() -> Iterator[Mapping[str, Any]]:
        for number, line in enumerate(decode_text_file(content, where, notes, column.encoding).split("\n"), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{printable(where)}: line {number} is no JSON: {first_line(error, 100)}; correct or remove it"
                ) from error
            yield as_row(value)

    yield from column.texts(rows(), where, notes)


def json_texts(content: bytes, where: str, column: TextColumn, notes: Notes) -> Iterator[str]:
    """The texts in a JSON list of objects or strings.

    Raises:
        NotText: it is none.
    """
    try:
        values = json.loads(decode_text_file(content, where, notes, column.encoding))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list):
        raise NotText("JSON, and no list of documents")
    yield from column.texts(map(as_row, values), where, notes)


def as_row(value: Any) -> Mapping[str, Any]:
    """A value of JSON as a row: a string alone is its text."""
    return value if isinstance(value, dict) else {"text": value}


def delimited_texts(content: bytes, where: str, column: TextColumn, notes: Notes) -> Iterator[str]:
    """The texts in a table of cells between commas, semicolons, tabs or bars, whose first row names the columns.

    Raises:
        DataError: it is no such table.
    """
    text = decode_text_file(content, where, notes, column.encoding)
    head = text.partition("\n")[0]
    delimiter = max("\t,;|" if where.lower().endswith(".tsv") else ",;\t|", key=head.count)
    with long_cells():
        try:
            yield from column.texts(delimited_rows(text, delimiter, where), where, notes)
        except csv.Error as error:
            raise DataError(
                f"{printable(where)} is no table that can be read: {first_line(error, 100)}; save it as UTF-8 CSV"
            ) from error


def delimited_rows(text: str, delimiter: str, where: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a table.

    Raises:
        DataError: a row has more cells than there are columns.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    for row in reader:
        if None in row:
            names = name_list(reader.fieldnames or ())
            raise DataError(
                f"{printable(where)}: the row that ends in line {reader.line_num} has more cells than the columns, "
                f"{names}: a text that holds {delimiter!r} stands in quotation marks"
            )
        yield row


@contextmanager
def long_cells() -> Iterator[None]:
    """Context in which cells may be as long as documents are; the module's own limit is 128 KB."""
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def parquet_texts(content: bytes, where: str, column: TextColumn, notes: Notes) -> Iterator[str]:
    """The texts in a Parquet file.

    Raises:
        DataError: it cannot be read.
        MissingExtraError: it needs pyarrow.
    """
    try:
        pyarrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "a table in Parquet") from error
    try:
        with parquet.ParquetFile(pyarrow.BufferReader(content)) as file:
            kinds, schema = pyarrow.types, file.schema_arrow
            names = [each.name for each in schema if kinds.is_string(each.type) or kinds.is_large_string(each.type)]
            if column.name is not None:
                names = [name for name in schema.names if name == column.name] or names
            rows = (row for batch in file.iter_batches(columns=names) for row in batch.to_pylist())
            yield from column.texts(rows, where, notes)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{printable(where)} cannot be read as Parquet: {first_line(error, 100)}; write it again"
        ) from error


ROW_READERS: dict[str, RowReader] = {
    ".jsonl": json_line_texts,
    ".ndjson": json_line_texts,
    ".json": json_texts,
    ".csv": delimited_texts,
    ".tsv": delimited_texts,
    ".parquet": parquet_texts,
}
