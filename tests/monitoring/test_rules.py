"""Early warnings and spikes: each rule on evidence that it is about, none on an ordinary training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from skipway.monitoring.rules import RULES, Evidence, WarningLog
from skipway.monitoring.schedule import SETTLED, Schedule
from skipway.monitoring.spikes import SPIKE, SpikeScore

START = {
    "a": {"stream": 1.0, "largest": 4.0, "gradient": 1e-3, "update": 1e-3, "logits": 20.0, "dead": 0.1},
    "b": {"stream": 2.0, "largest": 9.0, "gradient": 1e-3, "update": 2e-3, "logits": 2.0, "dead": 0.0},
}


def changed(**values: float) -> dict[str, dict[str, float]]:
    """The start, with other values at b."""
    return {"a": START["a"], "b": START["b"] | values}


def falling(count: int, first: float = 2.3, last: float = 0.5) -> list[float]:
    return list(np.linspace(first, last, count))


@pytest.mark.parametrize(
    ("rule", "evidence"),
    [
        ("stream not finite", Evidence(START, changed(stream=math.nan))),
        ("gradient not finite", Evidence(START, changed(gradient=math.inf))),
        ("not finite", Evidence(losses=[2.0, math.nan], spikes={"loss": math.inf})),
        ("overflow", Evidence(START, changed(largest=5000.0), dtype=torch.float16)),
        ("stream grown", Evidence(START, changed(stream=2001.0))),
        ("gradient grown", Evidence(START, changed(gradient=1.1))),
        ("loss spike", Evidence(losses=[2.0, 9.0], spikes={"loss": 7.0})),
        ("spikes of the gradient", Evidence(norms=[50.0], spikes={"gradient norm": 8.0}, recent_spikes=3)),
        ("loss risen", Evidence(losses=[2.3] * 16 + falling(50) + [4.0] * 16)),
        ("loss risen", Evidence(losses=[2.3, 2.2, 7.0, 7.1])),
        ("loss high", Evidence(losses=[2e4 - 100 * step for step in range(32)], constant=2.3)),
        ("loss flat", Evidence(losses=[9.0] * 64 + [2.302] * 192, constant=math.log(10))),
        ("loss flat", Evidence(losses=[2.302] * 256)),
        ("large update", Evidence(START, changed(update=0.3))),
        ("small update", Evidence(START, {name: {"stream": 1.0, "gradient": 1.0, "update": 1e-8} for name in "ab"})),
        ("attention logits", Evidence(START, changed(logits=60.0))),
        ("dead units", Evidence(START, changed(dead=0.6))),
    ],
)
def test_each_rule_warns_of_what_it_is_about(rule, evidence):
    found = WarningLog().find(10, evidence)
    assert rule in [each.name for each, _, _ in found]
    where = {place for each, place, _ in found if each.name == rule}
    assert where <= {"", "b", "a"}
    if evidence.rows and rule != "small update":
        assert where == {"b"}


@pytest.mark.parametrize(
    "evidence",
    [
        Evidence(START, changed(stream=20.0, gradient=1e-5, update=5e-3, logits=30.0, dead=0.2)),
        Evidence(losses=falling(256), norms=[1.0] * 256, spikes={"loss": 3.0, "gradient norm": 2.0}, recent_spikes=1),
        Evidence(losses=falling(128) + [0.5] * 128, constant=2.3),
        Evidence(losses=[2.3, 7.0, 2.2]),
        Evidence(losses=[9.0] * 8 + [2.3] * 120, constant=2.3),
    ],
    ids=["a sample", "falling losses", "learnt and flat", "one large loss", "too early to say"],
)
def test_an_ordinary_training_is_not_warned_of(evidence):
    assert WarningLog().find(300, evidence) == []


def test_every_rule_has_a_source_and_warns_once_in_1000_steps():
    assert all(rule.source for rule in RULES)
    log, evidence = WarningLog(), Evidence(START, changed(dead=0.9))
    assert [len(log.find(step, evidence)) for step in (1, 2, 1000, 1001)] == [1, 0, 0, 1]


def test_spikes_are_those_of_numpy():
    """(value − mean) / σ of the 128 values before, σ over n as in OLMo-core."""
    values = np.random.default_rng(0).normal(size=300)
    spikes = SpikeScore()
    scores = [spikes.score(value) for value in values]
    assert scores[31] == 0.0, "too few before"
    for place in (40, 200, 299):
        before = values[max(0, place - 128) : place]
        assert scores[place] == pytest.approx((values[place] - before.mean()) / before.std(), rel=1e-9)
    assert spikes.score(math.nan) == math.inf
    assert spikes.score(8.0) > SPIKE


def test_samples_stay_within_the_budget_at_any_cost():
    """Steps of 10 ms, samples of 50 ms, of which 2 % of 500 steps hold two; without a budget as often as is asked."""
    for budget, expected in ((0.02, [100, 250, 250, 250]), (None, [100] * 4)):
        schedule, steps, step = Schedule(100, budget), [], 400
        schedule.step_seconds.extend([0.01] * SETTLED)
        for _ in range(4):
            remark = schedule.plan(step, 0.05)
            steps.append(schedule.next - step)
            step = int(schedule.next)
        assert steps == expected
        assert bool(remark) == (budget is not None)
    assert Schedule(100, 0.02, step_seconds=schedule.step_seconds).norm_interval(0.0004) == 4


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150, 1e300])
def test_scores_do_not_depend_on_the_unit_of_the_values(scale):
    values = [1.0 + 0.1 * (step % 3) for step in range(40)] + [2.0]
    plain, scaled = SpikeScore(), SpikeScore()
    for value in values:
        expected = plain.score(value)
        found = scaled.score(scale * value)
    assert expected > SPIKE
    assert found == pytest.approx(expected if scale >= 1 else 0.0)  # a deviation below 1e-10 counts as none
