"""The few numbers of a measurement that the verdict rests on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from skipway.diagnosis.measurement import Measurement
from skipway.diagnosis.settings import Settings

__all__ = ["Indicators", "read_indicators"]

AROUND = 3
"""Losses at either end of the look ahead that are averaged."""


@dataclass(frozen=True)
class Indicators:
    """Numbers, each finite, that say how a training begins.

    Args:
        distinct_before: 1 − mean cosine between the outputs of unseen samples at the start.
        distinct_after: the same behind the look ahead; a network that learns tells samples apart.
        unseen: loss on unseen samples behind the look ahead over that before it.
        highest: highest loss during the look ahead over the first.
        last: mean of its last losses over the mean of its first.
        progress: by how much the loss would fall over all planned steps if it fell as fast as in the look ahead.
        reach: the same by the first gradient's promise, had the loss been linear.
        trust: decrease of the loss by the first step over what its gradient promised.
        agreement: cosine between the gradients of two chunks.
        smoothness: cosine between the gradients at neighbouring inputs (1 − shattering).
        moved: |Δw|/|w| behind the look ahead.
        loss: at the start.
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


def read_indicators(measured: Measurement, settings: Settings, *, labelled: bool = True) -> Indicators:
    """Take the indicators from a measurement; what is not finite becomes the worst.

    Without labels the loss on unseen samples cannot fall, whatever is learnt: what was seen stands in for it.
    """
    ahead = measured.ahead
    if ahead is None:
        raise ValueError("indicators are read from a measurement with a look ahead")
    losses = ahead.losses
    broken = not all(map(math.isfinite, (*losses, *ahead.unseen)))
    first = sum(losses[:AROUND]) / len(losses[:AROUND])
    last = sum(losses[-AROUND:]) / len(losses[-AROUND:])
    scale = gain(settings, settings.steps) / gain(settings, len(losses))
    return Indicators(
        distinct_before=finite(ahead.distinct[0], 0.0),
        distinct_after=0.0 if broken else finite(ahead.distinct[1], 0.0),
        unseen=WORST
        if broken
        else ahead.unseen[1] / max(ahead.unseen[0], 1e-9)
        if labelled
        else min(last / first, 1.0),
        highest=WORST if broken else max(losses) / max(losses[0], 1e-9),
        last=WORST if broken else last / max(first, 1e-9),
        progress=-WORST if broken else (first - last) * scale,
        reach=finite(ahead.predicted * gain(settings, settings.steps), WORST),
        trust=finite(ahead.trust, 0.0),
        agreement=finite(measured.noise.agreement, 0.0),
        smoothness=finite(measured.jacobians.shattering, 1.0),
        moved=finite(ahead.moved, WORST),
        loss=finite(losses[0], WORST),
    )


WORST = 1e9


def finite(value: float | None, otherwise: float) -> float:
    return value if value is not None and math.isfinite(value) else otherwise


def gain(settings: Settings, steps: int) -> float:
    """How far `steps` steps go in units of the first: momentum β adds up to 1/(1 − β) times as far in the long run.

    >>> gain(Settings(optimizer="adamw"), 10), round(gain(Settings(optimizer="sgd"), 2), 3)
    (10.0, 2.9)
    """
    if settings.adaptive or steps < 1:
        return float(max(steps, 1))
    return sum((1 - 0.9**step) / 0.1 for step in range(1, steps + 1))
