"""Statistics of a study's rows: values over seeds, the best value of a swept setting, series for figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from skipway.probes.confidence import mean_bound
from skipway.report.chart import Point, Series, format_value
from skipway.studies.cell import Row, Value

__all__ = [
    "PairedDifference",
    "SeedValues",
    "best_rate_rows",
    "group_losses",
    "group_values",
    "pair_by_seed",
    "select_best",
    "series_over",
    "value_labels",
]


@dataclass(frozen=True)
class SeedValues:
    """A number measured with several seeds.

    >>> str(SeedValues((0.9, 0.92, 0.94)))
    '0.920 ± 0.0200 (3 seeds)'
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        opposite = {math.inf, -math.inf} <= {*self.values}
        return fmean(self.values) if self.values and not opposite else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; NaN for a single one."""
        finite = all(map(math.isfinite, self.values))
        return stdev(self.values) if len(self.values) > 1 and finite else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean; 0 for a single seed, where it is unknown."""
        return self.deviation / len(self.values) ** 0.5 if len(self.values) > 1 else 0.0

    @property
    def low(self) -> float:
        return min(self.values, default=math.nan)

    @property
    def high(self) -> float:
        return max(self.values, default=math.nan)

    def text(self, form: Callable[[float], str] | None = None) -> str:
        """Format mean and standard deviation, each with `form`."""
        shown = format_value if form is None else form
        if len(self.values) == 1:
            return f"{shown(self.mean)} (1 seed)"
        return f"{shown(self.mean)} ± {shown(self.deviation)} ({len(self.values)} seeds)"

    def __str__(self) -> str:
        return self.text()


def group_values(rows: Iterable[Row], by: Sequence[str], value: str) -> dict[tuple[Any, ...], SeedValues]:
    """Group the column `value` by the columns `by`, in order of appearance; rows without a number are left out.

    >>> rows = [{"depth": 8, "seed": 0, "loss": 1.0}, {"depth": 8, "seed": 1, "loss": 3.0}]
    >>> group_values(rows, ["depth"], "loss")[8,].mean
    2.0
    """
    found: dict[tuple[Value, ...], list[float]] = {}
    for row in rows:
        measured = row.get(value)
        if isinstance(measured, int | float):
            found.setdefault(tuple(row.get(name) for name in by), []).append(float(measured))
    return {key: SeedValues(tuple(values)) for key, values in found.items()}


def group_losses(rows: Iterable[Row], by: Sequence[str], value: str) -> dict[tuple[Any, ...], SeedValues]:
    """`group_values` of a loss: that of a training that diverged is infinite, also where it was NaN.

    >>> group_losses([{"depth": 8, "loss": float("nan")}, {"depth": 8, "loss": 1.0}], ["depth"], "loss")[8,].values
    (inf, 1.0)
    """
    return {
        key: SeedValues(tuple(each if math.isfinite(each) else math.inf for each in sample.values))
        for key, sample in group_values(rows, by, value).items()
    }


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two variants, seed by seed; infinite for a seed that diverges with one of them alone.

    >>> found = PairedDifference(SeedValues((-0.2, -0.3, -0.25)))
    >>> found.sign, round(found.bound, 3)
    (-1, 0.124)
    """

    differences: SeedValues

    @property
    def compared(self) -> SeedValues:
        """What is tested against 0: the differences; of infinite ones the signs, beside which finite ones vanish."""
        values = self.differences.values
        if all(map(math.isfinite, values)):
            return self.differences
        return SeedValues(tuple(math.copysign(1, each) if math.isinf(each) else 0.0 for each in values))

    @property
    def bound(self) -> float:
        """Half width of the 95 % interval of the mean (Student's t); infinite for a single seed, or a diverged one."""
        return mean_bound(self.differences.values) if self.compared is self.differences else math.inf

    @property
    def sign(self) -> int:
        """-1 or 1 if the interval excludes 0, otherwise 0."""
        mean = self.compared.mean
        return 0 if not abs(mean) > mean_bound(self.compared.values) else int(math.copysign(1, mean))

    def __str__(self) -> str:
        """Mean and bound, or how many seeds diverged with which of the two.

        >>> print(PairedDifference(SeedValues((-0.2, -0.3, -0.25))))
        -0.250 ± 0.124
        >>> print(PairedDifference(SeedValues((-math.inf, -0.3, -math.inf))))
        -∞ with 2 of 3 seeds
        """
        values = self.differences.values
        if self.compared is self.differences:
            return f"{format_value(self.differences.mean)} ± {format_value(self.bound)}"
        counts = {"-∞": values.count(-math.inf), "+∞": values.count(math.inf)}
        text = " and ".join(f"{size} with {count}" for size, count in counts.items() if count)
        return f"{text} of {len(values)} seeds"


def pair_by_seed(first: Sequence[Row], second: Sequence[Row], value: str) -> PairedDifference:
    """Return `value` of `first` minus that of `second` for each seed that both have.

    One that is not finite counts as infinite; a seed for which both are is left out, since it tells nothing.
    """
    one, other = group_losses(first, ["seed"], value), group_losses(second, ["seed"], value)
    pairs = [(one[seed].mean, other[seed].mean) for seed in one if seed in other]
    return PairedDifference(
        SeedValues(tuple(left - right for left, right in pairs if left < math.inf or right < math.inf))
    )


def select_best(rows: Sequence[Row], by: Sequence[str], over: str, value: str) -> list[Row]:
    """Keep, for each combination of `by`, the rows with the value of `over` whose mean of `value` is smallest.

    A mean that is not finite is larger than any other.

    >>> rows = [{"depth": 8, "lr": rate, "loss": loss} for rate, loss in ((0.1, 2.0), (0.3, 1.0))]
    >>> select_best(rows, ["depth"], "lr", "loss")
    [{'depth': 8, 'lr': 0.3, 'loss': 1.0}]
    """
    best: dict[tuple[Any, ...], tuple[float, Any]] = {}
    for (*key, tried), sample in group_losses(rows, [*by, over], value).items():
        known = best.get(tuple(key))
        if known is None or sample.mean < known[0]:
            best[tuple(key)] = (sample.mean, tried)
    chosen = {(*key, tried) for key, (_, tried) in best.items()}
    return [row for row in rows if tuple(row.get(name) for name in (*by, over)) in chosen]


def best_rate_rows(rows: Sequence[Row]) -> list[Row]:
    """Keep, for each family, scheme and depth, the rows of the learning rate with the lowest mean training error."""
    return select_best(rows, ["family", "scheme", "depth"], "lr", "train_error")


def series_over(
    rows: Iterable[Row], across: str, value: str, by: str, names: Callable[[Value], str] = str
) -> tuple[Series, ...]:
    """Return one series per value of `by`: mean and range over seeds of `value` as a function of `across`.

    In a column whose name ends in `loss`, a training that diverged has an infinite one, as in the verdicts.

    Args:
        names: displayed name of a value of `by`.
    """
    group = group_losses if value.endswith("loss") else group_values
    samples = group(rows, [by, across], value)
    series = []
    for kind in dict.fromkeys(key[0] for key in samples):
        found = [(key[1], sample) for key, sample in samples.items() if key[0] == kind]
        points = [
            Point(float(x), sample.mean, sample.low, sample.high, len(sample.values))
            for x, sample in found
            if isinstance(x, int | float)
        ]
        series.append(Series(names(kind), tuple(sorted(points, key=lambda point: point.x))))
    return tuple(series)


def value_labels(labels: Mapping[str, str]) -> Callable[[Value], str]:
    """Return a function that gives the displayed name of a value: its label, or the value itself without one.

    Stored values are part of a row's key and cannot be renamed.
    """
    return lambda value: labels.get(str(value), str(value))
