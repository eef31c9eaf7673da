"""The arguments that messages name, in the spelling of the command line."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from skipway.argument_names import option_spelling

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["option_spelling", "option_view", "option_words", "print_note"]


def option_view(view: RenderableType) -> RenderableType:
    """A renderable whose lines of text are in the spelling of the command line."""
    from rich.console import Group
    from rich.protocol import rich_cast
    from rich.text import Text

    view = rich_cast(view)
    if isinstance(view, Group):
        return Group(*map(option_view, view.renderables))
    if isinstance(view, Text) and (spelled := option_spelling(view.plain)) != view.plain:
        return Text(spelled, view.style)
    return view


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Arguments as the words of a command line; None and False are left out.

    >>> option_words({"fix": True, "weight_decay": 0.1, "lr": None})
    ['--fix', '--weight-decay', '0.1']
    """
    words = []
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def print_note(sentence: str) -> None:
    """Print a remark to standard error."""
    print(f"note      {option_spelling(sentence)}", file=sys.stderr)
