"""What a figure shows, apart from how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

__all__ = ["Figure", "Line", "Point", "Row", "Sample", "Value", "best_rows", "grouped", "lines_over", "number"]

Value = str | int | float | bool | None
"""What a cell of a table holds."""
Row = dict[str, Value]
"""One line of a table: settings, results, and where and when they were measured."""


@dataclass(frozen=True)
class Sample:
    """One number, measured with several seeds.

    >>> str(Sample((0.9, 0.92, 0.94)))
    '0.920 ± 0.0200 (3 seeds)'
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; not a number for a single one."""
        finite = all(map(math.isfinite, self.values))
        return stdev(self.values) if len(self.values) > 1 and finite else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean; 0 for a single seed, of which nothing is known."""
        return self.deviation / len(self.values) ** 0.5 if len(self.values) > 1 else 0.0

    @property
    def low(self) -> float:
        return min(self.values, default=math.nan)

    @property
    def high(self) -> float:
        return max(self.values, default=math.nan)

    def text(self, form: Callable[[float], str] | None = None) -> str:
        """Mean and spread, each through `form`."""
        shown = number if form is None else form
        if len(self.values) == 1:
            return f"{shown(self.mean)} (1 seed)"
        return f"{shown(self.mean)} ± {shown(self.deviation)} ({len(self.values)} seeds)"

    def __str__(self) -> str:
        return self.text()


def number(value: float) -> str:
    """Three digits that count.

    >>> number(0.92), number(12345.0), number(1e-9), number(0.0)
    ('0.920', '12,345', '1e-9', '0')
    """
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "not finite"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")


def grouped(rows: Iterable[Row], by: Sequence[str], value: str) -> dict[tuple[Any, ...], Sample]:
    """The samples of `value` over rows that agree in `by`, in order of appearance; rows without it are left out.

    >>> rows = [{"depth": 8, "seed": 0, "loss": 1.0}, {"depth": 8, "seed": 1, "loss": 3.0}]
    >>> grouped(rows, ["depth"], "loss")[8,].mean
    2.0
    """
    found: dict[tuple[Value, ...], list[float]] = {}
    for row in rows:
        measured = row.get(value)
        if isinstance(measured, int | float):
            found.setdefault(tuple(row.get(name) for name in by), []).append(float(measured))
    return {key: Sample(tuple(values)) for key, values in found.items()}


def best_rows(rows: Sequence[Row], by: Sequence[str], over: str, value: str) -> list[Row]:
    """Of the rows that agree in `by`, those of the value of `over` whose mean of `value` is least.

    >>> rows = [{"depth": 8, "lr": rate, "loss": loss} for rate, loss in ((0.1, 2.0), (0.3, 1.0))]
    >>> best_rows(rows, ["depth"], "lr", "loss")
    [{'depth': 8, 'lr': 0.3, 'loss': 1.0}]
    """
    best: dict[tuple[Any, ...], tuple[float, Any]] = {}
    for (*key, tried), sample in grouped(rows, [*by, over], value).items():
        known = best.get(tuple(key))
        if known is None or sample.mean < known[0]:
            best[tuple(key)] = (sample.mean, tried)
    chosen = {(*key, tried) for key, (_, tried) in best.items()}
    return [row for row in rows if tuple(row.get(name) for name in (*by, over)) in chosen]


@dataclass(frozen=True)
class Point:
    """A mean at x, with the smallest and largest of its seeds."""

    x: float
    y: float
    low: float
    high: float
    seeds: int = 1


@dataclass(frozen=True)
class Line:
    """A line of a figure.

    Args:
        name: in the legend.
        points: from left to right.
        theory: a closed form or a published number: dashed, without points.
    """

    name: str
    points: tuple[Point, ...]
    theory: bool = False

    @classmethod
    def of(cls, name: str, values: Iterable[tuple[float, float]], *, theory: bool = True) -> Line:
        """A line through exact values."""
        return cls(name, tuple(Point(x, y, y, y) for x, y in values), theory)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Lines over an axis.

    Args:
        name: of its file.
        title: what it shows.
        across, up: what the axes are.
        lines: what is drawn.
        wide, tall: whether the axis is logarithmic.
        share: the values are shares, shown in per cent.
        note: a sentence below.
    """

    name: str
    title: str
    across: str
    up: str
    lines: tuple[Line, ...]
    wide: bool = True
    tall: bool = False
    share: bool = False
    note: str = ""


def lines_over(
    rows: Iterable[Row], across: str, value: str, by: str, names: Callable[[Value], str] = str
) -> tuple[Line, ...]:
    """A line for each value of `by`: the mean of `value` over `across`, with the range of the seeds."""
    samples = grouped(rows, [by, across], value)
    lines = []
    for kind in dict.fromkeys(key[0] for key in samples):
        found = [(key[1], sample) for key, sample in samples.items() if key[0] == kind]
        points = [
            Point(float(x), sample.mean, sample.low, sample.high, len(sample.values))
            for x, sample in found
            if isinstance(x, int | float)
        ]
        lines.append(Line(names(kind), tuple(sorted(points, key=lambda point: point.x))))
    return tuple(lines)
