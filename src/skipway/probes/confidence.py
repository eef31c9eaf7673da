"""How sure a mean of few numbers is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

__all__ = ["NORMAL_QUANTILE", "mean_bound", "student_quantile"]

NORMAL_QUANTILE = 1.96
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def student_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t; infinite without a degree of freedom.

    Beyond ten degrees of freedom z + (z³ + z) / 4ν + (5z⁵ + 16z³ + 3z) / 96ν² (Abramowitz and Stegun, 26.7.5).

    >>> student_quantile(2), round(student_quantile(30), 3)
    (4.303, 2.042)
    """
    if freedom < 1:
        return math.inf
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[int(freedom) - 1]
    z = NORMAL_QUANTILE
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def mean_bound(values: Sequence[float]) -> float:
    """Half width of the 95 % interval of a mean (Student's t); infinite for fewer than two numbers, or infinite ones.

    >>> round(mean_bound([-0.2, -0.3, -0.25]), 3)
    0.124
    """
    if len(values) < 2 or not math.isfinite(fmean(values)):
        return math.inf
    return student_quantile(len(values) - 1) * stdev(values) / len(values) ** 0.5
