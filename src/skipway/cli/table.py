"""The one table of the command line: `rich.table` on a terminal, tab-separated or JSON lines elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["build_table", "print_table"]


def build_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> Table:
    """Build a `rich` table whose cells are plain text; the columns in `right` are right-aligned."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if column in right else "left", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = (), *, as_json: bool = False
) -> None:
    """Print a table to a terminal; to a file or pipe, tab-separated lines below a header.

    Args:
        columns: titles.
        rows: one text per column.
        right: titles of the columns that are right-aligned on a terminal.
        as_json: print one JSON object per row instead, with the titles as keys.
    """
    if as_json:
        for row in rows:
            sys.stdout.write(json.dumps(dict(zip(columns, row, strict=True))) + "\n")
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(build_table(columns, rows, right))
    else:
        for row in (columns, *rows):
            sys.stdout.write("\t".join(row) + "\n")
