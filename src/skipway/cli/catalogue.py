"""`skipway models` and `skipway schemes`."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from skipway.cli.table import print_table

__all__ = ["models", "schemes"]

Flag = Annotated[bool, Parameter(negative=())]


def models(*, json: Flag = False) -> int:
    """List the published models. --depth builds any other depth of a family.

    Args:
        json: One JSON object per line.
    """
    from skipway.models import variants

    rows = [(row.name, row.family, f"{row.parameters:,}", row.description) for row in variants()]
    print_table(("model", "family", "parameters", "description"), rows, right=("parameters",), as_json=json)
    return 0


def schemes(name: str | None = None, /, *, json: Flag = False) -> int:
    """List the residual schemes, or show the card of one: equation, source, recommended use.

    Args:
        name: Show the card of this scheme.
        json: One JSON object per line.
    """
    from skipway.schemes import all_schemes, card

    if name is not None:
        print_card(card(name))
        return 0
    rows = [(key, entry.equation, entry.when) for key, entry in all_schemes().items()]
    print_table(("scheme", "equation", "recommended use"), rows, as_json=json)
    return 0


def print_card(card: str) -> None:
    """Print Markdown: rendered on a terminal, as source elsewhere."""
    if not sys.stdout.isatty():
        sys.stdout.write(card.rstrip() + "\n")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(card))
