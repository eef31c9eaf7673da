"""What a look ahead says of the training that it begins: the calibrated half of the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from skipway.diagnosis.findings import number
from skipway.diagnosis.indicators import Indicators

__all__ = ["WEIGHTS", "Cause", "Outlook", "features", "outlook", "probability"]

Cause = Literal["trains", "rate-too-high", "rate-too-low", "does-not-learn", "shattered"]


def features(indicators: Indicators) -> dict[str, float]:
    """The indicators on scales on which differences mean something: logarithms, cut where they say no more."""
    return {
        "distinct before": log(indicators.distinct_before, 1e-10, 1.0),
        "distinct after": log(indicators.distinct_after, 1e-10, 1.0),
        "unseen loss": log(indicators.unseen, 0.1, 10.0),
        "highest loss": log(indicators.highest, 0.9, 30.0),
        "last loss": log(indicators.last, 0.05, 10.0),
        "progress": math.copysign(math.log1p(min(abs(indicators.progress), 1e3)), indicators.progress),
        "pace": max(-1.0, min(indicators.progress, 3.0) / 3),
        "reach": log(indicators.reach, 1e-2, 1e5),
        "trust": log(indicators.trust, 1e-8, 1.0),
        "agreement": indicators.agreement,
        "smoothness": indicators.smoothness,
        "moved": log(indicators.moved, 1e-4, 1e2),
    }


def log(value: float, low: float, high: float) -> float:
    return math.log10(min(max(value, low), high))


WEIGHTS: Mapping[str, float] = {
    "distinct before": 0.0526,
    "distinct after": 0.539,
    "unseen loss": -1.18,
    "highest loss": -0.377,
    "last loss": 1.21,
    "progress": -0.0832,
    "pace": 1.09,
    "reach": -0.027,
    "trust": 0.0375,
    "agreement": 0.383,
    "smoothness": 1.72,
    "moved": 0.445,
    "bias": -0.0511,
}
"""Log-odds that a network trains, for each unit of a feature, and "bias".

A logistic regression on the 194 configurations of `benchmarks/trainability` that are not held out, made by
`python -m benchmarks.trainability.fit`, 2026-11-23.
"""


def probability(indicators: Indicators, weights: Mapping[str, float] = WEIGHTS) -> float:
    """The share of trainings that begin like this one and reach their goal, as far as the benchmark has seen.

    1 / (1 + e^−z), z = bias + Σ weight · feature; but one in five where gradients are shattered.
    """
    if is_shattered(indicators):
        return SHATTERED
    score = weights["bias"] + sum(weights[name] * value for name, value in features(indicators).items())
    return 1 / (1 + math.exp(-max(-50.0, min(score, 50.0))))


SILENT = 1e-7
"""Distinctness up to which outputs differ by rounding."""
SHATTERED = 0.2
"""One in five of the shattered on the same half of the benchmark trained, whatever else they looked like."""


def is_shattered(indicators: Indicators) -> bool:
    """Whether the gradient at a neighbouring input is another one, and no step keeps what the gradient promises.

    Then the loss is rugged on every scale that a step can have, and a gradient is white noise (Balduzzi et al. 2017,
    https://arxiv.org/abs/1702.08591).
    """
    return indicators.smoothness < 0.05 and indicators.trust < 1e-4


@dataclass(frozen=True)
class Outlook:
    """What is to be expected.

    Args:
        cause: "trains", or why not.
        probability: that it trains, at the asked settings.
        indicators: what it was read from.
        better: another learning rate at which it is likelier to train than not; None where none was found.
    """

    cause: Cause
    probability: float
    indicators: Indicators
    better: float | None = None

    @property
    def trains(self) -> bool:
        return self.cause == "trains"

    @property
    def wakes(self) -> bool:
        """Whether the network starts silent, as Fixup's and ReZero's do, and begins to tell samples apart.

        Then the look ahead is too short to judge by.
        """
        return (
            self.indicators.distinct_before < SILENT < self.indicators.distinct_after and self.indicators.unseen < 1.2
        )

    @property
    def evidence(self) -> Mapping[str, float]:
        """The indicators, by name."""
        return {"probability": self.probability, **asdict(self.indicators)}

    @property
    def what(self) -> str:
        """One sentence with the numbers."""
        read = self.indicators
        if self.wakes and not self.trains:
            return (
                "it starts silent, with one output for all samples, and begins to wake (1 − cosine is "
                f"{number(read.distinct_after)} behind the look ahead): too early to tell whether it learns"
            )
        told = {
            "trains": f"the loss falls to {number(read.last)} of its start within the look ahead",
            "rate-too-high": f"within the look ahead the loss reaches {number(read.highest)} times its start, and on "
            f"unseen samples {number(read.unseen)} times",
            "rate-too-low": f"at the pace of the look ahead the loss falls by {number(read.progress)} over all "
            "planned steps",
            "shattered": f"gradients at neighbouring inputs agree to {number(read.smoothness)}, and the first step "
            f"keeps {number(read.trust)} of what its gradient promises",
            "does-not-learn": "behind the look ahead the outputs of different samples are the same: 1 − cosine is "
            f"{number(read.distinct_after)}, from {number(read.distinct_before)}",
        }[self.cause]
        return f"{told}; trainings that begin so succeed in {self.probability:.0%} of cases"

    @property
    def why(self) -> str:
        """Why it matters."""
        return {
            "trains": "a network that learns tells samples apart",
            "rate-too-high": "steps that overshoot raise the loss instead of lowering it",
            "rate-too-low": "the planned steps end before anything is learnt",
            "shattered": "the loss is so rugged that its gradient says nothing of a step's outcome",
            "does-not-learn": "a network that learns tells samples apart; this one learns no more than how frequent "
            "the classes are",
        }[self.cause]

    @property
    def source(self) -> str:
        """Where the odds come from."""
        return "measured: benchmarks/trainability, 194 trainings"


def cause_of(indicators: Indicators) -> Cause:
    """What stands out most where a training is not expected to succeed: overshooting, a gradient that is no guide,
    samples that stay the same, or a pace that is too slow.
    """
    if is_shattered(indicators):
        return "shattered"
    if indicators.unseen > 1.5 or (indicators.highest > 1.5 and indicators.last > 1):
        return "rate-too-high"
    return "rate-too-low" if indicators.progress < 0.5 and indicators.distinct_after > 0.02 else "does-not-learn"


def outlook(indicators: Indicators, rate: float, look_again: Callable[[float], Indicators] | None = None) -> Outlook:
    """Judge, and where it does not train look once more at a tenth, or ten times, of the learning rate.

    Args:
        indicators: of the look ahead at the asked settings.
        rate: the learning rate that was asked about.
        look_again: indicators at another learning rate; None: do not look again.
    """
    chance = probability(indicators)
    if chance >= 0.5:
        return Outlook("trains", chance, indicators)
    cause = cause_of(indicators)
    other = rate * (10.0 if cause == "rate-too-low" else 0.1)
    helps = look_again is not None and probability(look_again(other)) >= 0.5
    return Outlook(cause, chance, indicators, better=other if helps else None)
