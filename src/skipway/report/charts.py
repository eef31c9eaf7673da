"""Charts as inline SVG: lines over an axis, bars; small enough to be read on a phone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Axis", "Mark", "Series", "bars", "chart", "clean", "figure"]

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 12, 34
TICKS = 5
# a line of more points is thinned; up to so many points each has a tooltip
MOST_POINTS, DOTS = 400, 120
# beyond this ratio of largest to smallest a size is shown on a logarithmic axis
WIDE = 30.0
LETTER = 6.6


@dataclass(frozen=True)
class Series:
    """A line: its class in the style sheet, what it shows, its points (x, y); what is not finite interrupts it.

    Args:
        names: what the tooltip of each point calls it; empty: its x.
        dots: whether each point is drawn.
    """

    kind: str
    title: str
    points: Sequence[tuple[float, float]]
    names: Sequence[str] = ()
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line with a word at it."""

    x: float
    text: str


@dataclass(frozen=True)
class Axis:
    """From `low` at `start` to `high` at `end`, in the picture's units, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value stands; one outside at the edge.

        >>> Axis(1, 100, 0, 10, log=True).at(10)
        5.0
        """
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """What is marked: multiples of 1, 2 or 5 times a power of ten, or powers of ten.

        >>> Axis(0, 1, 0, 10).ticks
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        """
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            if last - first < 1:  # a narrow axis needs more than its power of ten
                some = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
                return [value for value in some if self.low <= value <= self.high]
            step = max(1, math.ceil((last - first + 1) / (TICKS + 1)))
            return [10.0**power for power in range(first, last + 1, step)]
        rough = (self.high - self.low) / TICKS
        unit = 10 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]


def axis_for(values: Iterable[float], start: float, end: float, *, log: bool | None, whole: bool = False) -> Axis:
    """An axis on which all finite values lie: from 0, or logarithmic where that is asked for or they differ widely.

    Args:
        log: None leaves it to the values.
        whole: for shares: up to 1.
    """
    known = [value for value in values if math.isfinite(value)]
    above = [value for value in known if value > 0]
    if log is None:
        log = len(above) == len(known) > 0 and max(above) > WIDE * min(above)
    if log:
        low, high = (min(above), max(above)) if above else (0.1, 10.0)
        missing = math.sqrt(max(1.0, 20.0 / (high / low)))
        room = (high / low * missing**2) ** 0.05
        return Axis(low / missing / room, high * missing * room, start, end, log=True)
    low, high = min([0.0, *known]), max([1.0] if whole else known or [1.0])
    if high <= low:
        high = low + 1.0
    return Axis(low, high if whole else high + 0.05 * (high - low), start, end)


def chart(
    title: str,
    series: Sequence[Series],
    *,
    across: str,
    log: bool | None = None,
    whole: bool = False,
    span: tuple[float, float] | None = None,
    ends: Sequence[str] = (),
    marks: Sequence[Mark] = (),
    note: str = "",
) -> str:
    """A figure of lines with its title and legend.

    Args:
        across: what the horizontal axis is.
        log: whether the vertical axis is logarithmic; None leaves it to the values.
        whole: the values are shares, shown in per cent from 0 to 100.
        span: of the horizontal axis; None takes that of the points.
        ends: names at both ends of the horizontal axis in place of numbers.
        note: a line below.
    """
    series = [each for each in series if any(math.isfinite(y) for _, y in each.points)]
    if not series:
        return ""
    xs = [x for each in series for x, _ in each.points]
    low, high = span or (min(xs), max(xs))
    horizontal = Axis(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)
    vertical = axis_for((y for each in series for _, y in each.points), HEIGHT - BOTTOM, TOP, log=log, whole=whole)
    inside = [*grid(vertical, whole), *foot(horizontal, across, ends)]
    for mark in marks:
        x = horizontal.at(mark.x)
        end = x > WIDTH / 2
        inside.append(f'<path class="mark" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        place, anchor = (x - 4, "end") if end else (x + 4, "start")
        text = f'<text x="{place:.1f}" y="{HEIGHT - BOTTOM - 6}" text-anchor="{anchor}">{escape(mark.text)}</text>'
        inside.append(text)
    for each in series:
        inside.append(f'<path class="line {each.kind}" d="{path_of(thinned(each.points), horizontal, vertical)}"/>')
    for each in series:
        inside.extend(dots(each, horizontal, vertical, whole))
    keys = list(dict.fromkeys((each.kind, each.title) for each in series))
    return figure(title, f"{title} over {across}", inside, keys=keys, note=note)


def figure(
    title: str,
    label: str,
    inside: Iterable[str],
    *,
    keys: Sequence[tuple[str, str]] = (),
    size: tuple[float, float] = (WIDTH, HEIGHT),
    note: str = "",
) -> str:
    """A picture with its title, legend and a note."""
    legend = "".join(f'<span class="key {kind}">{escape(text)}</span>' for kind, text in keys)
    below = f'<p class="soft">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{legend}</figcaption>'
        f'<svg viewBox="0 0 {size[0]:.0f} {size[1]:.0f}" role="img" aria-label="{escape(label)}">'
        f"{''.join(inside)}</svg>{below}</figure>"
    )


def grid(axis: Axis, whole: bool) -> Iterator[str]:
    """The lines and numbers of the vertical axis."""
    for value in axis.ticks:
        y = axis.at(value)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        text = f"{100 * value:g} %" if whole else clean(value)
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'


def foot(axis: Axis, across: str, ends: Sequence[str]) -> Iterator[str]:
    """The numbers of the horizontal axis, or the names at its ends, and what it is."""
    y = HEIGHT - BOTTOM + 15
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<path class="grid" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
    if ends:
        room = int((WIDTH - LEFT) / 2 / LETTER) - 2
        for x, anchor, name in ((LEFT, "start", ends[0]), (WIDTH - RIGHT, "end", ends[-1])):
            yield f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(cut(name, room))}</text>'
    else:
        for value in axis.ticks:
            yield f'<text x="{axis.at(value):.1f}" y="{y}" text-anchor="middle">{clean(value)}</text>'
    yield f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(across)}</text>'


def dots(series: Series, horizontal: Axis, vertical: Axis, whole: bool) -> Iterator[str]:
    """A point with a tooltip at each value, unseen unless asked for; of many, only those outside the axis, hollow."""
    many = len(series.points) > DOTS
    for place, (x, y) in enumerate(series.points):
        if math.isnan(y):
            continue
        edge = " edge" if not (vertical.low <= y <= vertical.high) else ""
        if many and not edge:
            continue
        shown = series.dots or edge or len(series.points) == 1
        name = series.names[place] if series.names else clean(x)
        value = f"{100 * y:.2f} %" if whole else clean(y)
        text = f"{name}: {series.title} {value}"
        kind = f"{series.kind}{edge}{'' if shown else ' unseen'}"
        yield (
            f'<circle class="dot {kind}" cx="{horizontal.at(x):.1f}" '
            f'cy="{vertical.at(y):.1f}" r="{3 if shown else 5}"><title>{escape(text)}</title></circle>'
        )


def path_of(points: Sequence[tuple[float, float]], horizontal: Axis, vertical: Axis) -> str:
    """The path through the finite values, with gaps at the others."""
    steps, pen = [], "M"
    for x, y in points:
        drawn = math.isfinite(y) and not (vertical.log and y <= 0)
        if drawn:
            steps.append(f"{pen}{horizontal.at(x):.1f} {vertical.at(y):.1f}")
        pen = "L" if drawn else "M"
    return "".join(steps)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` points: of each stretch the lowest and the highest, so that no peak is lost.

    >>> len(thinned([(float(x), 0.0) for x in range(10_000)])) <= MOST_POINTS
    True
    """
    if len(points) <= MOST_POINTS:
        return list(points)
    length = math.ceil(len(points) / (MOST_POINTS // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), length):
        part = points[start : start + length]
        fine = [point for point in part if math.isfinite(point[1])] or part[:1]
        ends = {min(fine, key=lambda point: point[1]), max(fine, key=lambda point: point[1])}
        kept += sorted(ends, key=lambda point: point[0])
    return kept


def bars(title: str, rows: Sequence[tuple[str, Sequence[float]]], keys: Sequence[tuple[str, str]]) -> str:
    """Horizontal bars: a name and a value of each kind per row."""
    thick, gap = 9, 7
    left = 12 + LETTER * min(17, max(len(name) for name, _ in rows))
    most = max([value for _, values in rows for value in values] + [1.0])
    axis = Axis(0.0, most, left, WIDTH - 46)
    inside, y = [], 6.0
    for name, values in rows:
        middle = y + thick * len(values) / 2 + 4
        shown = f"{escape(cut(name, 17))}<title>{escape(name)}</title>"
        inside.append(f'<text x="{left - 6:.1f}" y="{middle:.1f}" text-anchor="end">{shown}</text>')
        for (kind, what), value in zip(keys, values, strict=True):
            end = axis.at(value)
            inside.append(
                f'<rect class="bar {kind}" x="{left:.1f}" y="{y:.1f}" width="{end - left:.1f}" height="{thick - 1}">'
                f"<title>{escape(f'{name}: {value:,.0f} {what}')}</title></rect>"
            )
            inside.append(f'<text class="small" x="{end + 4:.1f}" y="{y + 8:.1f}">{value:,.0f}</text>')
            y += thick
        y += gap
    return figure(title, title, inside, keys=keys, size=(WIDTH, y))


def cut(text: str, letters: int) -> str:
    """A text that is not longer than so many letters.

    >>> cut("abcdefgh", 4)
    'abc…'
    """
    return text if len(text) <= letters else f"{text[: max(1, letters - 1)]}…"


def clean(value: float) -> str:
    """A number as people write it.

    >>> clean(1000.0), clean(1e-05), clean(0.1), clean(12345.6)
    ('1000', '1e-5', '0.1', '1.23e+4')
    """
    text = f"{value:.3g}" if abs(value) != 1000 else f"{value:.0f}"
    mantissa, letter, exponent = text.partition("e")
    return f"{mantissa}e{'+' if exponent[0] == '+' else '-'}{int(exponent[1:])}" if letter else text
