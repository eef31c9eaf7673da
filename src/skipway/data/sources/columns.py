"""Which columns of a list hold images, labels and splits: by their cells, and among equals by usual names."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from skipway.data.sources.image_names import ImageNames
from skipway.data.sources.index import name_list
from skipway.data.sources.splits import Split, split_of
from skipway.data.sources.tables import Table
from skipway.errors import DataError, printable, spell

__all__ = ["COLUMNS", "Columns", "choose_columns", "parse_column", "parse_columns"]

COLUMNS = ("image", "label", "split")
"""Names that are looked for by default; other names are then looked for, too."""
IMAGE_COLUMNS = (
    *("image", "images", "imagepath", "imagefile", "imagename", "imageid", "path", "file", "filename", "filepath"),
    *("files", "img", "imgpath", "imgid", "photo", "picture", "id", "name", "fname", "relpath", "uuid", "key"),
)
LABEL_COLUMNS = (
    *("label", "labels", "class", "classname", "classlabel", "category", "categoryname", "target", "y", "breed"),
    *("species", "diagnosis", "dx", "tag", "type", "labelname", "classid", "categoryid", "labelid", "grade"),
)
SPLIT_COLUMNS = (
    "split",
    "set",
    "subset",
    "partition",
    "fold",
    "phase",
    "usage",
    "dataset",
    "isvalid",
    "isvalidation",
    "istest",
)
# rows that are looked at
SAMPLED = 200
YES, NO = frozenset({"true", "1", "yes", "1.0", "t"}), frozenset({"false", "0", "no", "0.0", "f"})


def parse_columns(text: str | None) -> tuple[str, ...]:
    """The names in a text with commas; those that let the content decide for None.

    >>> parse_columns("photo, kind"), parse_columns(None)
    (('photo', 'kind'), ('image', 'label', 'split'))
    """
    return COLUMNS if text is None else tuple(name.strip() for name in text.split(","))


def parse_column(text: str | None) -> str | None:
    """The name of the column that holds a text; None, as for the names of an image list, lets the content decide.

    >>> parse_column(" review "), parse_column("image,label,split")
    ('review', None)
    """
    return None if text is None or parse_columns(text) == COLUMNS else text.strip()


@dataclass(frozen=True)
class Columns:
    """Columns of a list by number.

    Args:
        image: where the image is named.
        label: its class; of several columns ("one-hot"), the class is the name of the one that holds 1.
        split: its split; several marks, as is_valid and is_test, say it together; (): there is no such column.
        names: of all columns.
        headed: whether the columns have names, in a header or by the format.
        remarks: sentences about what was chosen.
    """

    image: int
    label: tuple[int, ...]
    split: tuple[int, ...]
    names: tuple[str, ...]
    headed: bool
    remarks: tuple[str, ...] = ()

    def label_of(self, row: Sequence[str]) -> str:
        """The label in a row; "": none."""
        if len(self.label) == 1:
            return row[self.label[0]].strip()
        marked = [self.names[number] for number in self.label if row[number].strip().lower() in YES]
        return marked[0] if len(marked) == 1 else ""

    def split_of(self, row: Sequence[str]) -> Split | str | None:
        """The split that a row is in, also as "validation and test" where marks contradict each other; a cell that is
        none as it stands; None: its cells are empty. Of several marks, an empty cell is none.
        """
        found = [split_in_cell(row[number].strip(), plain(self.names[number])) for number in self.split]
        said = [split for split in dict.fromkeys(found) if split not in ("train", None)]
        return " and ".join(map(str, said)) or (None if found and not any(found) else "train")


def split_in_cell(cell: str, name: str) -> Split | str | None:
    """The split that a cell names, or marks in the column `name`; a cell that is none as it stands; None: no text."""
    if name.startswith("is") and cell.lower() in YES | NO:
        held: Split = "test" if name == "istest" else "validation"
        return held if cell.lower() in YES else "train"
    return split_of(cell) or cell or None


def plain(name: str) -> str:
    """A name in lower case, letters and digits only."""
    return re.sub(r"[\W_]+", "", name.lower())


def choose_columns(table: Table, wanted: Sequence[str], images: ImageNames) -> Columns:
    """Choose the columns of a list.

    Args:
        table: the list.
        wanted: names of the columns for image, label and split, of which the last may be missing: the content then
            decides it, as it decides all for `COLUMNS`; "-" is no column.
        images: finds the files.

    Raises:
        DataError: there is no such column, or it is not clear which one holds the labels.
    """
    if table.names is None and not table.rows:
        raise DataError(f"{printable(table.path)} is empty: a list has an image and its label in each row")
    wanted = tuple(wanted)
    first = list(table.names or table.rows[0][1])
    headed = table.names is not None or is_header(first, wanted, images)
    names = (
        tuple(name.strip() for name in first) if headed else tuple(str(number) for number in range(1, len(first) + 1))
    )
    body = table.body(headed=headed)
    sample = [row for _, row in body[:: max(1, len(body) // SAMPLED)] if len(row) == len(names)]
    if wanted == COLUMNS:
        image = image_column(table, names, sample, images)
        split, remarks = split_columns(names, sample, [image])
        label = label_columns(table, names, sample, [image, *split])
    else:
        check_number(wanted)
        numbers = [find_name(names, name) for name in wanted]
        missing = [name for name, number in zip(wanted[:2], numbers, strict=False) if number is None]
        if missing:
            raise DataError(f"{printable(table.path)} has no column {name_list(missing)}; {list_columns(names)}")
        image, kind, third = (*numbers, None)[:3]
        assert image is not None
        assert kind is not None
        label, split, remarks = (kind,), (), []
        if third is not None:
            split = (third,)
        elif wanted[2:] in ((), COLUMNS[2:]):
            split, remarks = split_columns(names, sample, [image, kind])
        elif plain(wanted[2]):
            remarks = [f"there is no column {wanted[2]!r}, so images are not split by one"]
    found = Columns(image, label, split, names, headed)
    return replace(found, remarks=(*column_remarks(found), *remarks))


def check_number(wanted: Sequence[str]) -> None:
    """Check the number of names of columns.

    Raises:
        DataError: there are fewer than two or more than three.
    """
    if not 2 <= len(wanted) <= 3:
        raise DataError(f"{spell('columns', tuple(wanted))}: the rule is two or three names: image, label and split")


def is_header(first: Sequence[str], wanted: Sequence[str], images: ImageNames) -> bool:
    """Whether the first row names columns: none of its cells is a file, and one is a usual or a wanted name."""
    if any(images.direct(cell) is not None for cell in first if cell):
        return False
    known = {plain(name) for name in (*IMAGE_COLUMNS, *LABEL_COLUMNS, *SPLIT_COLUMNS, *wanted)}
    if any(plain(cell) in known for cell in first):
        return True
    return not images.lookup([cell for cell in first if cell])


def find_name(names: Sequence[str], wanted: str) -> int | None:
    """The number of a column: its name as it stands, else without regard to case, spaces and punctuation."""
    if wanted in names:
        return names.index(wanted)
    alike = [number for number, name in enumerate(names) if plain(name) == plain(wanted) != ""]
    return alike[0] if len(alike) == 1 else None


def list_columns(names: Sequence[str]) -> str:
    """The columns that are there, and how to name two of them."""
    example = tuple(names[:2]) if len(names) > 1 else ("image", "label")
    named = f"with {spell('columns', example)} for example"
    return f"it has {name_list(names, 12) or 'none'}. Name those of image and label, {named}"


def rank_of(name: str, usual: Sequence[str]) -> int:
    """The place of a name among usual ones, the last place for others."""
    return usual.index(plain(name)) if plain(name) in usual else len(usual)


def image_column(table: Table, names: Sequence[str], sample: list[list[str]], images: ImageNames) -> int:
    """The column most of whose cells are files; among equals the one with the most usual name.

    Raises:
        DataError: none holds files or has a usual name.
    """
    scores = {}
    for number in range(len(names)):
        cells = [row[number] for row in sample if row[number].strip()]
        rest = [cell for cell in cells if images.direct(cell) is None]
        looked_up = images.lookup(rest)
        direct = len(cells) - len(rest)
        scores[number] = (direct + 0.9 * sum(cell in looked_up for cell in rest)) / max(1, len(sample))
    best = min(scores, key=lambda number: (-scores[number], rank_of(names[number], IMAGE_COLUMNS)))
    if scores[best] > 0 or rank_of(names[best], IMAGE_COLUMNS) < len(IMAGE_COLUMNS):
        return best
    raise DataError(
        f"{printable(table.path)} has no column 'image', and the cells of no other are images in "
        f"{printable(table.path.parent)}; {list_columns(names)}"
    )


def split_columns(
    names: Sequence[str], sample: list[list[str]], taken: Collection[int]
) -> tuple[tuple[int, ...], list[str]]:
    """The column of splits, or all columns of marks, as is_valid and is_test; and remarks about columns with such names
    that are not used.
    """
    found: list[int] = []
    remarks = []
    for number in sorted(range(len(names)), key=lambda number: rank_of(names[number], SPLIT_COLUMNS)):
        name = plain(names[number])
        cells = {row[number].strip() for row in sample} - {""}
        if number in taken or name not in SPLIT_COLUMNS or not cells:
            continue
        marks = name.startswith("is") and all(cell.lower() in YES | NO for cell in cells)
        if marks or any(split_of(cell) for cell in cells) or name == "split":
            if not found or (marks and plain(names[found[0]]).startswith("is")):
                found.append(number)
            else:
                remarks.append(
                    f"the column {names[number]!r} holds splits, too, and is not used: {names[found[0]]!r} is"
                )
        elif not found:
            remarks.append(
                f"the column {names[number]!r} holds {name_list(sorted(cells), 3)} and no names of splits: it is "
                "not used"
            )
    return tuple(found), remarks


def label_columns(table: Table, names: Sequence[str], sample: list[list[str]], taken: list[int]) -> tuple[int, ...]:
    """The column of labels: the one with the most usual name, else the only other one; or columns of 0 and 1.

    Raises:
        DataError: several columns could be it, or none.
    """
    others = [number for number in range(len(names)) if number not in taken]
    known = [number for number in others if plain(names[number]) in LABEL_COLUMNS]
    if known:
        best = min(known, key=lambda number: rank_of(names[number], LABEL_COLUMNS))
        same = [number for number in known if number != best and is_renaming(sample, best, number)]
        # a name says more than a number
        texts = [number for number in (best, *same) if not all(is_number(row[number]) for row in sample)]
        return ((texts or [best])[0],)
    if len(others) == 1:
        return (others[0],)
    marks = [n for n in others if sample and all(row[n].strip().lower() in YES | NO for row in sample)]
    ones = [sum(row[number].strip().lower() in YES for number in marks) for row in sample]
    if len(marks) > 1 and ones and all(count == 1 for count in ones):
        return tuple(marks)
    reason = "several columns may hold the labels" if others else "there is no column of labels"
    raise DataError(f"{printable(table.path)} has no column 'label', and {reason}; {list_columns(names)}")


def is_renaming(sample: list[list[str]], first: int, second: int) -> bool:
    """Whether two columns name the same classes, one name each."""
    pairs = {(row[first], row[second]) for row in sample}
    return len(pairs) == len({one for one, _ in pairs}) == len({two for _, two in pairs})


def is_number(cell: str) -> bool:
    """Whether a cell is a number, or empty."""
    return re.fullmatch(r"[+-]?\d*\.?\d*(?:[eE][+-]?\d+)?", cell.strip()) is not None


def column_remarks(found: Columns, source: str = "list") -> list[str]:
    """A sentence about columns that have other names than the default ones."""
    used = [found.image, *found.label, *found.split]
    if [found.names[number] for number in used] == list(COLUMNS[: len(used)]):
        return []
    kind = "column" if found.headed else "the column number"
    labels = name_list([found.names[number] for number in found.label], 3)
    parts = [f"images from {kind} {found.names[found.image]!r}", f"labels from {labels}"]
    if found.split:
        parts.append(f"splits from {name_list(found.names[number] for number in found.split)}")
    rest = [name for number, name in enumerate(found.names) if number not in used]
    unused = f"; not used: {name_list(rest)}" if rest else ""
    return [f"the {source} gives {', '.join(parts)}{unused}"]
