"""The search for the best rate on made-up loss curves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from skipway.depth_transfer.regression import Estimate
from skipway.depth_transfer.runs import RateRun
from skipway.depth_transfer.search import FARTHEST, RateSearch, bracket


@dataclass
class Curve:
    """Trainings whose loss is a function of k = log₂ rate and seed."""

    loss: object
    seeds: int = 3
    steps: int = 8
    runs: dict = field(default_factory=dict)
    taken: int = 0

    def __post_init__(self):
        self.plan = self.file = self

    def run(self, scheme, depth, lr, seed, steps):
        key = (scheme, depth, lr, seed)
        if key not in self.runs or len(self.runs[key].losses) < steps:
            loss = self.loss(round(math.log2(lr), 3), seed)
            self.taken += steps
            self.runs[key] = RateRun(scheme, depth, lr, seed, (loss,) * steps, 0.0)
        return self.runs[key]


def search(loss, seeds=3):
    made = Curve(loss, seeds)
    return RateSearch(made, "own", 4, 1.0), made


@pytest.mark.parametrize("lowest", [-9.2, -1.6, 0.4, 7.3])
def test_search_leaves_its_range_until_the_loss_rises_on_both_sides(lowest):
    found, made = search(lambda k, seed: 1 + 0.01 * (k - lowest) ** 2 + seed)
    best, estimate, remark = found.find((-4, -2, 0, 2, 4))
    assert best == round(lowest)
    assert estimate.value == pytest.approx(lowest, abs=1e-3)
    assert estimate.low < lowest < estimate.high
    assert not remark
    # every rate from −10 to 8 with all steps and seeds would be 19 × 3 × 8
    assert made.taken < 19 * 3 * 8 / 3


def test_best_rate_at_the_edge_of_stability_is_known_to_half_an_octave():
    found, _ = search(lambda k, seed: math.nan if k > 1 else 2 - 0.1 * k)
    best, estimate, remark = found.find((-4, -2, 0, 2, 4))
    assert (best, estimate) == (1, Estimate(1, 0.5, 1.5))
    assert "diverges above it within an octave" in remark


def test_loss_that_falls_for_ever_has_no_best_rate():
    found, _ = search(lambda k, seed: 2 - 0.01 * k)
    best, estimate, remark = found.find((-4, -2, 0, 2, 4))
    assert best == FARTHEST
    assert estimate.width == math.inf
    assert "still falls upwards" in remark


def test_network_that_diverges_at_every_rate_is_said_to():
    found, _ = search(lambda k, seed: math.nan)
    _, estimate, remark = found.find((-4, -2, 0, 2, 4))
    assert math.isnan(estimate.value)
    assert "diverges at every rate" in remark


def test_network_that_diverges_at_the_first_rates_is_followed_to_lower_ones():
    found, _ = search(lambda k, seed: math.nan if k > -7 else 1 + 0.1 * (k + 9) ** 2)
    assert found.find((-4, -2, 0, 2, 4))[0] == -9


def test_rates_that_noise_hides_are_told_as_a_range():
    noise = {0: 0.05, 1: -0.05, 2: 0.0}
    found, _ = search(lambda k, seed: 1 + 1e-4 * k**2 + noise[seed] * math.sin(3 * k + seed))
    _, estimate, remark = found.find((-4, -2, 0, 2, 4))
    assert "cannot be told apart" in remark
    assert estimate.width >= 4


def test_one_seed_says_that_the_noise_is_not_known():
    found, _ = search(lambda k, seed: 1 + 0.01 * (k - 0.3) ** 2, seeds=1)
    _, estimate, remark = found.find((-4, -2, 0, 2, 4))
    assert estimate.value == pytest.approx(0.3)
    assert (estimate.low, estimate.high) == (-1, 1)
    assert "one seed" in remark


def test_bracket_asks_for_no_rate_twice():
    asked = []
    assert bracket(lambda k: asked.append(k) or abs(k - 3), (-2, 0, 2), 2) == 2
    assert len(asked) == len(set(asked))


def test_rates_that_diverge_are_no_part_of_a_plateau():
    noise = {0: 0.05, 1: -0.05, 2: 0.0}
    found, _ = search(lambda k, seed: math.nan if abs(k) > 2 else 1 + noise[seed] * math.sin(3 * k + seed))
    for k in range(-4, 5):
        found.mean(k)
    estimate, _ = found.plateau(0)
    assert (estimate.low, estimate.high) == (-3, 3)
