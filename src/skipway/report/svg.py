"""A figure as SVG: in a page, where its legend stands outside, and as a file of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from html import escape

from skipway.report.charts import Axis, clean
from skipway.report.figure import Figure, Line, Point, number

__all__ = ["COLOURS", "picture", "svg_file"]

WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 22, 12, 36
# letters of an axis need so much room
ROOM = 30.0
# a logarithmic axis spans no more decades than this, what lies outside is drawn at the edge
MOST_DECADES = 20
COLOURS = (
    ("#0072b2", "#56b4e9"),
    ("#c65300", "#f0975a"),
    ("#00805f", "#3cc79c"),
    ("#a8528a", "#e39cc9"),
    ("#8a6d00", "#e6c14e"),
    ("#b2182b", "#ff8b94"),
    ("#5048b8", "#a9a4f5"),
    ("#007a87", "#5fd0da"),
    ("#5a7d00", "#b5d35a"),
    ("#5c6166", "#a0a6ab"),
)
"""In light and in dark surroundings; each has a shape of its own as well."""
RULES = """
.line { fill: none; stroke: var(--kind); stroke-width: 1.8; stroke-linejoin: round; }
.line.theory { stroke-dasharray: 5 4; stroke-width: 1.3; }
.spread { stroke: var(--kind); stroke-width: 1.2; opacity: .65; }
.mark { fill: var(--kind); stroke: var(--paper); stroke-width: 1; }
.mark.edge { fill: var(--paper); stroke: var(--kind); }
"""


def colour_rules() -> str:
    """The style of every kind of line, light and dark."""
    light = " ".join(f".k{place} {{ --kind: {pair[0]}; }}" for place, pair in enumerate(COLOURS))
    dark = " ".join(f".k{place} {{ --kind: {pair[1]}; }}" for place, pair in enumerate(COLOURS))
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n{RULES}"


def kinds_of(figure: Figure) -> dict[str, str]:
    """The class of each name; a closed form has that of what it is about.

    >>> kinds_of(Figure(name="", title="", across="", up="", lines=(Line("a", (), True), Line("a", ()), Line("b", ()))))
    {'a': 'k0', 'b': 'k1'}
    """
    names = dict.fromkeys(line.name for line in figure.lines)
    return {name: f"k{place % len(COLOURS)}" for place, name in enumerate(names)}


def picture(figure: Figure) -> str:
    """The figure as an SVG element without a legend."""
    label = escape(f"{figure.title}: {figure.up} over {figure.across}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(inside(figure))}</svg>'


def svg_file(figure: Figure) -> str:
    """The figure as a file: with title, legend and style, light or dark as the viewer is."""
    kinds = kinds_of(figure)
    rows = math.ceil(len(kinds) / 2)
    height = HEIGHT + 30 + 17 * rows + 8
    legend = []
    for place, (name, kind) in enumerate(kinds.items()):
        x, y = LEFT + (place % 2) * 180, HEIGHT + 46 + 17 * (place // 2)
        legend.append(f'<g class="{kind}"><path class="line" d="M{x} {y - 4}h16"/>{mark(place, x + 8, y - 4, "")}</g>')
        legend.append(f'<text x="{x + 22}" y="{y}">{escape(name)}</text>')
    style = (
        "svg { color-scheme: light dark; --paper: #fff; --ink: #1d1f21; --soft: #5c6166; --rule: #dfe3e6; }\n"
        "@media (prefers-color-scheme: dark) { svg { --paper: #16181a; --ink: #e7e9ea; --soft: #a0a6ab; "
        "--rule: #33383c; } }\n"
        'text { fill: var(--soft); font: 12px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }\n'
        ".title { fill: var(--ink); font-weight: 600; } .grid { stroke: var(--rule); } .paper { fill: var(--paper); }\n"
        + colour_rules()
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{2 * WIDTH}" '
        f'height="{2 * height}"><style>{style}</style><rect class="paper" width="{WIDTH}" height="{height}"/>'
        f'<text class="title" x="{LEFT - 34}" y="20">{escape(figure.title)}</text>'
        f'<g transform="translate(0 26)">{"".join(inside(figure))}</g>{"".join(legend)}</svg>\n'
    )


def inside(figure: Figure) -> Iterator[str]:
    """Axes, lines and marks."""
    points = [point for line in figure.lines for point in line.points]
    across = across_axis([point.x for point in points], figure.wide)
    up = up_axis([value for point in points for value in (point.y, point.low, point.high)], figure)
    yield from frame(figure, across, up, sorted({point.x for point in points}))
    kinds = kinds_of(figure)
    for line in figure.lines:
        kind = "line theory" if line.theory else "line"
        yield f'<g class="{kinds[line.name]}"><path class="{kind}" d="{path(line, across, up)}"/></g>'
    for line in figure.lines:
        if not line.theory:
            place = list(kinds).index(line.name)
            yield f'<g class="{kinds[line.name]}">{"".join(marks(line, place, across, up, figure))}</g>'


def across_axis(values: list[float], wide: bool) -> Axis:
    """From the smallest to the largest value with some room."""
    low, high = (min(values), max(values)) if values else (1.0, 10.0)
    if wide and low > 0:
        room = max(high / low, 2.0) ** 0.04
        return Axis(low / room, high * room, LEFT, WIDTH - RIGHT, log=True)
    room = 0.04 * (high - low or 1.0)
    return Axis(low - room, high + room, LEFT, WIDTH - RIGHT)


def up_axis(values: list[float], figure: Figure) -> Axis:
    """From 0 or the smallest value; shares end at 1 at most; a logarithmic axis spans so many decades at most."""
    finite = [value for value in values if math.isfinite(value)]
    if figure.tall:
        above = [value for value in finite if value > 0] or [1.0]
        high = max(above)
        low = max(min(above), high / 10.0**MOST_DECADES)
        room = max(high / low, 4.0) ** 0.05
        return Axis(low / room, high * room, HEIGHT - BOTTOM, TOP, log=True)
    low, high = min([0.0, *finite]), max(finite, default=1.0)
    if high <= low:
        high = low + 1.0
    high = min(1.0, 1.05 * high) if figure.share else high + 0.05 * (high - low)
    return Axis(low - 0.03 * (high - low) * (low < 0), high, HEIGHT - BOTTOM, TOP)


def frame(figure: Figure, across: Axis, up: Axis, places: list[float]) -> Iterator[str]:
    """Grid, numbers and what the axes are."""
    for value in up.ticks:
        y = up.at(value)
        text = f"{100 * value:g} %" if figure.share else plain(value)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    bottom = HEIGHT - BOTTOM
    yield f'<path class="grid" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>'
    # the depths that were measured, where there is room for them, the largest first
    taken: list[float] = []
    for value in reversed(places if len(places) <= 12 else across.ticks):
        x = across.at(value)
        if all(abs(x - other) >= ROOM for other in taken):
            taken.append(x)
            yield f'<path class="grid" d="M{x:.1f} {bottom}v4"/>'
            yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{plain(value)}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(figure.across)}</text>'


def plain(value: float) -> str:
    """A depth as people write it.

    >>> plain(10000.0), plain(0.01), plain(1e9)
    ('10,000', '0.01', '1e+9')
    """
    return f"{value:,.0f}" if 1 <= abs(value) < 1e6 and float(value).is_integer() else clean(value)


def path(line: Line, across: Axis, up: Axis) -> str:
    """The path through the finite values, with gaps at the others."""
    steps, pen = [], "M"
    for point in line.points:
        drawn = math.isfinite(point.y) and not (up.log and point.y <= 0)
        if drawn:
            steps.append(f"{pen}{across.at(point.x):.1f} {up.at(point.y):.1f}")
        pen = "L" if drawn else "M"
    return "".join(steps)


def marks(line: Line, place: int, across: Axis, up: Axis, figure: Figure) -> Iterable[str]:
    """A mark at each value with the range of the seeds, hollow at the edge where it lies outside."""
    for point in line.points:
        if math.isnan(point.y):
            continue
        x, y = across.at(point.x), up.at(point.y) if not (up.log and point.y <= 0) else up.start
        if math.isfinite(point.low) and math.isfinite(point.high) and point.low < point.high:
            low, high = (up.at(max(value, up.low)) for value in (point.low, point.high))
            yield f'<path class="spread" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
        told = escape(f"{line.name}, {plain(point.x)} {figure.across}: {reading(point, figure)}")
        edge = "" if up.low <= point.y <= up.high else " edge"
        yield mark(place, x, y, edge, told)


def reading(point: Point, figure: Figure) -> str:
    """A point in words."""

    def show(value: float) -> str:
        return f"{100 * value:.1f} %" if figure.share and math.isfinite(value) else number(value)

    if point.seeds == 1:
        return f"{show(point.y)} (1 seed)"
    return f"{show(point.y)}, {show(point.low)} to {show(point.high)} ({point.seeds} seeds)"


def mark(place: int, x: float, y: float, edge: str, told: str = "") -> str:
    """A mark of the shape that belongs to a line's number."""
    shape = (
        f"M{x - 3.4:.1f} {y:.1f}a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0",
        f"M{x - 3:.1f} {y - 3:.1f}h6v6h-6z",
        f"M{x:.1f} {y - 4:.1f}l4 7h-8z",
        f"M{x:.1f} {y - 4.2:.1f}l4.2 4.2l-4.2 4.2l-4.2 -4.2z",
    )[place % 4]
    where = f' data-x="{x:.1f}" data-y="{y:.1f}"' if told else ""
    title = f"<title>{told}</title>" if told else ""
    return f'<path class="mark{edge}"{where} d="{shape}">{title}</path>'
