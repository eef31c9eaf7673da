"""Charts as SVG, inline in a page, which draws the legend outside the picture, or as files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files

from markupsafe import Markup

from skipway.report.chart import Axis, Bars, Figure, Heatmap, Point, Scatter, Series, format_tick, format_value, thinned
from skipway.report.svg_areas import bar_parts, matrix_parts, scatter_parts
from skipway.report.svg_style import (
    BOLD_LETTER,
    COLORS,
    DASHES,
    HEIGHT,
    LETTER,
    WIDTH,
    clipped,
    name_text,
    series_class,
    text_width,
    wrapped_text,
)

__all__ = ["Chart", "chart_css", "draw", "draw_each", "is_labelled", "marker", "svg_file"]

LEFT, RIGHT, TOP, BOTTOM = 48, 14, 16, 38
MOST_MARKERS, MOST_TOOLTIPS = 60, 250
"""Points up to which a series shows a marker for each, and up to which each has a tooltip."""
MOST_TICKS, TICK_ROOM = 12, 30.0
FEW_SERIES, LABEL_LETTERS, LABEL_GAP = 4, 24, 13.0
"""Series beyond which each is labelled at its end, letters of such a label, and the distance of two."""
MOST_TOGETHER, PANEL_COLUMNS, PANEL_HEIGHT, PANEL_POINTS = 8, 4, 84, 40
"""Series beyond which each is drawn alone, too, and of these pictures the columns, the height and the points."""
Chart = Figure | Bars | Heatmap | Scatter


def draw(chart: Chart) -> Markup:
    """A chart as an SVG element without legend; empty for a figure without a finite value."""
    if isinstance(chart, Bars):
        return element(chart.title, *bar_parts(chart))
    if isinstance(chart, Heatmap):
        return element(chart.title, *matrix_parts(chart))
    if isinstance(chart, Scatter):
        return element(chart.title, WIDTH, HEIGHT, scatter_parts(chart))
    label = f"{chart.title}: {chart.y_label} over {chart.x_label}" if chart.y_label else chart.title
    # names that can be pressed are no part of one picture
    return element(label, WIDTH, HEIGHT, figure_parts(chart), "group" if is_labelled(chart) else "img")


def draw_each(chart: Chart) -> Markup:
    """Small pictures of a figure, in each of them one series in front of all others; empty for up to 8 series."""
    if not isinstance(chart, Figure) or len(chart.names) <= MOST_TOGETHER:
        return Markup()
    rows = math.ceil(len(chart.names) / PANEL_COLUMNS)
    return element(f"{chart.title}: each series alone", WIDTH, rows * PANEL_HEIGHT + 18, panel_parts(chart))


def is_labelled(figure: Figure) -> bool:
    """Whether each series is labelled at its end, and needs no legend."""
    return len(figure.names) > FEW_SERIES


def element(label: str, width: float, height: float, parts: Iterable[str], role: str = "img") -> Markup:
    """An SVG element of a size."""
    text = escape(label)
    inside = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="{role}" aria-label="{text}">{inside}</svg>')


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

    def write(text: str, kind: str, height: float) -> None:
        nonlocal y
        for line in wrapped_text(text, BOLD_LETTER if kind == "title" else LETTER):
            parts.append(f'<text class="{kind}" x="12" y="{y + height - 4:.0f}">{escape(line)}</text>')
            y += height

    write(title, "title", 18)
    for figure in figures:
        write(figure.title, "title", 18)
        write(figure.subtitle, "soft", 16)
        parts.append(f'<g transform="translate(0 {y:.0f})">{"".join(figure_parts(figure))}</g>')
        y += HEIGHT
        x = 12.0
        names = [] if is_labelled(figure) else figure.names
        for index, name in enumerate(names):
            shown = clipped(name, int((WIDTH - 46) / LETTER))
            width = 34 + LETTER * text_width(shown)
            if x + width > WIDTH and x > 12:
                x, y = 12.0, y + 18
            sample = f'<path class="line" d="M{x:.0f} {y + 9:.0f}h20"/>{marker(index, x + 10, y + 9)}'
            parts.append(f'<g class="{series_class(index)}">{sample}</g>')
            parts.append(f'<text x="{x + 26:.0f}" y="{y + 13:.0f}">{name_text(shown)}</text>')
            x += width + 8
        y += 26 if names else 0
    write(note, "soft", 16)
    size = f'viewBox="0 0 {WIDTH} {y + 8:.0f}" width="{2 * WIDTH}" height="{2 * y + 16:.0f}"'
    paper = f'<rect class="paper" width="{WIDTH}" height="{y + 8:.0f}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{chart_css()}</style>{paper}{"".join(parts)}</svg>\n'


def figure_parts(figure: Figure) -> Iterator[str]:
    """Bands, axes, lines and markers of a figure."""
    names = figure.names
    labelled = is_labelled(figure)
    letters = min(LABEL_LETTERS, max(map(text_width, names), default=0))
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
    rounded = len(measured) > MOST_TICKS or any(value != float(f"{value:.2g}") for value in measured if value % 1)
    for value in reversed(axis.ticks if figure.percent_x or rounded else measured):
        x = axis.at(value)
        if all(abs(x - other) >= TICK_ROOM for other in taken):
            taken.append(x)
            text = format_tick(value, figure.percent_x)
            yield x, text, "end" if x + LETTER * len(text) / 2 > WIDTH else "middle"


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
        if finite and each.style != "faint":
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
            f'<text class="label" x="{left:.1f}" y="{height + 3.5:.1f}" tabindex="0" role="button" aria-pressed="true" '
            f'data-kind="{group}">{name_text(clipped(name, letters))}<title>{escape(name)}</title></text></g>'
        )


def panel_parts(figure: Figure) -> Iterator[str]:
    """Small pictures on the axes of the figure, in rows, with the ends of the vertical axis at the first of each."""
    left, width = 34.0, (WIDTH - 34.0 - 8.0) / PANEL_COLUMNS
    for index, name in enumerate(figure.names):
        row, column = divmod(index, PANEL_COLUMNS)
        start, top = left + column * width, row * PANEL_HEIGHT
        bottom, end = top + PANEL_HEIGHT - 8.0, start + width - 8.0
        x_axis, y_axis = figure.x_axis(start, end), figure.y_axis(bottom, top + 18.0)
        for value in (ticks := y_axis.ticks)[:: max(1, len(ticks) - 1)]:
            y = y_axis.at(value)
            yield f'<path class="grid" d="M{start:.1f} {y:.1f}H{end:.1f}"/>'
            text = format_tick(value, figure.percent)
            yield f'<text class="small" x="{left - 4}" y="{y + 3:.1f}" text-anchor="end">{text}</text>' * (not column)
        own, others = [], []
        for each in figure.series:
            step = max(1, math.ceil(len(each.points) / PANEL_POINTS))
            path = path_of([*each.points[:-1:step], *each.points[-1:]], x_axis, y_axis)
            (own if each.name == name else others).append(path)
        yield f'<path class="line faint" d="{"".join(others)}"/>'
        yield f'<g class="{series_class(index)}"><path class="line" d="{"".join(own)}"/>'
        yield f'<text class="label" x="{start:.1f}" y="{top + 12:.1f}">{name_text(clipped(name, 14))}'
        yield f"<title>{escape(name)}</title></text></g>"
    bottom = math.ceil(len(figure.names) / PANEL_COLUMNS) * PANEL_HEIGHT + 8
    yield f'<text class="small" x="{left:.0f}" y="{bottom}">{escape(figure.x_label)} from left to right</text>'
