"""How help pages look: headings, two columns, one line per option where the terminal is wide enough."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

__all__ = ["Columns"]

# the option with which each section of a long list of parameters begins
SECTIONS = {
    "--data": "Data",
    "--model": "Model",
    "--epochs": "Optimisation",
    "--device": "Machine",
    "--out": "Run",
}
FIRST_COLUMN = 26
WIDEST = 110


# the flag that shows options which are seldom needed, too
EVERYTHING = "--help-all"


class Columns:
    """A help formatter of cyclopts without boxes, the same on a terminal and in a file.

    Args:
        seldom: options that only `--help-all` shows.
    """

    everything = False

    def __init__(self, seldom: frozenset[str] = frozenset()) -> None:
        self.seldom = seldom

    # cyclopts asks a formatter whether it shows the kind of value behind an option's name
    show_metavar = True

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print one list of commands or parameters."""
        entries = [entry for entry in panel.entries if entry.display_labels and self.shown(entry)]
        if not entries:
            return
        if not any(SECTIONS.get(name) for entry in entries for name in entry.positive_names):
            self.heading(console, str(panel.title))
        for entry in entries:
            for name in entry.positive_names:
                if name in SECTIONS:
                    self.heading(console, SECTIONS[name])
            for line in rows(entry, min(console.width, WIDEST)):
                console.print(line, highlight=False, markup=False, soft_wrap=True)

    def shown(self, entry: HelpEntry) -> bool:
        """Whether an option is for everybody, or everything was asked for."""
        return Columns.everything or self.seldom.isdisjoint(entry.positive_names)

    def heading(self, console: Console, title: str) -> None:
        """Print the title of a section, after an empty line."""
        console.print()
        console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        """Print the usage line."""
        if usage is not None:
            console.print(getattr(usage, "plain", str(usage)).strip(), highlight=False, markup=False)

    def render_description(self, console: Console, options: ConsoleOptions, description: Any) -> None:
        """Print what the program or the command does."""
        text = plain(description)
        if text:
            console.print()
            console.print(text, highlight=False, markup=False)


def rows(entry: HelpEntry, width: int) -> Iterator[str]:
    """The lines of one command or parameter: its names in the first column, what it does in the second."""
    names = f"  {label(entry)}"
    lines = textwrap.wrap(explanation(entry), max(20, width - FIRST_COLUMN - 2)) or [""]
    if len(names) > FIRST_COLUMN:
        yield names
        names = ""
    for line in lines:
        yield f"{names:<{FIRST_COLUMN}}  {line}".rstrip()
        names = ""


def label(entry: HelpEntry) -> str:
    """The names of an option, and the values that it takes: its choices where they are short, else their kind."""
    names = ", ".join([*entry.positive_names, *entry.positive_shorts])
    if entry.positional_label:
        return f"{entry.positional_label}, {names}" if names else entry.positional_label
    if entry.negative_names:
        return f"--[no-]{names.removeprefix('--')}"
    if not entry.metavar:
        return names
    return f"{names} {choices(entry) if fits(entry, names) else entry.metavar}"


def explanation(entry: HelpEntry) -> str:
    """What an option does, its choices unless they stand in the first column, and its default."""
    names = ", ".join([*entry.positive_names, *entry.positive_shorts])
    shown = "" if not entry.choices or fits(entry, names) else f"({choices(entry)})"
    default = "" if entry.default in (None, "False") else f"[{entry.default}]"
    return " ".join(part for part in (plain(entry.description), shown, default) if part)


def choices(entry: HelpEntry) -> str:
    """The values to choose from."""
    return "|".join(entry.choices or ())


def fits(entry: HelpEntry, names: str) -> bool:
    """Whether the choices have room in the first column."""
    return bool(entry.choices) and len(f"  {names} {choices(entry)}") <= FIRST_COLUMN


def plain(text: Any) -> str:
    """The characters of what cyclopts made for rich."""
    if text is None:
        return ""
    primary = getattr(text, "primary_renderable", text)
    return str(getattr(primary, "plain", primary)).strip()
