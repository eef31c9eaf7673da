"""Charts as data: lines over an axis, bars, heat maps; `svg` and `pyplot` draw them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal, NamedTuple

__all__ = [
    "Axis",
    "Band",
    "Bars",
    "Figure",
    "HeatCell",
    "Heatmap",
    "Mark",
    "Point",
    "Scatter",
    "Series",
    "format_tick",
    "format_value",
    "thinned",
]

Style = Literal["measured", "theory", "faint"]
TICKS = 5
MOST_POINTS = 400
"""Lines with more points are thinned."""
LEAST_RATIO, WIDE_RATIO, MOST_DECADES = 20.0, 30.0, 20
"""A logarithmic axis spans at least this ratio, and at most so many decades; an axis of unspecified scale is
logarithmic if its largest value exceeds its smallest by more than `WIDE_RATIO`."""


@dataclass(frozen=True)
class Point:
    """A value y at x.

    Args:
        x, y: the position; y may be infinite or NaN (not measured).
        low, high: ends of the error bar; NaN for none.
        count: number of values of which y is the mean; 0 where it is no mean.
        name: of x, as the tooltip shows it; empty for the number.
    """

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    count: int = 0
    name: str = ""


@dataclass(frozen=True)
class Series:
    """A line of a figure. Series of one name share their colour.

    Args:
        name: in legend and tooltips.
        points: by increasing x.
        style: "measured" with a marker at each point, "theory" thin and dashed, "faint" grey and without markers.
    """

    name: str
    points: tuple[Point, ...]
    style: Style = "measured"

    @classmethod
    def of(
        cls,
        name: str,
        values: Iterable[tuple[float, float]],
        style: Style = "measured",
    ) -> Series:
        """A series through exact values (x, y)."""
        return cls(name, tuple(Point(x, y) for x, y in values), style)


@dataclass(frozen=True)
class Mark:
    """A vertical line at x with a label."""

    x: float
    label: str


@dataclass(frozen=True)
class Band:
    """A shaded stretch of the horizontal axis, `first` and `last` included, with the level and label of a finding."""

    first: float
    last: float
    level: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Lines over an axis.

    Args:
        name: of its file.
        title: what the figure shows.
        x_label, y_label: of the axes.
        series: what is drawn, in order.
        log_x, log_y: whether an axis is logarithmic; None leaves y to the values.
        percent, percent_x: the values, or the positions along x, are fractions, shown in per cent.
        span: of the horizontal axis; None: that of the points.
        categories: names of x = 1, 2, … in place of numbers.
        marks, bands: what is marked along the horizontal axis.
        note: a sentence below.
    """

    title: str
    x_label: str
    y_label: str = ""
    series: tuple[Series, ...]
    name: str = ""
    log_x: bool = False
    log_y: bool | None = False
    percent: bool = False
    percent_x: bool = False
    span: tuple[float, float] | None = None
    categories: tuple[str, ...] = ()
    marks: tuple[Mark, ...] = ()
    bands: tuple[Band, ...] = ()
    note: str = ""

    @property
    def names(self) -> list[str]:
        """The names of the coloured series, each once; its position decides colour, dashes and marker."""
        return list(dict.fromkeys(series.name for series in self.series if series.style != "faint"))

    @property
    def subtitle(self) -> str:
        """What the vertical axis shows, where the title does not say it."""
        return "" if self.y_label.lower() in self.title.lower() else self.y_label

    @property
    def drawn(self) -> bool:
        """Whether there is a finite value to draw."""
        return any(math.isfinite(point.y) for series in self.series for point in series.points)

    @property
    def outside(self) -> set[str]:
        """The sides of the vertical axis, "below" and "above", at which hollow markers stand for values outside."""
        axis = self.y_axis(1.0, 0.0)
        values = [point.y for series in self.series if series.style == "measured" for point in series.points]
        sides = {
            "below": any(value < axis.low for value in values),
            "above": any(value > axis.high for value in values),
        }
        return {side for side, holds in sides.items() if holds}

    def x_axis(self, start: float, end: float) -> Axis:
        """The horizontal axis from `start` to `end`."""
        values = [point.x for series in self.series for point in series.points] or [1.0, 10.0]
        low, high = self.span or (min(values), max(values))
        if self.log_x and low > 0:
            room = max(high / low, 2.0) ** 0.04
            return Axis(low / room, high * room, start, end, log=True)
        room = 0.0 if self.span else 0.04 * (high - low or 1.0)
        return Axis(low - room, max(high + room, low - room + 1e-9), start, end)

    def y_axis(self, start: float, end: float) -> Axis:
        """The vertical axis from `start` to `end`: from 0, or logarithmic around all positive values."""
        every = (value for s in self.series for p in s.points for value in (p.y, p.low, p.high))
        finite = [value for value in every if math.isfinite(value)]
        positive = [value for value in finite if value > 0]
        log = self.log_y
        if log is None:
            log = len(positive) == len(finite) > 0 and max(positive) > WIDE_RATIO * min(positive)
        if log:
            low, high = (min(positive), max(positive)) if positive else (0.1, 10.0)
            low = max(low, high / 10.0**MOST_DECADES)
            missing = math.sqrt(max(1.0, LEAST_RATIO / (high / low)))
            room = (high / low * missing**2) ** 0.05
            return Axis(low / missing / room, high * missing * room, start, end, log=True)
        low, high = min([0.0, *finite]), max(finite, default=1.0)
        high = low + 1.0 if high <= low else high + 0.05 * (high - low)
        return Axis(low - 0.03 * (high - low) * (low < 0), min(high, 1.0) if self.percent else high, start, end)


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Horizontal bars: a value of each series for each category.

    Args:
        title: what the bars show.
        categories: from top to bottom.
        series: name and values, one for each category.
    """

    title: str
    categories: tuple[str, ...]
    series: tuple[tuple[str, tuple[float, ...]], ...]
    name: str = ""
    subtitle: str = ""
    note: str = ""

    @property
    def names(self) -> list[str]:
        """The names of the series."""
        return [name for name, _ in self.series]


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Points on a plane, in coloured groups, without axes.

    Args:
        title: what the points are.
        groups: name and points: x, y, and what a point says when it is pointed at; one that says something is larger.
    """

    title: str
    groups: tuple[tuple[str, tuple[tuple[float, float, str], ...]], ...]
    name: str = ""
    subtitle: str = ""
    note: str = ""

    @property
    def names(self) -> list[str]:
        """The names of the groups."""
        return [name for name, _ in self.groups]


class HeatCell(NamedTuple):
    """A cell of a heat map.

    Args:
        shade: from 0, paper, to 1, full colour.
        words: what it says when it is pointed at.
        kind: style: "hit" or "miss".
        text: written in it where it is large enough.
        below: written under the text where there is room for that too.
    """

    shade: float
    words: str
    kind: str = "hit"
    text: str = ""
    below: str = ""


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """A matrix of shaded cells.

    Args:
        title: what the matrix shows.
        rows: names of the rows, from the top.
        columns: names of the columns, from the left.
        row_title: what a row is.
        column_title: what a column is.
        cells: by row and column.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_title: str
    column_title: str
    cells: tuple[tuple[HeatCell, ...], ...]
    name: str = ""
    subtitle: str = ""
    note: str = ""


@dataclass(frozen=True)
class Axis:
    """A scale from `low`, drawn at `start`, to `high`, drawn at `end`; linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The position of a value; values outside are drawn at the nearer end.

        >>> Axis(1, 100, 0, 10, log=True).at(10)
        5.0
        """
        value = min(max(value, self.low), self.high)
        if self.log:
            fraction = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            fraction = (value - self.low) / (self.high - self.low)
        return self.start + fraction * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten; powers of ten on a logarithmic axis.

        >>> Axis(0, 1, 0, 10).ticks
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        """
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            if last - first < 1:  # a narrow axis needs more than its power of ten
                every = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
                return [value for value in every if self.low <= value <= self.high]
            step = max(1, math.ceil((last - first + 1) / (TICKS + 1)))
            return [10.0**power for power in range(first, last + 1, step)]
        rough = (self.high - self.low) / TICKS
        unit = 10 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(count * step, 12) for count in range(first, last + 1)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """Reduce points to at most `MOST_POINTS`: of each interval lowest and highest, so that no peak is lost, and the
    first of each kind that is not finite, where a line has a gap.

    >>> len(thinned([Point(float(x), 0.0) for x in range(10_000)])) <= MOST_POINTS
    True
    """
    if len(points) <= MOST_POINTS:
        return list(points)
    kinds = len({str(point.y) for point in points if not math.isfinite(point.y)})
    length = math.ceil(len(points) / (MOST_POINTS // (2 + kinds)))
    kept: list[Point] = []
    for start in range(0, len(points), length):
        stretch = list(enumerate(points[start : start + length]))
        finite = [(point.y, place) for place, point in stretch if math.isfinite(point.y)]
        others = {str(point.y): place for place, point in reversed(stretch) if not math.isfinite(point.y)}
        ends = {end(finite, key=itemgetter(0))[1] for end in (min, max)} if finite else set()
        kept += [points[start + place] for place in sorted(ends | {*others.values()})]
    return kept


def format_tick(value: float, percent: bool = False) -> str:
    """Format a number on an axis.

    >>> format_tick(10000.0), format_tick(0.01), format_tick(1e9), format_tick(2e-4), format_tick(0.2, percent=True)
    ('10,000', '0.01', '1e9', '2e-4', '20 %')
    """
    if percent:
        return f"{100 * value:g} %"
    if 1 <= abs(value) < 1e6 and float(value).is_integer():
        return f"{value:,.0f}"
    text = f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.2e}".replace(".00e", "e").replace("0e", "e")
    return text.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def format_value(value: float) -> str:
    """Format a number with three significant digits, without an exponent if it is readable.

    >>> format_value(0.92), format_value(12345.0), format_value(1e-9), format_value(0.0)
    ('0.920', '12,345', '1e-9', '0')
    """
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "not finite"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")
