"""Charts without axes as SVG: bars, heat maps, scatters."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from skipway.report.chart import Axis, Bars, HeatCell, Heatmap, Scatter
from skipway.report.svg_style import HEIGHT, LETTER, WIDTH, clipped, clipped_path, series_class, text_width

__all__ = ["bar_parts", "matrix_parts", "scatter_parts"]

ROW_LETTERS, COLUMN_LETTERS = 22, 14
"""Letters of the names beside and above a matrix."""
MATRIX_SIDE, LEAST_CELL, LARGEST_CELL, COUNT_CELL, PERCENT_CELL = 440, 15, 52, 24, 40
"""Side of a matrix, of its smallest and largest cell, and of cells with room for a count, and for a percentage, too."""


def bar_parts(chart: Bars) -> tuple[float, float, list[str]]:
    """Width, height and parts of a bar chart."""
    thickness, gap, letters = 10, 8, 17
    left = 12 + LETTER * min(letters, max(map(text_width, chart.categories)))
    largest = max([value for _, values in chart.series for value in values] + [1.0])
    axis = Axis(0.0, largest, left, WIDTH - 50)
    parts, y = [], 6.0
    for place, name in enumerate(chart.categories):
        middle = y + thickness * len(chart.series) / 2 + 4
        title = f"<title>{escape(name)}</title>"
        text = escape(clipped(name, letters))
        parts.append(f'<text x="{left - 6:.1f}" y="{middle:.1f}" text-anchor="end">{text}{title}</text>')
        for index, (series, values) in enumerate(chart.series):
            value = values[place]
            end = axis.at(value)
            words = escape(f"{name}: {value:,.0f} {series}")
            parts.append(
                f'<g class="{series_class(index)}"><rect class="bar" x="{left:.1f}" y="{y:.1f}" '
                f'width="{end - left:.1f}" height="{thickness - 1}"><title>{words}</title></rect></g>'
                f'<text class="small" x="{end + 4:.1f}" y="{y + 8:.1f}">{value:,.0f}</text>'
            )
            y += thickness
        y += gap
    return WIDTH, y, parts


def matrix_parts(chart: Heatmap) -> tuple[float, float, list[str]]:
    """Width, height and parts of a heat map."""
    sides = ((chart.rows, ROW_LETTERS), (chart.columns, COLUMN_LETTERS))
    left, top = (26 + LETTER * min(letters, max(map(text_width, names))) for names, letters in sides)
    cell = min(LARGEST_CELL, max(LEAST_CELL, (MATRIX_SIDE - left) / len(chart.columns)))
    width, height = cell * len(chart.columns), cell * len(chart.rows)
    middle = f'x="{left + width / 2:.0f}" y="13"'
    parts = [
        f'<text class="title" {middle} text-anchor="middle">{escape(chart.column_title)}</text>',
        f'<text class="title" transform="translate(12 {top + height / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(chart.row_title)}</text>",
    ]
    places = (
        lambda middle: f'x="{left - 6:.1f}" y="{top + middle:.1f}" text-anchor="end"',
        lambda middle: f'transform="translate({left + middle:.1f} {top - 6:.1f}) rotate(-90)"',
    )
    for (names, letters), place in zip(sides, places, strict=True):
        for number, name in enumerate(names):
            text = f"{escape(clipped_path(name, letters))}<title>{escape(name)}</title>"
            parts.append(f"<text {place((number + 0.5) * cell + 4)}>{text}</text>")
    for row, cells in enumerate(chart.cells):
        for column, each in enumerate(cells):
            parts += cell_parts(each, left + column * cell, top + row * cell, cell)
    return max(WIDTH, left + width), top + height + 2, parts


def cell_parts(shown: HeatCell, x: float, y: float, cell: float) -> Iterator[str]:
    """A cell of a heat map of side `cell`, with what is written in it."""
    opacity = 0.04 if shown.shade == 0 else 0.12 + 0.88 * shown.shade
    yield (
        f'<rect class="cell {shown.kind}" x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}" '
        f'fill-opacity="{opacity:.2f}"><title>{escape(shown.words)}</title></rect>'
    )
    if shown.text and cell >= COUNT_CELL:
        both = bool(shown.below) and cell >= PERCENT_CELL
        middle_x, middle_y = x + (cell - 1) / 2, y + cell / 2 + (0 if both else 4)
        below = f'<tspan class="small" x="{middle_x:.1f}" dy="13">{escape(shown.below)}</tspan>' if both else ""
        yield (
            f'<text class="in" x="{middle_x:.1f}" y="{middle_y:.1f}" text-anchor="middle">'
            f"{escape(shown.text)}{below}</text>"
        )


def scatter_parts(chart: Scatter) -> Iterator[str]:
    """The points of a scatter, groups in turn, in the whole picture; both axes have one scale."""
    points = [point for _, group in chart.groups for point in group]
    if not points:
        return
    spans = [(min(values), max(values)) for values in zip(*((x, y) for x, y, _ in points), strict=True)]
    room = 6.0
    scale = min(
        (size - 2 * room) / max(high - low, 1e-9) for (low, high), size in zip(spans, (WIDTH, HEIGHT), strict=True)
    )
    for index, (_, group) in enumerate(chart.groups):
        for x, y, words in group:
            place = [
                size / 2 + sign * scale * (value - (low + high) / 2)
                for value, (low, high), size, sign in zip((x, y), spans, (WIDTH, HEIGHT), (1, -1), strict=True)
            ]
            title = f"<title>{escape(words)}</title>" if words else ""
            yield (
                f'<circle class="{series_class(index)} spot" cx="{place[0]:.1f}" cy="{place[1]:.1f}" '
                f'r="{4 if words else 1.8}">{title}</circle>'
            )
