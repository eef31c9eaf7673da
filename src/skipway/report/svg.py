"""Charts as SVG, inline in a page, which draws the legend outside the picture, or as files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files

from markupsafe import Markup

from skipway.report.chart import (
    Axis,
    Bars,
    Figure,
    HeatCell,
    Heatmap,
    Point,
    Scatter,
    Series,
    format_tick,
    format_value,
    thinned,
)

__all__ = ["COLORS", "Chart", "chart_css", "clipped", "draw", "svg_file"]

WIDTH, HEIGHT = 420, 262
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 16, 38
LETTER = 6.6
"""Width of a character."""
MOST_MARKERS, MOST_TOOLTIPS = 60, 250
"""Points up to which a series shows a marker for each, and up to which each has a tooltip."""
MOST_TICKS, TICK_ROOM = 12, 30.0
FEW_SERIES, LABEL_LETTERS, LABEL_GAP = 4, 15, 12.0
"""Series beyond which each is labelled at its end as well, letters of such a label, and the distance of two."""
COLORS = (
    ("#0072b2", "#56b4e9"),
    ("#c65300", "#f0975a"),
    ("#00805f", "#3cc79c"),
    ("#a8528a", "#e39cc9"),
    ("#8a6d00", "#e6c14e"),
    ("#b2182b", "#ff8b94"),
    ("#5048b8", "#a9a4f5"),
    ("#5a7d00", "#b5d35a"),
)
"""Of the series, on light and on dark paper; dashes and markers tell apart those that share a colour."""
DASHES = ("none", "7 3", "2 2.5", "9 3 2 3")
NAME_LETTERS = 14
Chart = Figure | Bars | Heatmap | Scatter
MATRIX_SIDE, LEAST_CELL, COUNT_CELL, PERCENT_CELL = 440, 15, 24, 40
"""Side of a matrix and of its smallest cell, and cells that have room for a count and for a percentage as well."""


def draw(chart: Chart) -> Markup:
    """A chart as an SVG element without legend; empty for a figure without a finite value."""
    if isinstance(chart, Bars):
        return element(chart.title, *bar_parts(chart))
    if isinstance(chart, Heatmap):
        return element(chart.title, *matrix_parts(chart))
    if isinstance(chart, Scatter):
        return element(chart.title, WIDTH, HEIGHT, scatter_parts(chart))
    label = f"{chart.title}: {chart.y_label} over {chart.x_label}" if chart.y_label else chart.title
    return element(label, WIDTH, HEIGHT, figure_parts(chart))


def element(label: str, width: float, height: float, parts: Iterable[str]) -> Markup:
    """An SVG element of a size."""
    text = escape(label)
    inside = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{text}">{inside}</svg>')


def series_class(index: int) -> str:
    """The style classes of the series at an index among the names.

    >>> series_class(1), series_class(9)
    ('c1 d0', 'c1 d1')
    """
    return f"c{index % len(COLORS)} d{index // len(COLORS) % len(DASHES)}"


def chart_css() -> str:
    """Return the style sheet of charts, the same in a page and in a file."""
    light = " ".join(f".c{index} {{ --series: {pair[0]}; }}" for index, pair in enumerate(COLORS))
    dark = " ".join(f".c{index} {{ --series: {pair[1]}; }}" for index, pair in enumerate(COLORS))
    dashes = " ".join(f".d{index} .line {{ stroke-dasharray: {dash}; }}" for index, dash in enumerate(DASHES))
    rules = files("skipway.report").joinpath("templates/chart.css").read_text("utf-8")
    return f"{rules}{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n{dashes}\n"


def svg_file(*figures: Figure, title: str = "", note: str = "") -> str:
    """Render figures below each other as the text of an SVG file, light or dark like its viewer.

    Args:
        figures: each is drawn with its title and legend.
        title, note: above and below all of them.
    """
    parts, y = [], 8.0
    for line in wrapped_text(title):
        parts.append(f'<text class="title" x="12" y="{y + 14:.0f}">{escape(line)}</text>')
        y += 18
    for figure in figures:
        parts.append(f'<text class="title" x="12" y="{y + 14:.0f}">{escape(figure.title)}</text>')
        parts.append(f'<g transform="translate(0 {y + 20:.0f})">{"".join(figure_parts(figure))}</g>')
        y += 20 + HEIGHT
        x = 12.0
        for index, name in enumerate(figure.names):
            width = 34 + LETTER * len(name)
            if x + width > WIDTH and x > 12:
                x, y = 12.0, y + 18
            sample = f'<path class="line" d="M{x:.0f} {y + 9:.0f}h20"/>{marker(index, x + 10, y + 9)}'
            parts.append(f'<g class="{series_class(index)}">{sample}</g>')
            parts.append(f'<text x="{x + 26:.0f}" y="{y + 13:.0f}">{escape(name)}</text>')
            x += width + 8
        y += 26 if figure.names else 0
    for line in wrapped_text(note):
        parts.append(f'<text x="12" y="{y + 12:.0f}">{escape(line)}</text>')
        y += 16
    size = f'viewBox="0 0 {WIDTH} {y + 8:.0f}" width="{2 * WIDTH}" height="{2 * y + 16:.0f}"'
    paper = f'<rect class="paper" width="{WIDTH}" height="{y + 8:.0f}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{chart_css()}</style>{paper}{"".join(parts)}</svg>\n'


def wrapped_text(text: str) -> list[str]:
    """Wrap text to the width of a figure."""
    import textwrap

    return textwrap.wrap(text, int((WIDTH - 24) / LETTER))


def figure_parts(figure: Figure) -> Iterator[str]:
    """Bands, axes, lines and markers of a figure."""
    names = figure.names
    labelled = len(names) > FEW_SERIES
    letters = min(LABEL_LETTERS, max(map(len, names), default=0))
    right = WIDTH - RIGHT - (labelled * (letters * LETTER * 0.85 + 12))
    x_axis, y_axis = figure.x_axis(LEFT, right), figure.y_axis(HEIGHT - BOTTOM, TOP)
    yield from band_parts(figure, x_axis)
    yield from grid_parts(figure, x_axis, y_axis)
    for each in figure.series:
        path = path_of(thinned(each.points), x_axis, y_axis)
        if each.style == "faint":
            yield f'<path class="line faint" d="{path}"/>'
        else:
            kind = "line theory" if each.style == "theory" else "line"
            yield f'<g class="{series_class(names.index(each.name))}"><path class="{kind}" d="{path}"/></g>'
    for each in figure.series:
        if each.style == "measured":
            index = names.index(each.name)
            yield f'<g class="{series_class(index)}">{"".join(point_parts(each, index, figure, x_axis, y_axis))}</g>'
    if labelled:
        yield from label_parts(figure, x_axis, y_axis, right + 12, letters)


def grid_parts(figure: Figure, x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    """Grid, ticks and labels of both axes, and the marks."""
    bottom, left, right = HEIGHT - BOTTOM, x_axis.start, x_axis.end
    for value in y_axis.ticks:
        y = y_axis.at(value)
        yield f'<path class="grid" d="M{left} {y:.1f}H{right:.1f}"/>'
        yield f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{format_tick(value, figure.percent)}</text>'
    yield f'<path class="grid" d="M{left} {bottom}H{right:.1f}"/>'
    for x, text, anchor in x_ticks(figure, x_axis):
        yield f'<path class="grid" d="M{x:.1f} {bottom}v4"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{escape(text)}</text>'
    yield f'<text x="{(left + right) / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(figure.x_label)}</text>'
    for mark in figure.marks:
        x = x_axis.at(mark.x)
        anchor, text_x = ("end", x - 4) if x > WIDTH / 2 else ("start", x + 4)
        yield f'<path class="rule" d="M{x:.1f} {TOP}V{bottom}"/>'
        yield f'<text x="{text_x:.1f}" y="{bottom - 6}" text-anchor="{anchor}">{escape(mark.label)}</text>'


def x_ticks(figure: Figure, axis: Axis) -> Iterator[tuple[float, str, str]]:
    """Position, text and anchor: first and last category, the measured values where they are few, or round numbers."""
    if figure.categories:
        count = len(figure.categories)
        letters = int((axis.end - axis.start) / 2 / LETTER) - 1
        yield axis.at(1), clipped(figure.categories[0] or "the model", letters), "start"
        if count > 1:
            yield axis.at(count), clipped(figure.categories[-1], letters), "end"
        return
    measured = sorted({point.x for each in figure.series if each.style != "faint" for point in each.points})
    taken: list[float] = []
    # the largest first, as it is what a study of depth is about
    for value in reversed(axis.ticks if figure.percent_x or len(measured) > MOST_TICKS else measured):
        x = axis.at(value)
        if all(abs(x - other) >= TICK_ROOM for other in taken):
            taken.append(x)
            yield x, format_tick(value, figure.percent_x), "middle"


def band_parts(figure: Figure, axis: Axis) -> Iterator[str]:
    """Shaded stretches, with the first word of each label above them where there is room."""
    free = -math.inf
    for band in sorted(figure.bands, key=lambda band: band.first):
        x, end = axis.at(band.first - 0.5), axis.at(band.last + 0.5)
        yield (
            f'<rect class="band {band.level}" x="{x:.1f}" y="{TOP}" width="{max(end - x, 1.5):.1f}" '
            f'height="{HEIGHT - BOTTOM - TOP}"><title>{escape(band.label)}</title></rect>'
        )
        word = band.label.partition(" ")[0]
        if x >= free:
            yield f'<text class="{band.level}" x="{x:.1f}" y="{TOP - 4}">{escape(word)}</text>'
            free = x + LETTER * (len(word) + 1)


def path_of(points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> str:
    """The path through the finite values, with gaps at the others."""
    steps, pen = [], "M"
    for point in points:
        visible = math.isfinite(point.y) and not (y_axis.log and point.y <= 0)
        if visible:
            steps.append(f"{pen}{x_axis.at(point.x):.1f} {y_axis.at(point.y):.1f}")
        pen = "L" if visible else "M"
    return "".join(steps)


def point_parts(series: Series, index: int, figure: Figure, x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    """Markers with tooltips and error bars; hollow at the edge for values outside the axis."""
    points = thinned(series.points)
    for point in points:
        if math.isnan(point.y):
            continue
        edge = not y_axis.low <= point.y <= y_axis.high
        if len(points) > MOST_TOOLTIPS and not edge:
            continue
        x, y = x_axis.at(point.x), y_axis.at(point.y)
        if math.isfinite(point.low) and math.isfinite(point.high) and point.low < point.high:
            yield f'<path class="spread" d="M{x:.1f} {y_axis.at(point.low):.1f}V{y_axis.at(point.high):.1f}"/>'
        kind = "edge" if edge else "" if len(points) <= MOST_MARKERS else "unseen"
        yield marker(index, x, y, kind, tooltip(series.name, point, figure))


def tooltip(name: str, point: Point, figure: Figure) -> str:
    """Describe a point."""

    def show(value: float) -> str:
        return f"{100 * value:.1f} %" if figure.percent and math.isfinite(value) else format_value(value)

    text = f"{name}, {point.name or f'{format_tick(point.x)} {figure.x_label}'}: {show(point.y)}"
    if not point.count:
        return text
    spread = f", {show(point.low)} to {show(point.high)}" if point.count > 1 else ""
    return f"{text}{spread} ({point.count} seed{'s' * (point.count > 1)})"


def marker(index: int, x: float, y: float, kind: str = "", text: str = "") -> str:
    """A marker of the shape that belongs to a series."""
    shape = (
        f"M{x - 3.2:.1f} {y:.1f}a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0",
        f"M{x - 2.9:.1f} {y - 2.9:.1f}h5.8v5.8h-5.8z",
        f"M{x:.1f} {y - 4:.1f}l4 7h-8z",
        f"M{x:.1f} {y - 4.2:.1f}l4.2 4.2l-4.2 4.2l-4.2 -4.2z",
        f"M{x:.1f} {y + 4:.1f}l4 -7h-8z",
    )[index % 5]
    if not text:
        return f'<path class="marker" d="{shape}"/>'
    where = f'data-x="{x:.1f}" data-y="{y:.1f}"'
    return f'<path class="marker {kind}" {where} d="{shape}"><title>{escape(text)}</title></path>'


def label_parts(figure: Figure, x_axis: Axis, y_axis: Axis, left: float, letters: int) -> Iterator[str]:
    """The name of each series at its right end, moved apart where they would overlap."""
    ends: dict[str, tuple[float, float]] = {}
    for each in figure.series:
        finite = [point for point in each.points if math.isfinite(point.y) and not (y_axis.log and point.y <= 0)]
        if finite and each.style == "measured":
            ends[each.name] = x_axis.at(finite[-1].x), y_axis.at(finite[-1].y)
    top, bottom = TOP + 2.0, HEIGHT - BOTTOM - 2.0
    gap = min(LABEL_GAP, (bottom - top) / max(1, len(ends) - 1))
    names = sorted(ends, key=lambda name: ends[name][1])
    heights: list[float] = []
    for name in names:
        heights.append(max(ends[name][1], heights[-1] + gap if heights else top))
    limit = bottom
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], limit)
        limit = heights[place] - gap
    for name, height in zip(names, heights, strict=True):
        x, y = ends[name]
        group = series_class(figure.names.index(name))
        yield (
            f'<g class="{group}"><path class="leader" d="M{x + 5:.1f} {y:.1f}L{left - 3:.1f} {height:.1f}"/>'
            f'<text class="label" x="{left:.1f}" y="{height + 3.5:.1f}">{escape(clipped(name, letters))}</text></g>'
        )


def bar_parts(chart: Bars) -> tuple[float, float, list[str]]:
    """Width, height and parts of a bar chart."""
    thickness, gap, letters = 10, 8, 17
    left = 12 + LETTER * min(letters, max(map(len, chart.categories)))
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
    left, top = (26 + LETTER * min(NAME_LETTERS, max(map(len, names))) for names in (chart.rows, chart.columns))
    cell = max(LEAST_CELL, (MATRIX_SIDE - left) / len(chart.columns))
    width, height = cell * len(chart.columns), cell * len(chart.rows)
    middle = f'x="{left + width / 2:.0f}" y="13"'
    parts = [
        f'<text class="title" {middle} text-anchor="middle">{escape(chart.column_title)}</text>',
        f'<text class="title" transform="translate(12 {top + height / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(chart.row_title)}</text>",
    ]
    for names, place in (
        (chart.rows, lambda middle: f'x="{left - 6:.1f}" y="{top + middle:.1f}" text-anchor="end"'),
        (chart.columns, lambda middle: f'transform="translate({left + middle:.1f} {top - 6:.1f}) rotate(-90)"'),
    ):
        for number, name in enumerate(names):
            text = f"{escape(clipped(name, NAME_LETTERS))}<title>{escape(name)}</title>"
            parts.append(f"<text {place((number + 0.5) * cell + 4)}>{text}</text>")
    for row, cells in enumerate(chart.cells):
        for column, each in enumerate(cells):
            parts += cell_parts(each, left + column * cell, top + row * cell, cell)
    return left + width, top + height + 2, parts


def cell_parts(shown: HeatCell, x: float, y: float, cell: float) -> Iterator[str]:
    """A cell of a heat map of side `cell`, with what is written in it."""
    opacity = 0.04 if shown.shade == 0 else 0.12 + 0.88 * shown.shade
    yield (
        f'<rect class="cell {shown.kind}" x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}" '
        f'fill-opacity="{opacity:.2f}"><title>{escape(shown.words)}</title></rect>'
    )
    if shown.text and cell >= COUNT_CELL:
        kind = "on" if shown.shade > 0.5 else "in"
        both = bool(shown.below) and cell >= PERCENT_CELL
        middle_x, middle_y = x + (cell - 1) / 2, y + cell / 2 + (0 if both else 4)
        below = f'<tspan class="small" x="{middle_x:.1f}" dy="13">{escape(shown.below)}</tspan>' if both else ""
        yield (
            f'<text class="{kind}" x="{middle_x:.1f}" y="{middle_y:.1f}" text-anchor="middle">'
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


def clipped(text: str, letters: int) -> str:
    """Shorten text to at most so many letters.

    >>> clipped("abcdefgh", 4)
    'abc…'
    """
    return text if len(text) <= letters else f"{text[: max(1, letters - 1)]}…"
