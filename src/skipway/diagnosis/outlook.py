"""A forecast of the training from its first steps, calibrated on a benchmark: the measured half of the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from skipway.diagnosis.findings import format_number
from skipway.diagnosis.indicators import WORST, Indicators

__all__ = [
    "PROBABILITY",
    "WEIGHTS",
    "Cause",
    "Outlook",
    "chance_text",
    "indicator_features",
    "outlook",
    "probability",
]

Cause = Literal["trains", "rate-too-high", "rate-too-low", "does-not-learn", "shattered"]


def indicator_features(indicators: Indicators) -> dict[str, float]:
    """The indicators as inputs of the regression: logarithms, clipped where a difference means nothing more."""
    return {
        "distinct before": clipped_log(indicators.distinct_before, 1e-10, 1.0),
        "distinct after": clipped_log(indicators.distinct_after, 1e-10, 1.0),
        "unseen loss": clipped_log(indicators.unseen, 0.1, 10.0),
        "highest loss": clipped_log(indicators.highest, 0.9, 30.0),
        "last loss": clipped_log(indicators.last, 0.05, 10.0),
        "progress": math.copysign(math.log1p(min(abs(indicators.progress), 1e3)), indicators.progress),
        "pace": max(-1.0, min(indicators.progress, 3.0) / 3),
        "reach": clipped_log(indicators.reach, 1e-2, 1e5),
        "trust": clipped_log(indicators.trust, 1e-8, 1.0),
        "agreement": indicators.agreement,
        "smoothness": indicators.smoothness,
        "moved": clipped_log(indicators.moved, 1e-4, 1e2),
    }


def clipped_log(value: float, low: float, high: float) -> float:
    """log₁₀ of a value that is clipped to an interval."""
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
"""Change of the log-odds that a network trains per unit of each feature, and their "bias".

A logistic regression on the 194 configurations of `benchmarks/trainability` that are not held out, fitted by
`python -m benchmarks.trainability.fit` on 2026-11-23.
"""


def probability(indicators: Indicators, weights: Mapping[str, float] = WEIGHTS) -> float:
    """Probability that a training that begins like this one reaches its goal, on networks as in the benchmark.

    1 / (1 + e^−z) with z = bias + Σ weight · feature; one in five where gradients are shattered, one in ten where the
    pace is that of a network that learns frequencies alone.
    """
    if is_shattered(indicators):
        return SHATTERED
    if falls_short(indicators):
        return SHORT
    score = weights["bias"] + sum(weights[name] * value for name, value in indicator_features(indicators).items())
    return 1 / (1 + math.exp(-max(-50.0, min(score, 50.0))))


SILENT = 1e-7
"""Distinctness up to which outputs differ by rounding only."""
SHATTERED = 0.2
"""One in five shattered networks in the fitted half of the benchmark trained, whatever their other indicators."""


def is_shattered(indicators: Indicators) -> bool:
    """Whether gradients at neighbouring inputs are unrelated, and the first step achieves nothing that its gradient
    predicts: the loss is rugged at the scale of a step (Balduzzi et al. 2017, https://arxiv.org/abs/1702.08591).
    """
    return indicators.smoothness < 0.05 and indicators.trust < 1e-4


PACE, SHORT = 3.15, 0.1
"""At the pace of the trial steps the loss has to fall 3.15 times as far as to the best constant answer, for trainings
slow down. Of the decoders of `benchmarks/trainability/language.py` that are not held out, seven slow ones had 2.4 or
less and none of them reached its goal; those that did had at least 4.2. (0 + 1)/(7 + 2).
"""


def falls_short(indicators: Indicators) -> bool:
    """Whether the planned steps will learn little more than how frequent tokens or unequal classes are."""
    return indicators.highest < WORST and indicators.progress < PACE * indicators.excess


def chance_text(chance: float) -> str:
    """Describe a probability of training.

    >>> chance_text(0.2), chance_text(0.001)
    ('20 % of similar starts trained', 'none of the similar starts trained')
    """
    number = round(100 * chance)
    return f"{number} % of similar starts trained" if number else "none of the similar starts trained"


PROBABILITY = "probability of training"
EVIDENCE: Mapping[str, str] = {
    "distinct_before": "output distinctness before",
    "distinct_after": "output distinctness after",
    "unseen": "held-out loss, relative",
    "highest": "highest loss, relative",
    "last": "last losses, relative",
    "progress": "loss decrease, extrapolated",
    "reach": "loss decrease, by the first gradient",
    "trust": "first decrease over predicted",
    "agreement": "gradient cosine between samples",
    "smoothness": "gradient cosine between neighbouring inputs",
    "moved": "relative change of the weights",
    "loss": "loss",
    "excess": "loss above the best constant answer",
}
"""Names of the indicators in a finding's evidence."""


@dataclass(frozen=True)
class Outlook:
    """A forecast of the training.

    Args:
        cause: "trains", or why it is not expected to.
        probability: of training, at the settings that were asked about.
        indicators: on which it rests.
        better: another learning rate, at which the probability is at least a half; None where none was found.
    """

    cause: Cause
    probability: float
    indicators: Indicators
    better: float | None = None

    @property
    def trains(self) -> bool:
        """Whether the network is expected to train."""
        return self.cause == "trains"

    @property
    def wakes(self) -> bool:
        """Whether the network starts silent, as under Fixup or ReZero, and begins to tell samples apart: the trial
        steps are then too few to judge by.
        """
        read = self.indicators
        return read.distinct_before < SILENT < read.distinct_after and read.unseen < 1.2

    @property
    def evidence(self) -> Mapping[str, float]:
        """The probability and the indicators, by names that a reader understands."""
        return {PROBABILITY: self.probability, **{EVIDENCE[k]: v for k, v in asdict(self.indicators).items()}}

    @property
    def what(self) -> str:
        """The forecast in one sentence with its numbers."""
        read = self.indicators
        before, after = format_number(read.distinct_before), format_number(read.distinct_after)
        change = f"stays at {after}" if before == after else f"goes from {before} to {after}"
        unseen, progress = format_number(read.unseen), format_number(max(read.progress, 0.0))
        if self.wakes and not self.trains:
            return (
                "the network starts silent, with one output for all samples, and begins to tell them apart (1 − cosine "
                f"similarity is {after} after the trial steps): too early to say whether it learns"
            )
        sentences: dict[Cause, str] = {
            "trains": f"the trial steps lower the loss to {100 * read.last:.0f} % of its start",
            "rate-too-high": "the trial steps make the loss infinite or NaN"
            if max(read.highest, read.unseen) >= WORST
            else f"the trial steps raise the loss to {format_number(read.highest)} times its start, "
            f"and to {unseen} times on held-out samples",
            "rate-too-low": f"at the pace of the trial steps the loss falls by {progress} over all planned steps"
            + f", and the best constant answer alone is {format_number(read.excess)} below the start"
            * (read.excess > 0),
            "shattered": f"gradients at neighbouring inputs have cosine similarity {format_number(read.smoothness)}, "
            f"and the first step lowers the loss by {100 * max(read.trust, 0.0):.2f} % of what its gradient predicts",
            "does-not-learn": "the trial steps do not separate the samples: 1 − cosine similarity of their outputs "
            f"{change}, and the loss on held-out samples becomes {unseen} times its start",
        }
        return f"{sentences[self.cause]}; {chance_text(self.probability)}"

    @property
    def why(self) -> str:
        """The mechanism."""
        reasons: dict[Cause, str] = {
            "trains": "A network that learns tells samples apart.",
            "rate-too-high": "Steps that are too long overshoot and raise the loss instead of lowering it.",
            "rate-too-low": "The planned steps end before anything is learned.",
            "shattered": "The loss is so rugged that its gradient says nothing about the outcome of a step.",
            "does-not-learn": "A network that learns tells samples apart; this one learns at most how frequent the "
            "classes are.",
        }
        return reasons[self.cause]

    @property
    def source(self) -> str:
        """The measurement on which the probability rests."""
        return "measured: logistic regression on 194 trainings, benchmarks/trainability"


def cause_of(indicators: Indicators) -> Cause:
    """The most conspicuous reason for a bad forecast: shattered gradients, overshooting, too slow a pace, or samples
    that stay alike.
    """
    if is_shattered(indicators):
        return "shattered"
    if indicators.unseen > 1.5 or (indicators.highest > 1.5 and indicators.last > 1):
        return "rate-too-high"
    if falls_short(indicators) and indicators.unseen < 1:
        return "rate-too-low"
    return "rate-too-low" if indicators.progress < 0.5 and indicators.distinct_after > 0.02 else "does-not-learn"


def outlook(indicators: Indicators, rate: float, look_again: Callable[[float], Indicators] | None = None) -> Outlook:
    """Forecast, and where the forecast is bad try once more at a tenth of the learning rate, or at ten times it.

    Args:
        indicators: of the trial steps at the settings that were asked about.
        rate: the learning rate that was asked about.
        look_again: returns the indicators at another learning rate; None: do not try.
    """
    chance = probability(indicators)
    if chance >= 0.5:
        return Outlook("trains", chance, indicators)
    cause = cause_of(indicators)
    other = rate * (10.0 if cause == "rate-too-low" else 0.1)
    helps = look_again is not None and probability(look_again(other)) >= 0.5
    return Outlook(cause, chance, indicators, better=other if helps else None)
