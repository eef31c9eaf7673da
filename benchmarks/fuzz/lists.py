"""Random lists of images: dialects, encodings, columns, cells and files of any kind.

The oracles: nothing but `SkipwayError` is raised; every row that is there is read or left out with a reason, so that
the counts add up to the rows; every image that is read has the label of its row; what is left out is said in the
remarks with the same counts; and messages hold no codes for the terminal.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from benchmarks.fuzz.folders import encoded
from skipway.data import load
from skipway.data.sources.detect import index_source
from skipway.errors import SkipwayError, printable

__all__ = ["CASES", "Case", "outcome"]

SEPARATORS = (",", ",", ";", "\t", "|", " ")
ENCODINGS = ("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1")
SUFFIXES = (".csv", ".csv", ".tsv", ".txt", ".lst")
HEADERS = (
    ("image", "label", "split"),
    ("Image", "Label", "Split"),
    ("id", "breed", "fold"),
    ("file_name", "class", "subset"),
    ("path", "target", "is_valid"),
    ("x", "y", "set"),
    ("# image", "label", "split"),
    (),
)
CLASSES = ("cat", "dog", "Cat", "emu", "1", "2", "1.0", "café", "a b", "a,b", 'q"u', "x;y", "None", "-1", "0.5")
SPLITS = ("train", "train", "train", "valid", "TEST", "", "0", "1", "extra", "True")
FORMS = (
    *(
        "{file}",
        "{file}",
        "{file}",
        "{bare}",
        "{name}",
        "{stem}",
        "./{file}",
        "/data/{file}",
        "C:\\x\\{file}",
        " {file} ",
    ),
    *("{back}", "../{file}", "missing/{file}", "{file}\0", "", "#{file}", "{file}/", "a{file}"),
)
BROKEN = (
    "",
    ",",
    ";;;",
    "# comment",
    '"open',
    "a",
    "a,b,c,d,e,f",
    " ",
    "\t",
    "\x1b[31m,x",
    "é;é",
    '# it"s',
    "sep=;",
    "\0",
)


@dataclass(frozen=True)
class Line:
    """A row: number of the image, form of its name, label (None: its class), split, and cells too many or too few."""

    image: int
    form: str
    label: str | None
    split: str
    extra: int


@dataclass(frozen=True)
class Case:
    """A list.

    Args:
        classes: the class folders, each with the number of its images.
        flat: the images are in one folder.
        lines: the rows, each a `Line` or text as it is.
        header: names of the columns; none for a list without header.
        order: of the columns.
        separator: between cells.
        encoding: of the text.
        suffix: of the file.
        end: of a line.
        quoted: all cells are quoted.
        columns: as given to `load`; None: the default.
    """

    classes: tuple[tuple[str, int], ...]
    flat: bool
    lines: tuple[Line | str, ...]
    header: tuple[str, ...]
    order: tuple[int, ...]
    separator: str
    encoding: str
    suffix: str
    end: str
    quoted: bool
    columns: tuple[str, ...] | None


def usually(value: object, *others: object) -> st.SearchStrategy:
    """A value in three of four cases."""
    return st.one_of(st.just(value), st.just(value), st.just(value), st.sampled_from(others))


lines = st.builds(
    Line,
    image=st.integers(0, 40),
    form=usually("{file}", *FORMS),
    label=usually(None, *CLASSES, ""),
    split=usually("train", *SPLITS),
    extra=usually(0, -1, 1, 2),
)
CASES = st.builds(
    Case,
    classes=st.lists(
        st.tuples(st.sampled_from(CLASSES), st.integers(2, 5)), min_size=2, max_size=4, unique_by=lambda pair: pair[0]
    ).map(tuple),
    flat=usually(False, True),
    lines=st.lists(st.one_of(lines, lines, lines, st.sampled_from(BROKEN)), max_size=8).map(tuple),
    header=st.sampled_from(HEADERS),
    order=st.permutations(range(3)).map(tuple),
    separator=st.sampled_from(SEPARATORS),
    encoding=st.sampled_from(ENCODINGS),
    suffix=st.sampled_from(SUFFIXES),
    end=st.sampled_from(("\n", "\r\n", "\r")),
    quoted=st.booleans(),
    columns=usually(None, ("id", "breed"), ("x", "y", "set"), ("Path", "Target"), ("1", "2"), ("image",), ("", "")),
)


def write_images(case: Case, root: Path) -> list[tuple[str, str]]:
    """Write the images; (path, class) of each."""
    found = []
    for name, count in case.classes:
        folder = root / ("all" if case.flat else name)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            file = folder / f"{name}-{number}.png".replace(" ", "_")
            file.write_bytes(encoded(len(found), "PNG"))
            found.append((file.relative_to(root).as_posix(), name))
    return found


def cells_of(line: Line, images: list[tuple[str, str]]) -> list[str]:
    """The cells of a row in the order image, label, split."""
    file, name = images[line.image % len(images)]
    bare, last = file.removesuffix(".png"), file.rpartition("/")[2]
    cell = line.form.format(
        file=file, bare=bare, name=last, stem=last.removesuffix(".png"), back=file.replace("/", "\\")
    )
    return [cell, name if line.label is None else line.label, line.split]


def write_case(case: Case, folder: Path) -> tuple[Path, dict[str, set[str]]]:
    """Write images and list; returns the list, and for each image the labels that any row gives it."""
    root = folder / "d"
    root.mkdir()
    images = write_images(case, root)
    own = [Line(number, "{file}", None, "train", 0) for number in range(len(images))]
    labels: dict[str, set[str]] = {}
    out = io.StringIO()
    quoting = csv.QUOTE_ALL if case.quoted else csv.QUOTE_MINIMAL
    writer = csv.writer(out, delimiter=case.separator, lineterminator=case.end, quoting=quoting)
    if case.header:
        writer.writerow([case.header[number] for number in case.order])
    for line in (*own, *case.lines):
        if isinstance(line, str):
            out.write(line + case.end)
            continue
        cells = cells_of(line, images)
        labels.setdefault(images[line.image % len(images)][0], set()).add(cells[1].strip())
        row = [cells[number] for number in case.order]
        writer.writerow(row[: len(row) + line.extra] + ["more"] * line.extra)
    path = root / f"list{case.suffix}"
    text = out.getvalue()
    marks = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    mark = marks.get(case.encoding, b"") if case.quoted else b""
    path.write_bytes(mark + text.encode(case.encoding, "replace"))
    return path, labels


def count_rows(path: Path, case: Case) -> int | None:
    """How many rows the list has, by a second reader; None where its text is unclear: a quotation mark is not closed,
    or the words of the case change what is a line.
    """
    encoding = "utf-8-sig" if case.encoding == "utf-8-sig" else case.encoding.removesuffix("-le").removesuffix("-be")
    content = path.read_bytes()
    try:
        text = content.decode(encoding if encoding != "utf-16" or content[:1] in b"\xff\xfe" else case.encoding)
    except UnicodeDecodeError:
        return None
    if any(isinstance(line, str) and ('"' in line or "sep=" in line) for line in case.lines):
        return None
    body = re.split(r"\r\n|\n|\r", text.removeprefix("\ufeff"))
    kept = [line for line in body if line.strip() and not line.lstrip().startswith("#")]
    headed = bool(case.header) and not body[0].startswith("#")
    return len(kept) - headed


def outcome(case: Case, folder: Path) -> str:
    """Write a case, read it, and assert the oracles."""
    path, labels = write_case(case, folder)
    options = {} if case.columns is None else {"columns": case.columns}
    try:
        index = index_source(path, **options)  # type: ignore[arg-type]
        data = load(path, workers=0, cache=False, most_unreadable=1.0, **options)
    except SkipwayError as error:
        message = str(error)
        assert printable(message) == message, f"a message with codes for the terminal: {message!r}"
        return f"refused: {reason_of(message)}"
    rows = count_rows(path, case)
    total = index.inventory.total
    if rows is not None:
        assert total == rows, (total, rows, index.inventory)
    assert data.inventory.total == total
    for sample in data.splits.samples:
        own = labels.get(sample.file)
        name = data.classes[sample.label]
        assert own is None or name in own or any(name == each.partition(".")[0] for each in own), (sample, own)
    said = sum(
        int(found[1].replace(",", ""))
        for each in data.remarks
        if (found := re.match(r"([\d,]+) (?:more )?rows? l", each))
    )
    assert said == index.left_out.counts.total(), (data.remarks, index.inventory)
    return "read with remarks" if data.remarks or data.unreadable else "read"


def reason_of(message: str) -> str:
    """The kind of a refusal, for the table."""
    kinds = {
        "leads out of": "an image outside",
        "and above": "two labels for an image",
        "is not known": "an unknown split",
        "has no column": "columns that are not there, or unclear",
        "the rule is two or three": "columns that cannot be",
        "not a list that can be read": "a damaged text",
        "has one column": "one column",
        "label of its own": "a label for each image",
        "a classifier needs at least two": "one class",
        "is not in the training split": "a class that is not trained",
        "a single image": "a class of one image",
        "can be read": "nothing can be read",
        "no readable": "a class of which nothing can be read",
    }
    return next((kind for words, kind in kinds.items() if words in message), re.sub(r"\S*/\S*", "PATH", message)[:70])
