"""Layout of all pages: Jinja2 templates with one style sheet and script, sortable tables, prose.

A page is a single file. Its content security policy permits only the embedded style sheet, script and images, so that a
browser loads nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from skipway._version import __version__
from skipway.argument_names import spelled
from skipway.checkpoint.files import write_atomically
from skipway.report.chart import Bars, Heatmap, Scatter
from skipway.report.svg import Chart, chart_css, draw, draw_each, is_labelled, marker
from skipway.report.svg_style import series_class
from skipway.schemes.cards import raised

__all__ = ["PageTable", "TableCell", "number_cell", "prose", "render", "sentence", "text_cell", "write_page"]

LINK = re.compile(r"https?://[^\s<>\"'()]+[^\s<>\"'().,;:]")


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render a template, write it to `path` atomically, and return the path."""
    content = render(template, **values).encode("utf-8", "backslashreplace")
    write_atomically(path, lambda aside: aside.write_bytes(content))
    return path


def render(template: str, **values: Any) -> str:
    """Render a template of `report/templates` as text; values that are not `Markup` are escaped."""
    style, script = assets()
    policy = f"default-src 'none'; img-src data:; style-src '{digest(style)}'; script-src '{digest(script)}'"
    frame = {"policy": Markup(policy), "style": Markup(style), "script": Markup(script), "version": __version__}
    return environment().get_template(template).render(**frame, **values)


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Return the Jinja2 environment of all pages."""
    jinja = Environment(
        loader=PackageLoader("skipway.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    jinja.filters.update(
        draw=draw, draw_each=draw_each, legend=legend, options=options, prose=prose, sentence=sentence, spelled=spelled
    )
    return jinja


@lru_cache(maxsize=1)
def assets() -> tuple[str, str]:
    """Return style sheet and script of all pages."""
    folder = files("skipway.report").joinpath("templates")
    return chart_css() + folder.joinpath("page.css").read_text("utf-8"), folder.joinpath("page.js").read_text("utf-8")


def digest(text: str) -> str:
    """Return the hash that identifies a style sheet or script in a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


class Key(NamedTuple):
    """An entry of a legend: the series' name, its style class, and a sample of its line."""

    name: str
    kind: str
    sample: Markup


def legend(chart: Chart) -> list[Key]:
    """Return the legend of a chart; without series that are labelled at their ends, and empty for a single series."""
    if isinstance(chart, Heatmap):
        return []
    if isinstance(chart, Scatter):
        keys = [Key(name, series_class(index), spot_sample(index)) for index, name in enumerate(chart.names)]
    elif isinstance(chart, Bars):
        keys = [Key(name, series_class(index), line_sample("bar")) for index, name in enumerate(chart.names)]
    else:
        faint = dict.fromkeys(series.name for series in chart.series if series.style == "faint")
        measured = {series.name for series in chart.series if series.style == "measured"}
        keys = [Key(name, "faint", line_sample("line faint")) for name in faint]
        if is_labelled(chart):
            return keys
        for index, name in enumerate(chart.names):
            own = name in measured
            sample = line_sample("line", marker(index, 11, 5)) if own else line_sample("line theory")
            keys.append(Key(name, series_class(index), sample))
    return keys if len(keys) > 1 else []


def line_sample(kind: str, mark: str = "") -> Markup:
    """Draw a short sample of a line with its marker, or of a bar."""
    return sample(f'<path class="{kind}" d="M1 5h20"/>{mark}')


def spot_sample(index: int) -> Markup:
    """Draw a point of a group."""
    spot = f'<circle class="{series_class(index)} spot" cx="11" cy="5" r="4"/>'
    return sample(spot)


def sample(parts: str) -> Markup:
    """A small drawing beside a name, which says nothing more than the name."""
    return Markup(f'<svg class="sample" aria-hidden="true" viewBox="0 0 22 10">{parts}</svg>')


class TableCell(NamedTuple):
    """A cell of a table: displayed text, sort key, and whether the key is a number."""

    text: str
    key: str
    number: bool = False


@dataclass(frozen=True)
class PageTable:
    """A table that sorts by a column when its heading is pressed.

    Args:
        columns: headings.
        rows: of one cell per column.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[TableCell]]

    @property
    def headings(self) -> list[tuple[str, bool]]:
        """Pairs of heading and whether the column holds numbers only."""
        return [(name, all(row[place].number for row in self.rows)) for place, name in enumerate(self.columns)]


def number_cell(value: float, text: str) -> TableCell:
    """Return a cell with a number; NaN sorts first and infinity last."""
    return TableCell(text, f"{-1.0 if math.isnan(value) else min(value, 1e308):.6g}", number=True)


def text_cell(text: str, key: str = "") -> TableCell:
    """Return a cell with text, sorted by `key` or by the text itself."""
    return TableCell(text, key or text)


def prose(text: str) -> Markup:
    """Escape text and write its web addresses as links, code in backticks as code, and powers as powers.

    >>> prose("a & b: L^-p, https://arxiv.org/abs/1502.01852.")
    Markup('a &amp; b: L<sup>-p</sup>, <a href="https://arxiv.org/abs/1502.01852" rel="noreferrer">https://arxiv.org/abs/1502.01852</a>.')
    """
    parts, done = [], 0
    for match in LINK.finditer(text):
        address = escape(match.group())
        parts += [marked_up(text[done : match.start()]), f'<a href="{address}" rel="noreferrer">{address}</a>']
        done = match.end()
    return Markup("".join([*parts, marked_up(text[done:])]))


def sentence(text: str) -> str:
    """Text as a sentence: with a capital, and a full stop where it has no other end.

    >>> sentence("loss: cross-entropy"), sentence("Does it train?")
    ('Loss: cross-entropy.', 'Does it train?')
    """
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?', ':')) else '.'}"


def options(command: str) -> Markup:
    """A command line that breaks between its options, each with its value.

    >>> options("skipway train photos --size 8")
    Markup('<span>skipway train photos</span> <span>--size 8</span>')
    """
    return Markup(" ").join(Markup("<span>{}</span>").format(part) for part in re.split(r" (?=--)", command))


def marked_up(text: str) -> str:
    """Escape text and write its code and powers."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", raised(escape(text)))
