"""The layout of help pages: headings and two columns, without boxes, the same on a terminal and in a file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

__all__ = ["HelpFormatter"]

FIRST_COLUMN = 26
MAX_WIDTH = 110
# the flag that also shows advanced options
HELP_ALL = "--help-all"


class HelpFormatter:
    """A help formatter for cyclopts.

    Args:
        headings: the option that begins a section → its heading, for the fields of a recipe, which know no groups.
        advanced: options that only `--help-all` shows.
    """

    show_all = False
    # cyclopts asks a formatter whether it shows the metavar after an option's name
    show_metavar = True

    def __init__(self, headings: Mapping[str, str] = {}, advanced: frozenset[str] = frozenset()) -> None:
        self.headings = headings
        self.advanced = advanced

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print one panel of commands or parameters."""
        entries = [entry for entry in panel.entries if entry.display_labels and self.is_shown(entry)]
        if not entries:
            return
        if not any(name in self.headings for entry in entries for name in entry.positive_names):
            print_heading(console, str(panel.title))
        for entry in entries:
            for name in entry.positive_names:
                if name in self.headings:
                    print_heading(console, self.headings[name])
            for line in format_entry(entry, min(console.width, MAX_WIDTH)):
                console.print(line, highlight=False, markup=False, soft_wrap=True)

    def is_shown(self, entry: HelpEntry) -> bool:
        """Whether an option is common, or `--help-all` was given."""
        return HelpFormatter.show_all or self.advanced.isdisjoint(entry.positive_names)

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        """Print the usage line."""
        if usage is not None:
            console.print(getattr(usage, "plain", str(usage)).strip(), highlight=False, markup=False)

    def render_description(self, console: Console, options: ConsoleOptions, description: Any) -> None:
        """Print the description of the program or of a command."""
        text = to_text(description)
        if text:
            console.print()
            console.print(text, highlight=False, markup=False)


def print_heading(console: Console, title: str) -> None:
    """Print the heading of a section after an empty line."""
    console.print()
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)


def format_entry(entry: HelpEntry, width: int) -> Iterator[str]:
    """The lines of one command or parameter: names in the first column, description in the second."""
    names = f"  {format_names(entry)}"
    lines = textwrap.wrap(format_description(entry), max(20, width - FIRST_COLUMN - 2)) or [""]
    if len(names) > FIRST_COLUMN:
        yield names
        names = ""
    for line in lines:
        yield f"{names:<{FIRST_COLUMN}}  {line}".rstrip()
        names = ""


def format_names(entry: HelpEntry) -> str:
    """The names of an option with its choices, if they are short, or its metavar."""
    names = ", ".join([*entry.positive_names, *entry.positive_shorts])
    if entry.positional_label:
        return f"{entry.positional_label}, {names}" if names else entry.positional_label
    if entry.negative_names:
        return f"--[no-]{names.removeprefix('--')}"
    if not entry.metavar:
        return names
    return f"{names} {join_choices(entry) if has_short_choices(entry, names) else entry.metavar}"


def format_description(entry: HelpEntry) -> str:
    """The description of an option, its choices unless the first column has them, and its default."""
    names = ", ".join([*entry.positive_names, *entry.positive_shorts])
    choices = "" if not entry.choices or has_short_choices(entry, names) else f"({join_choices(entry)})"
    default = "" if entry.default in (None, "False") else f"[{entry.default}]"
    return " ".join(part for part in (to_text(entry.description), choices, default) if part)


def join_choices(entry: HelpEntry) -> str:
    """The choices of an option, separated by bars."""
    return "|".join(entry.choices or ())


def has_short_choices(entry: HelpEntry, names: str) -> bool:
    """Whether an option has choices that fit into the first column."""
    return bool(entry.choices) and len(f"  {names} {join_choices(entry)}") <= FIRST_COLUMN


def to_text(renderable: Any) -> str:
    """The plain text of what cyclopts prepared for rich."""
    if renderable is None:
        return ""
    primary = getattr(renderable, "primary_renderable", renderable)
    return str(getattr(primary, "plain", primary)).strip()
