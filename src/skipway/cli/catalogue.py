"""`skipway models` and `skipway schemes`."""

from __future__ import annotations

import sys

__all__ = ["models", "schemes"]

Rows = list[tuple[str, ...]]


def models() -> int:
    """List the published models; any depth of a family is built by --depth as well."""
    from skipway.models import variants

    rows: Rows = [(row.name, row.family, f"{row.parameters:,}", row.description) for row in variants()]
    print_table(("model", "family", "parameters", "what it is"), rows, right=("parameters",))
    return 0


def schemes(name: str | None = None, /) -> int:
    """List the residual schemes, or show the card of one: its equation, where it comes from, when to take it.

    Args:
        name: Scheme whose card is shown.
    """
    from skipway.schemes import all_schemes as all_schemes
    from skipway.schemes import card

    if name is not None:
        show_card(card(name))
        return 0
    rows: Rows = [(key, entry.equation, entry.when) for key, entry in all_schemes().items()]
    print_table(("scheme", "equation", "when to take it"), rows)
    return 0


def print_table(columns: tuple[str, ...], rows: Rows, right: tuple[str, ...] = ()) -> None:
    """A table on a terminal; in a file one line per row, separated by tabs."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not sys.stdout.isatty():
        for row in (columns, *rows):
            sys.stdout.write("\t".join(row) + "\n")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if column in right else "left", no_wrap=number < 2)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def show_card(card: str) -> None:
    """A card in Markdown: laid out on a terminal, as it is in a file."""
    if not sys.stdout.isatty():
        sys.stdout.write(card.rstrip() + "\n")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(card))
