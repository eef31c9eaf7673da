"""Intervals of lines and lowest points against closed forms and simulated noise."""

from __future__ import annotations

import math
import random

import pytest

from skipway.depth_transfer.regression import Estimate, fit_line, fit_lowest, paired_difference
from skipway.probes.confidence import student_quantile


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706), (4, 2.776), (11, 2.201), (30, 2.042), (120, 1.980)])
def test_student_quantiles_are_those_of_the_tables(freedom, value):
    assert student_quantile(freedom) == pytest.approx(value, abs=0.003)


def test_line_through_exact_points_is_exact_and_grows_less_certain_away_from_its_centre():
    line = fit_line([1, 2, 3], [1, 3, 5], [0.1, 0.1, 0.1])
    assert line.slope.value == pytest.approx(2)
    # error of a slope with known errors: σ / √Σ(x − mean)²
    assert line.slope.error == pytest.approx(0.1 / math.sqrt(2))
    assert line.at(5).width > line.at(3).width > line.at(2).width
    assert line.at(2).error == pytest.approx(0.1 / math.sqrt(3))


def test_points_that_scatter_more_than_their_errors_say_widen_the_slope():
    sure = fit_line([0, 1, 2], [0, 1, 2], [0.1] * 3).slope
    torn = fit_line([0, 1, 2], [0, 2, 2], [0.1] * 3).slope
    assert torn.width > 3 * sure.width


def test_line_through_two_points_without_errors_knows_nothing_of_its_slope():
    assert fit_line([0, 1], [0, 1]).slope.width == math.inf


def curves(noise: float, xs=(-1, 0, 1), lowest=0.3, seeds=3):
    draw = random.Random(0)
    while True:
        heights = [draw.gauss(2, 1) for _ in range(seeds)]  # what seeds have in common cancels
        yield {s: {x: h + (x - lowest) ** 2 + draw.gauss(0, noise) for x in xs} for s, h in enumerate(heights)}


@pytest.mark.parametrize("xs", [(-1, 0, 1), (-2, -1, 0, 1, 2), (4, 5, 6)])
def test_lowest_point_of_a_parabola_is_found_whatever_the_heights_of_the_seeds(xs):
    found = fit_lowest(next(curves(0.0, xs, lowest=5.3)))
    assert found.value == pytest.approx(5.3)
    assert found.width == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("noise", [0.05, 0.4])
def test_interval_of_the_lowest_point_holds_it_in_95_of_100_cases(noise):
    source = curves(noise)
    hits = sum(fit_lowest(next(source)).holds(0.3) for _ in range(500))
    assert 0.92 < hits / 500 < 0.98


def test_noise_above_the_curvature_gives_an_interval_without_ends():
    source = curves(3.0)
    assert any(fit_lowest(next(source)).width == math.inf for _ in range(20))
    assert fit_lowest({0: {-1: 1.0, 0: 2.0, 1: 1.0}, 1: {-1: 1.0, 0: 2.0, 1: 1.0}}).width == math.inf  # a hill


def test_differences_are_paired_by_seed():
    found = paired_difference({0: 1.5, 1: 11.5, 2: 101.6}, {0: 1.0, 1: 11.0, 2: 101.0, 3: 7.0})
    assert found.value == pytest.approx(1.6 / 3)
    assert found.low > 0.3
    assert paired_difference({0: math.inf}, {0: 1.0}).value == math.inf
    assert not math.isfinite(paired_difference({0: 2.0}, {0: 1.0}).width)


def test_estimate_turns_round_with_a_negative_factor():
    assert Estimate(1.0, -math.inf, 2.0).times(-1) == Estimate(-1.0, -2.0, math.inf)
