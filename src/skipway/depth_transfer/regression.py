"""Estimates with 95 % intervals: a line through points, and the lowest point of a parabola measured seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from skipway.probes.confidence import NORMAL_QUANTILE, mean_bound, student_quantile

__all__ = ["Estimate", "Line", "fit_line", "fit_lowest", "paired_difference"]


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its 95 % interval, which may be infinite.

    >>> Estimate(1.0, 0.5, 2.0).holds(0.7), Estimate(1.0, 0.5, 2.0).width
    (True, 1.5)
    """

    value: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Of the interval."""
        return self.high - self.low

    @property
    def error(self) -> float:
        """The standard error of a normal estimate with this interval."""
        return self.width / (2 * NORMAL_QUANTILE)

    def holds(self, value: float) -> bool:
        """Whether the interval holds a value."""
        return self.low <= value <= self.high

    def times(self, factor: float) -> Estimate:
        """The estimate of `factor` times the number.

        >>> Estimate(1.0, 0.5, 2.0).times(-2)
        Estimate(value=-2.0, low=-4.0, high=-1.0)
        """
        ends = sorted((self.low * factor, self.high * factor)) if factor else (0.0, 0.0)
        return Estimate(self.value * factor, *ends)


@dataclass(frozen=True)
class Line:
    """y = intercept + slope · x, with what an interval of it needs.

    Args:
        slope: with its interval.
        centre: weighted means of x and y, where the line is known best.
        error: standard error of y there.
        quantile: of Student's t or the normal distribution.
    """

    slope: Estimate
    centre: tuple[float, float]
    error: float
    quantile: float

    def at(self, x: float) -> Estimate:
        """The line at x, with the interval of the line."""
        away = x - self.centre[0]
        value = self.centre[1] + self.slope.value * away
        half = math.hypot(self.quantile * self.error, away * self.slope.width / 2)
        return Estimate(value, value - half, value + half)


def fit_line(x: Sequence[float], y: Sequence[float], errors: Sequence[float] | None = None) -> Line:
    """The line of least squares through points, at least two different x.

    Args:
        x, y: the points.
        errors: standard errors of y; None: unknown and equal, taken from the residuals. Known ones are enlarged where
            the points scatter more than they say (Birge's ratio).

    >>> fit_line([0, 1, 2], [1, 3, 5]).slope
    Estimate(value=2.0, low=2.0, high=2.0)
    """
    weights = [1.0] * len(x) if errors is None else [1 / error**2 for error in errors]
    total = sum(weights)
    centre_x = sum(w * each for w, each in zip(weights, x, strict=True)) / total
    centre_y = sum(w * each for w, each in zip(weights, y, strict=True)) / total
    spread = sum(w * (each - centre_x) ** 2 for w, each in zip(weights, x, strict=True))
    joint = sum(w * (a - centre_x) * (b - centre_y) for w, a, b in zip(weights, x, y, strict=True))
    slope = joint / spread
    rest = sum(
        w * (b - centre_y - slope * (a - centre_x)) ** 2 for w, a, b in zip(weights, x, y, strict=True)
    )  # fmt: skip
    freedom = len(x) - 2
    variance = rest / freedom if freedom else math.inf if errors is None else 1.0
    quantile = student_quantile(freedom)
    if errors is not None:
        variance, quantile = max(1.0, variance), NORMAL_QUANTILE
    half = quantile * math.sqrt(variance / spread)
    return Line(
        Estimate(slope, slope - half, slope + half), (centre_x, centre_y), math.sqrt(variance / total), quantile
    )


def fit_lowest(curves: Mapping[int, Mapping[float, float]]) -> Estimate:
    """Where a parabola is lowest, y = a_s + b x + c x², whose height a_s alone depends on the seed s.

    Seeds are compared at the same x, so that what they have in common cancels. The interval is Fieller's: the x at
    which the slope b + 2cx cannot be told from 0. It is infinite where the curvature cannot be told from 0.

    Args:
        curves: by seed, y at each x; the same three or more x for each of them.

    >>> found = fit_lowest({0: {-1: 2.0, 0: 1.0, 1: 2.0}, 1: {-1: 3.1, 0: 2.0, 1: 2.9}})
    >>> round(found.value, 3), round(found.low, 3), round(found.high, 3)
    (0.025, -0.052, 0.106)
    """
    every = sorted({x for curve in curves.values() for x in curve})
    middle, count = fmean(every), len(curves)
    # both regressors with their mean over the xs taken off, which is what the heights of the seeds take
    first = {x: x - middle for x in every}
    mean_square = fmean(each**2 for each in first.values())
    second = {x: each**2 - mean_square for x, each in first.items()}
    a11, a22 = (count * sum(each[x] ** 2 for x in every) for each in (first, second))
    a12 = count * sum(first[x] * second[x] for x in every)
    r1, r2 = (sum(each[x] * y for curve in curves.values() for x, y in curve.items()) for each in (first, second))
    determinant = a11 * a22 - a12**2
    slope, curvature = (a22 * r1 - a12 * r2) / determinant, (a11 * r2 - a12 * r1) / determinant
    rest = 0.0
    for curve in curves.values():
        height = fmean(curve.values())
        rest += sum((y - height - slope * first[x] - curvature * second[x]) ** 2 for x, y in curve.items())
    freedom = count * len(every) - count - 2
    if curvature <= 0 or freedom < 1:
        return Estimate(middle - slope / (2 * curvature) if curvature > 0 else math.nan, -math.inf, math.inf)
    noise = student_quantile(freedom) ** 2 * rest / freedom / determinant
    # Fieller: (slope + 2 curvature x)² ≤ t² Var(slope + 2 curvature x), with Var = (a22, −a12, a11) · noise
    two = 4 * (curvature**2 - noise * a11)
    one = 4 * (slope * curvature + noise * a12)
    zero = slope**2 - noise * a22
    value = -slope / (2 * curvature)
    if two <= 0:
        return Estimate(middle + value, -math.inf, math.inf)
    root = math.sqrt(max(one**2 - 4 * two * zero, 0.0))
    return Estimate(middle + value, middle + (-one - root) / (2 * two), middle + (-one + root) / (2 * two))


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate:
    """The mean of first minus second over the seeds that both have, with Student's interval.

    >>> paired_difference({0: 1.0, 1: 1.2}, {0: 0.5, 1: 0.7}).value
    0.5
    >>> paired_difference({0: math.inf, 1: 1.0}, {0: 0.5, 1: math.inf}).value
    nan
    """
    found = [first[seed] - second[seed] for seed in first if seed in second]
    if not found or not all(map(math.isfinite, found)):
        return Estimate(sum(found) if found else math.nan, -math.inf, math.inf)
    mean = fmean(found)
    half = mean_bound(found)
    return Estimate(mean, mean - half, mean + half)
