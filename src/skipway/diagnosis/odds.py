"""The odds that a planned training learns, from its first steps: features, fitted models, thresholds of a decision.

`benchmarks/trainability` trains networks of many kinds for 1,500 steps; `python -m benchmarks.trainability.fit` fits
the models in odds.json to the half of them that is not held out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from skipway.diagnosis.findings import Verdict

__all__ = [
    "CHECKPOINTS",
    "HIGH",
    "LOW",
    "FirstSteps",
    "Pause",
    "decide",
    "features",
    "highest_certainty",
    "is_hopeless",
    "odds",
    "thresholds",
]

CHECKPOINTS: tuple[int, ...] = (12, 18, 24, 36, 48, 72, 96, 150, 240)
"""Steps after which the odds are asked for."""
FAR = 8.0
"""Bound of z-scores, beyond which a difference is as good as certain."""
BLOWN_UP = 1e4
"""Growth of the loss over its start, or over that of the best constant answer, that ends a trial."""
FARTHEST = 6.0
"""ln of the loss over the best constant answer's up to which losses are told apart: about the farthest start among
the trainings that the odds were fitted on that learnt, 400 times as much.
"""
LOW, HIGH = 0.001, 0.999
"""Bounds of the odds: none of a few hundred trainings is evidence of more."""


@dataclass(frozen=True)
class Pause:
    """What is measured of the weights and of held-out samples where trial steps pause.

    Args:
        moved: |w − w₀|/|w₀|.
        update: |Δw|/|w| of the last step.
        distinct: 1 − mean cosine between the outputs of different held-out samples.
        unseen: loss on the held-out samples.
    """

    moved: float
    update: float
    distinct: float
    unseen: float


@dataclass(frozen=True)
class FirstSteps:
    """The first steps of a training, as the odds see them.

    Args:
        losses: one for each step, of its batch before the step.
        information: for each step how much higher the loss of its batch is where every output is replaced by their
        mean:
            what the outputs say about their own samples; None: not known.
        pauses: before the first step, after it, and at every pause up to now.
        constant: loss of the best constant answer; None: not known, and the first losses stand in for it.
        travelled: sum of the rates of these steps, in units of the planned one after warm-up.
        planned: the same of all planned steps.
        first_rate, rate: of the first and of the last step in that unit.
        fresh: whether every step saw another batch.
        adaptive: whether the size of a step hardly depends on the size of the gradient.
    """

    losses: Sequence[float]
    information: Sequence[float | None]
    pauses: Sequence[Pause]
    constant: float | None
    travelled: float
    planned: float
    first_rate: float
    rate: float
    fresh: bool
    adaptive: bool

    @property
    def answer(self) -> float:
        """The loss of the best constant answer, or that of the first steps in its place."""
        return self.constant if self.constant is not None else fmean(self.losses[:3])

    @property
    def bounded(self) -> bool:
        """Whether losses end at 0, as those that the odds were fitted on."""
        return self.answer > 0 and min(self.losses) >= 0

    @property
    def unit(self) -> float:
        """The loss that others are measured in."""
        lost = 0.0 if self.bounded else abs(fmean(self.losses[:3]) - self.answer)
        return max(abs(self.answer), lost, 1e-12)

    def relative(self, loss: float) -> float:
        """A loss in terms of the best constant answer's; where losses may be negative, as a difference from it."""
        return loss / self.unit if self.bounded else 1 + (loss - self.answer) / self.unit

    @property
    def unmoved(self) -> bool:
        """Whether the planned steps cannot change the weights by more than rounding."""
        return self.travelled > 1e-6 and self.pauses[-1].moved / self.travelled * self.planned < 1e-9


def is_hopeless(losses: Sequence[float], unit: float) -> bool:
    """Whether a loss is not finite, or beyond any hope."""
    most = BLOWN_UP * max(unit, losses[0] if losses else 0.0)
    return not all(math.isfinite(loss) and loss <= most for loss in losses)


def features(first: FirstSteps) -> Mapping[str, float]:
    """What the first steps say, in bounded numbers; all losses relative to the best constant answer's."""
    losses, unit = list(map(first.relative, first.losses)), first.unit
    count = len(losses)
    half, span = losses[count // 2 :], max(count // 4, 3)
    recent, before = losses[-span:], losses[-2 * span : -span]
    noise = max(pstdev(half), 1e-4)
    slope, error = trend(half)
    early, late = fmean(losses[:3]), fmean(recent)
    ahead = (first.planned - first.travelled) / max(first.rate, 1e-9)
    found = {
        "gain": clip(1 - late, -2, 1),
        "gain, z": squash((1 - fmean(half)) / noise * math.sqrt(len(half))),
        "fall": clip(early - late, -2, 2),
        "recent fall, z": squash((fmean(before) - late) / noise * math.sqrt(span / 2)),
        "slope, z": squash(-slope / error),
        "reach": math.asinh(clip(1 - late - slope * ahead, -1e3, 1e3)),
        "start": clip(math.log(max(early, 1e-9)), -3, FARTHEST),
        "excess": clip(math.log(max(late, 1e-9)), -3, FARTHEST),
        "highest": clip(math.log(max(max(losses), 1e-9)), -1, 8),
        "lowest": clip(1 - min(losses), -2, 1),
        "noise": clip(math.log10(noise), -4, 2),
        "steps": math.log10(count),
        "rate": first.rate,
        "spike": clip(math.log(max(max(half), 1e-9) / max(fmean(half), 1e-9)), 0, 5),
        "spread of neighbours": clip(math.log10(max(fmean(abs(a - b) for a, b in pairwise(half)), 1e-6)), -5, 2),
        "adaptive": float(first.adaptive),
        "jump": squash((max(losses[3:], default=early) - early) / noise),
    }
    # where it cannot be told what outputs say about their samples, losses below the constant answer's stand in for it
    known = zip(first.information, losses, strict=True)
    shares = [1 - loss if value is None else value / unit for value, loss in known]
    return found | information_features(shares, span) | weight_features(first)


def information_features(shares: Sequence[float], span: int) -> dict[str, float]:
    """What outputs say about their own samples: on a plateau it grows long before the loss falls."""
    shares = list(map(finite_or_zero, shares))
    half = shares[len(shares) // 2 :]
    now, before, early = (
        fmean(shares[-span:]),
        fmean(shares[-2 * span : -span]),
        fmean(shares[: max(3, len(shares) // 8)]),
    )
    slope, error = trend(half, 1e-12)
    return {
        "information": magnitude(now),
        "information, z": squash(fmean(half) / max(pstdev(half) / math.sqrt(len(half)), 1e-9)),
        "information at first": magnitude(early),
        "information, recent growth": magnitude(now) - magnitude(before),
        "information, growth": magnitude(now) - magnitude(early),
        "information, slope z": squash(slope / error),
        "information, share": clip(now, -2, 1),
    }


def weight_features(first: FirstSteps) -> dict[str, float]:
    """How far and how straight the weights move, and held-out samples."""
    start, begun, last, now = first.pauses[0], first.pauses[1], first.pauses[-2], first.pauses[-1]
    moved, update, opening = (value if math.isfinite(value) else 1e9 for value in (now.moved, now.update, begun.update))
    step = max(update, 1e-12) / max(first.rate, 1e-9)
    unseen = [first.relative(value) if math.isfinite(value) else 1e6 for value in (last.unseen, now.unseen)]
    return {
        "moved": clip(math.log10(max(moved, 1e-9)), -6, 3),
        "movement planned": clip(math.log10(max(moved, 1e-9) / first.travelled * first.planned), -5, 4),
        "update": clip(math.log10(step), -8, 2),
        "update, growth": clip(math.log10(step / max(opening / max(first.first_rate, 1e-9), 1e-12)), -4, 4),
        "straightness": clip(math.log10(max(moved, 1e-9) / (step * first.travelled)), -3, 2),
        "distinct": clip(math.log10(max(finite_or_zero(now.distinct), 1e-12)), -12, 0.5),
        "distinct at first": clip(math.log10(max(finite_or_zero(start.distinct), 1e-12)), -12, 0.5),
        "unseen": clip(1 - unseen[1], -3, 1),
        "unseen, fall": clip(unseen[0] - unseen[1], -2, 2),
    }


def odds(first: FirstSteps) -> float:
    """Probability that a training that begins like this one gets half-way from the best constant answer to what a good
    recipe reaches in the planned steps.

    The mean of the leaves that the features reach in random trees, or 1 / (1 + e^−s) with s a sum of leaves of boosted
    trees or a weighted sum of the features, whichever was best in cross-validation. Even at most where the losses are
    still farther from the best constant answer's than those of any training that this was fitted on.
    """
    if is_hopeless(first.losses, first.unit) or first.unmoved:
        return LOW
    model = fitted()["fresh" if first.fresh else "one batch"]
    found = features(first)
    values, highest = list(found.values()), 0.5 if found["excess"] >= FARTHEST else HIGH
    score = model["bias"] + sum(weight * value for weight, value in zip(model["weights"], values, strict=False))
    score += sum(leaf(tree, values) for tree in model["trees"])
    return clip(score if model["link"] == "odds" else 1 / (1 + math.exp(-clip(score, -50, 50))), LOW, highest)


def decide(odds: float, certainty: float, *, fresh: bool = True) -> Verdict | None:
    """The verdict that odds are certain enough for; None: look on.

    The thresholds are those at which, among the trainings of the fitted half on which a verdict was reached by looking
    on from checkpoint to checkpoint, at most a share of 1 − certainty of those that learn and of those that fail were
    told wrongly, by odds of cross-validation, and most were decided (selective classification with controlled risk,
    Geifman & El-Yaniv 2017, https://arxiv.org/abs/1705.08500, for each class apart).
    """
    upper, lower = thresholds(certainty, fresh)
    if odds > upper:
        return "trains"
    return "will not train" if odds < lower else None


@cache
def thresholds(certainty: float, fresh: bool) -> tuple[float, float]:
    """The odds above which the verdict is "trains", and below which it is "will not train"; those of the next higher
    certainty that was calibrated. Above all of them, only a loss beyond hope decides.
    """
    table = calibration(fresh)
    upper, lower = next(((up, low) for known, up, low in table if known >= certainty - 1e-9), (1.0, 2 * LOW))
    return max(upper, 0.5), min(lower, 0.5)


def highest_certainty(fresh: bool) -> float:
    """The highest certainty that was calibrated."""
    return max(certainty for certainty, _, _ in calibration(fresh))


def calibration(fresh: bool) -> Sequence[tuple[float, float, float]]:
    """Certainties with their upper and lower thresholds, rising."""
    return fitted()["fresh" if fresh else "one batch"]["thresholds"]


@cache
def fitted() -> dict[str, Any]:
    """The fitted models."""
    models = json.loads(Path(__file__).with_name("odds.json").read_text(encoding="utf-8"))
    return {mode: model | {"trees": unpacked(**model["trees"])} for mode, model in models.items()}


Tree = tuple[Any, ...]
"""(feature, threshold, left subtree, right subtree), or (value,) of a leaf."""


def unpacked(features: Sequence[int], thresholds: Sequence[float], leaves: Sequence[float]) -> list[Tree]:
    """Trees from their columns: features of all nodes, each before its left and its right subtree, −1 for a leaf.

    >>> unpacked([3, -1, -1, -1], [0.5], [1.0, 2.0, 4.0])
    [(3, 0.5, (1.0,), (2.0,)), (4.0,)]
    """
    nodes, threshold, value = iter(features), iter(thresholds), iter(leaves)

    def tree(feature: int) -> Tree:
        return (next(value),) if feature < 0 else (feature, next(threshold), tree(next(nodes)), tree(next(nodes)))

    return [tree(feature) for feature in nodes]


def leaf(node: Tree, values: Sequence[float]) -> float:
    """The value of the leaf that the features reach; a node is (feature, threshold, left, right), a leaf (value,)."""
    while len(node) > 1:
        node = node[2] if values[node[0]] <= node[1] else node[3]
    return node[0]


def trend(values: Sequence[float], least: float = 1e-9) -> tuple[float, float]:
    """Slope per step of a straight line through values, and its standard error."""
    count = len(values)
    mean, centre = fmean(values), (count - 1) / 2
    spread = max(sum((k - centre) ** 2 for k in range(count)), 1e-12)
    slope = sum((k - centre) * (value - mean) for k, value in enumerate(values)) / spread
    rest = sum((value - mean - slope * (k - centre)) ** 2 for k, value in enumerate(values))
    return slope, max(math.sqrt(rest / max(count - 2, 1) / spread), least)


def clip(value: float, low: float, high: float) -> float:
    """A value within bounds; the lower one for what is no number."""
    return low if math.isnan(value) else min(max(value, low), high)


def squash(score: float) -> float:
    """A z-score, linear near 0 and bounded."""
    return FAR * math.tanh(clip(score, -1e6, 1e6) / FAR)


def magnitude(share: float) -> float:
    """Signed logarithm, linear below a millionth."""
    return math.copysign(math.log10(1 + abs(clip(share, -1e6, 1e6)) * 1e6), share)


def finite_or_zero(value: float) -> float:
    """A number, 0 for what is none."""
    return value if math.isfinite(value) else 0.0
