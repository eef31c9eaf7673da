"""The indicators: the few numbers of a measurement on which the forecast rests."""

from __future__ import annotations

import math
from dataclasses import dataclass

from skipway.diagnosis.asked_classes import AskedClasses
from skipway.diagnosis.measurement import Measurement
from skipway.diagnosis.settings import Settings

__all__ = ["UNEQUAL", "Indicators", "read_indicators"]

AROUND = 3
"""Losses at either end of the trial steps that are averaged."""
WORST = 1e9
"""Stands for a number that is not finite."""


@dataclass(frozen=True)
class Indicators:
    """How a training begins, in finite numbers. "Trial steps" are the optimizer's first ones, which are taken back.

    Args:
        distinct_before: 1 − mean cosine between the outputs of held-out samples before the trial steps.
        distinct_after: the same after them; a network that learns tells samples apart.
        unseen: loss on held-out samples after the trial steps over the loss before.
        highest: highest loss during the trial steps over the first.
        last: mean of the last losses over the mean of the first.
        progress: decrease of the loss over all planned steps, at the pace of the trial steps.
        reach: decrease of the loss over all planned steps, had the loss been linear in the first gradient's direction.
        trust: decrease of the loss by the first step over the decrease that its gradient predicts.
        agreement: cosine between the gradients of two parts of the batch.
        smoothness: cosine between the input's gradients at neighbouring inputs.
        moved: |Δw|/|w| after the trial steps.
        loss: before the first step.
        excess: of the loss at the start over that of the best constant answer, in nats, where classes or tokens are of
            unequal frequency; else 0.
    """

    distinct_before: float
    distinct_after: float
    unseen: float
    highest: float
    last: float
    progress: float
    reach: float
    trust: float
    agreement: float
    smoothness: float
    moved: float
    loss: float
    excess: float = 0.0


def read_indicators(measured: Measurement, settings: Settings, *, labelled: bool = True) -> Indicators:
    """The indicators of a measurement; a number that is not finite becomes the worst one.

    Args:
        measured: with trial steps.
        settings: of the training.
        labelled: whether targets belong to the samples. Of random targets nothing can be learned that lowers the loss
            on held-out samples, so the loss on seen samples stands in for it.
    """
    ahead = measured.ahead
    if ahead is None:
        raise ValueError("measured.ahead is None: indicators need a measurement with an optimizer's trial steps")
    losses = ahead.losses
    broken = not all(map(math.isfinite, (*losses, *ahead.unseen)))
    first = sum(losses[:AROUND]) / len(losses[:AROUND])
    last = sum(losses[-AROUND:]) / len(losses[-AROUND:])
    scale = distance_gain(settings, settings.steps) / distance_gain(settings, len(losses))
    return Indicators(
        distinct_before=finite_or(ahead.distinct[0], 0.0),
        distinct_after=0.0 if broken else finite_or(ahead.distinct[1], 0.0),
        unseen=WORST
        if broken
        else ahead.unseen[1] / max(ahead.unseen[0], 1e-9)
        if labelled
        else min(last / first, 1.0),
        highest=WORST if broken else max(losses) / max(losses[0], 1e-9),
        last=WORST if broken else last / max(first, 1e-9),
        progress=-WORST if broken else (first - last) * scale,
        reach=finite_or(ahead.predicted * distance_gain(settings, settings.steps), WORST),
        trust=finite_or(ahead.trust, 0.0),
        agreement=finite_or(measured.noise.agreement, 0.0),
        smoothness=finite_or(measured.jacobians.shattering, 1.0),
        moved=finite_or(ahead.moved, WORST),
        loss=finite_or(losses[0], WORST),
        excess=excess_of(measured.asked),
    )


UNEQUAL = 0.95
"""Share of log(classes) up to which the entropy of the targets counts as that of classes of unequal frequency."""


def excess_of(asked: AskedClasses | None) -> float:
    """How far above the best constant answer a network starts."""
    if asked is None or asked.entropy >= UNEQUAL * asked.uniform:
        return 0.0
    return max(finite_or(asked.cross_entropy, 0.0) - asked.entropy, 0.0)


def finite_or(value: float | None, otherwise: float) -> float:
    """A value where it is a finite number, else another one."""
    return value if value is not None and math.isfinite(value) else otherwise


def distance_gain(settings: Settings, steps: int) -> float:
    """Distance that steps in one direction cover, in lengths of the first: momentum β makes each up to 1/(1 − β) long.

    >>> distance_gain(Settings(optimizer="adamw"), 10), round(distance_gain(Settings(optimizer="sgd"), 2), 3)
    (10.0, 2.9)
    """
    if settings.adaptive or steps < 1:
        return float(max(steps, 1))
    return sum((1 - 0.9**step) / 0.1 for step in range(1, steps + 1))
