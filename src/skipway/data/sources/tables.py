"""Tables in text files, as spreadsheets, scripts and data sets write them: encoding and separator by content."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from skipway.errors import DataError, MissingExtraError, counted, first_line, printable

__all__ = ["Row", "Table", "read_parquet_table", "read_text_table"]

# the way out of a file that is no list
SAVE_AS = "save it as UTF-8 CSV with the columns image and label"
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}
# rows that the separator is chosen by
SAMPLED = 200
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

Row = tuple[int, list[str]]


@dataclass(frozen=True)
class Table:
    """A table as text.

    Args:
        path: the file.
        rows: number of the line and cells of each row, a header included.
        remarks: sentences about its encoding and separator, where they are not UTF-8 and commas or tabs.
        names: of the columns, where the format has them apart from the rows.
    """

    path: Path
    rows: list[Row]
    remarks: tuple[str, ...] = ()
    names: tuple[str, ...] | None = None

    def body(self, *, headed: bool) -> list[Row]:
        """The rows without the one that names the columns, if any does: `headed`."""
        return self.rows[1:] if headed and self.names is None else self.rows


def read_text_table(path: Path) -> Table:
    """Read a text file with one row per line: CSV, TSV, or any other separator; `#` begins a comment.

    Raises:
        DataError: it is no text, a quotation mark is not closed, or no separator makes columns.
    """
    text, encoding = decode_text(path.read_bytes(), path)
    lines = re.split(r"(?<=\n)|(?<=\r)(?!\n)", text)
    remarks = [] if encoding == "UTF-8" else [f"{printable(path.name)} is read as {encoding}"]
    stated = re.fullmatch(r'"?sep=(.)"?\s*', lines[0])
    if stated:  # Excel's way to name the separator
        lines[0] = "\n"
    separator = stated[1] if stated else choose_separator(lines, path)
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    if separator != usual:
        remarks.append(f"{printable(path.name)} has its columns between {SEPARATORS.get(separator, repr(separator))}")
    try:
        rows = list(parse_rows(lines, separator))
    except csv.Error as error:
        raise DataError(
            f"{printable(path)}: not a list that can be read: {printable(str(error))}; {SAVE_AS}"
        ) from error
    return Table(path, rows, (*remarks, *comment_remarks(rows, lines, separator)))


def decode_text(content: bytes, path: Path) -> tuple[str, str]:
    """Decode a text file; returns it with the name of its encoding. Bytes of names that are no text are kept.

    Raises:
        DataError: it is binary.
    """
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if content.startswith(mark)), "")
    head = content[:4096]
    if not encoding and head.count(0) > len(head) / 4:
        encoding = "utf-16-le" if head[1::2].count(0) > head[::2].count(0) else "utf-16-be"
    try:
        if encoding:
            text = content.decode(encoding)
            if encoding.startswith("utf-16-") and any(letter < "\t" for letter in text[:SAMPLED]):
                raise DataError(f"{printable(path)}: not a list that can be read: it is no text; {SAVE_AS}")
            return text.removeprefix("\ufeff"), re.sub(r"-(?:SIG|LE|BE)$", "", encoding.upper())
        return content.decode("utf-8"), "UTF-8"
    except UnicodeDecodeError as error:
        if encoding:
            raise DataError(
                f"{printable(path)}: not a list that can be read: damaged {encoding.upper()}; {SAVE_AS}"
            ) from error
    if sum(byte < 9 for byte in head) > len(head) / 50:
        raise DataError(f"{printable(path)}: not a list that can be read: it is no text; {SAVE_AS}")
    raw = content.decode("utf-8", "surrogateescape")
    try:
        windows = content.decode("cp1252")
    except UnicodeDecodeError:
        return raw, "UTF-8"
    return (raw, "UTF-8") if names_files(raw, path.parent) else (windows, "Windows-1252, since it is no UTF-8")


def names_files(text: str, folder: Path) -> bool:
    """Whether a name in the text whose bytes are no UTF-8 is the name of a file."""
    odd = (cell for cell in re.split(r'[,;\t|"\r\n]', text) if any(0xDC80 <= ord(letter) <= 0xDCFF for letter in cell))
    return any((folder / cell).is_file() for cell in islice(odd, SAMPLED))


def parse_rows(lines: list[str], separator: str) -> Iterator[Row]:
    """The rows of text lines, but for blank lines and comments."""
    named = uncommented(lines, separator)
    without = ("\n" if not line.strip() or line.lstrip().startswith("#") else line for line in named)
    return split_rows(without, separator)


def split_rows(lines: Iterable[str], separator: str) -> Iterator[Row]:
    """The rows of lines, comments included, but for blank lines.

    Raises:
        csv.Error: a quotation mark is not closed.
    """
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=separator in " |;,")
    for row in reader:
        if row and separator == " ":
            while row and not row[-1]:
                row.pop()
        if row:
            yield reader.line_num, row


def first_cells(lines: Iterable[str], separator: str) -> list[str]:
    """The cells of the first row of lines; none where there is no row.

    >>> first_cells(['#7.jpg,"cat, black"'], ","), first_cells(['#7.jpg,"cat'], ",")
    (['#7.jpg', 'cat, black'], [])
    """
    try:
        return next(split_rows(lines, separator), (0, []))[1]
    except csv.Error:
        return []


def comment_remarks(rows: list[Row], lines: list[str], separator: str) -> Iterator[str]:
    """A remark where comments have as many cells as the rows, since the name of a file may begin with `#`, too. Where
    rows name files by their endings, a comment without one is prose.
    """
    width, named = len(rows[0][1]) if rows else 0, any(has_ending(row) for _, row in rows[:SAMPLED])
    alike = []
    for line in uncommented(lines, separator):
        if re.match(r"\s*#\S", line):
            cells = first_cells([line], separator)
            if len(cells) == width and (has_ending(cells) or not named):
                alike.append(line.strip())
    if alike:
        yield (
            f"{counted(len(alike), 'line')} with as many cells as the rows left out as comments, since they begin with "
            f"#: {printable(alike[0][:60])!r}; quotation marks around the first cell make such a line a row"
        )


def has_ending(row: list[str]) -> bool:
    """Whether a cell of a row has the ending of a file's name.

    >>> has_ending(["#7.jpg", "cat"]), has_ending(["#made by hand", "2020."])
    (True, False)
    """
    return any(re.search(r"\.\w+\s*$", cell) for cell in row)


def uncommented(lines: list[str], separator: str) -> Iterator[str]:
    """The lines, where a comment directly above the rows that has as many columns as they is their header."""
    content = [
        number for number, line in enumerate(lines[:SAMPLED]) if line.strip() and not line.lstrip().startswith("#")
    ]
    header = content[0] - 1 if content else -1
    for number, line in enumerate(lines):
        if number == header and line.lstrip().startswith("#"):
            name = line.lstrip().removeprefix("#").lstrip()
            names, below = (first_cells(each, separator) for each in ([name], lines[content[0] :]))
            yield name if len(names) == len(below) > 1 and all(map(looks_like_name, names)) else line
        else:
            yield line


def looks_like_name(cell: str) -> bool:
    """Whether a cell is a word, as names of columns are."""
    return re.fullmatch(r"[A-Za-z]\w*", cell.strip()) is not None


def choose_separator(lines: list[str], path: Path) -> str:
    """The separator by which most rows have no more columns than the first one, and at least two.

    Raises:
        DataError: there is none.
    """
    shares: dict[str, float] = {}
    fault = ""
    for separator in sorted(SEPARATORS, key=lambda each: each != ("\t" if path.suffix.lower() == ".tsv" else ",")):
        try:
            rows = [row for _, row in islice(parse_rows(lines, separator), SAMPLED)]
        except csv.Error as error:
            fault = fault or str(error)
            continue
        if not rows:
            raise DataError(f"{printable(path)} is empty: a list has an image and its label in each row")
        if len(rows[0]) >= 2:
            shares[separator] = sum(len(row) >= 2 and not any(row[len(rows[0]) :]) for row in rows) / len(rows)
    if fault and not shares:
        raise DataError(f"{printable(path)}: not a list that can be read: {printable(fault)}; {SAVE_AS}")
    if not shares:
        start = printable(next(line for line in lines if line.strip()).strip()[:60])
        raise DataError(
            f"{printable(path)} has one column, {start!r}; a list has an image and a label in each row, between "
            f"{', '.join(SEPARATORS.values())}"
        )
    most = max(shares.values())
    return next(separator for separator, share in shares.items() if share > most - 0.1)


def read_parquet_table(path: Path) -> Table:
    """Read a Parquet file; columns of bytes, lists and structures are left out.

    Raises:
        DataError: it cannot be read.
        MissingExtraError: it needs pyarrow.
    """
    try:
        pyarrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "a list in Parquet") from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            kinds = pyarrow.types
            names = [each.name for each in schema if not (kinds.is_nested(each.type) or kinds.is_binary(each.type))]
            if len(names) < 2:
                held = ", ".join(sorted({str(each.type) for each in schema}))
                raise DataError(
                    f"{printable(path)}: its columns hold {held}, not paths and labels; a data set that holds its "
                    "images is read with "
                    "datasets.load_dataset('parquet', ...).save_to_disk(FOLDER), then FOLDER"
                )
            cells = (row for batch in file.iter_batches(columns=names) for row in batch.to_pylist())
            rows = [
                (number, ["" if row[name] is None else str(row[name]) for name in names])
                for number, row in enumerate(cells, 1)
            ]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{printable(path)}: not a list that can be read: {first_line(error)}; {SAVE_AS}") from error
    return Table(path, rows, names=tuple(names))
