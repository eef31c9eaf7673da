"""The verdict from trial steps, which go on until the odds are certain or the allowance is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist, linear_regression, mean, stdev
from typing import Literal

from skipway.diagnosis.findings import Verdict, format_number, format_share
from skipway.diagnosis.odds import CHECKPOINTS, HIGH, decide, highest_certainty, odds, thresholds
from skipway.diagnosis.trial import LookAhead, Trial
from skipway.errors import counted, duration

__all__ = ["Cause", "NextLook", "Outlook", "cause_of", "foresee", "odds_of"]

Cause = Literal["rate-too-high", "rate-too-low", "does-not-learn", "shattered"]
ODDS = "odds of training"
ENOUGH_BY_HEART = 16
"""Samples with random labels that it says something to learn by heart."""


@dataclass(frozen=True)
class NextLook:
    """What would probably decide an undecided verdict.

    Args:
        steps: further trial steps.
        allowance: that a diagnosis with as many needs.
        seconds: that they take.
    """

    steps: int
    allowance: float
    seconds: float

    def __str__(self) -> str:
        more = f"{self.steps:,} more trial steps would probably decide it"
        return f"{more}: allowance={self.allowance:.2g}, about {duration(self.seconds)}"


@dataclass(frozen=True)
class Outlook:
    """A verdict from trial steps.

    Args:
        verdict: "trains", "will not train" or "undecided".
        odds: calibrated probability that the planned training learns.
        ahead: the trial steps; None where the loss is not finite before the first one.
        next_look: what would decide an undecided verdict; None where it is decided, or where longer looks are not
            calibrated.
    """

    verdict: Verdict
    odds: float
    ahead: LookAhead | None = None
    next_look: NextLook | None = None

    @property
    def text(self) -> str:
        """What the trial steps did to the loss, in one sentence with its numbers."""
        ahead = self.ahead
        if ahead is None:
            return "the loss is not finite before the first step"
        steps = counted(len(ahead.losses), "trial step")
        late = ahead.losses[len(ahead.losses) // 2 :]
        became = format_number(mean(late)) if all(map(math.isfinite, late)) else "a number that is not finite"
        answer = "" if ahead.constant is None else f"; the best constant answer has {format_number(ahead.constant)}"
        change = f"{steps} take the loss from {format_number(ahead.losses[0])} to {became}"
        return f"{change}{answer}; odds {format_share(self.odds)}"

    @property
    def evidence(self) -> Mapping[str, float]:
        """The odds and the losses that they rest on."""
        ahead = self.ahead
        found = {ODDS: self.odds}
        if ahead is not None:
            found |= {"trial steps": float(len(ahead.losses)), "first loss": ahead.losses[0]}
            found |= {"last losses": mean(ahead.losses[len(ahead.losses) // 2 :])}
            found |= {} if ahead.constant is None else {"loss of the best constant answer": ahead.constant}
            found |= {"held-out loss before": ahead.unseen[0], "held-out loss after": ahead.unseen[1]}
            found |= {"relative change of the weights": ahead.moved, "first decrease over predicted": ahead.trust}
        return found


def foresee(trial: Trial, *, certainty: float, allowance: float) -> Outlook:
    """Take trial steps until the odds are certain or the allowance is spent, and return the verdict.

    Args:
        trial: of the planned training; it is advanced.
        certainty: see `skipway.diagnosis.odds.decide`.
        allowance: share of the planned training that the steps may cost; the first checkpoint is reached all the same.
    """
    planned = trial.settings.steps
    trial.advance(1)  # what a step costs is known when the loss is
    most = max(CHECKPOINTS[0], min(int(allowance * planned / trial.share), CHECKPOINTS[-1], planned))
    chance, verdict = 0.0, None
    for step in (*(each for each in CHECKPOINTS if each < most), most):
        trial.advance(step)
        chance = odds_of(trial)
        verdict = decide(chance, certainty, fresh=trial.fresh)
        if verdict is not None or trial.ended:
            break
    ahead = trial.result()
    if verdict is not None:
        return Outlook(verdict, chance, ahead)
    return Outlook("undecided", chance, ahead, next_look(trial, chance, certainty))


def odds_of(trial: Trial) -> float:
    """The odds that a training learns whose first steps a trial has taken.

    Labels that are drawn at random can be learnt by heart, down to a loss of 0: trial steps that have come half-way
    there have done what is asked about, unless the samples are so few that any network learns them by heart.
    """
    first = trial.first_steps()
    enough = trial.size * len(trial.parts) >= ENOUGH_BY_HEART
    if not trial.subject.labelled and enough and mean(first.losses[-3:]) < first.unit / 2:
        return HIGH
    return odds(first)


def next_look(trial: Trial, chance: float, certainty: float) -> NextLook | None:
    """The checkpoint at which the odds pass the nearer threshold if they go on as they do, their deviate growing as
    √steps; None where no further checkpoint, or no such certainty, was calibrated.
    """
    taken, normal = len(trial.losses), NormalDist()
    deviate = normal.inv_cdf(min(max(chance, 1e-9), 1 - 1e-9))
    following = [each for each in CHECKPOINTS if each >= 1.3 * taken]
    if not following or trial.settings.steps <= taken or certainty > highest_certainty(trial.fresh):
        return None
    if abs(deviate) < 1e-3:  # odds that are even, as those of losses beyond all that was fitted, go nowhere
        return None
    upper, lower = thresholds(certainty, trial.fresh)
    wanted = normal.inv_cdf(upper if deviate > 0 else lower)
    needed = taken * min((wanted / max(abs(deviate), 0.1)) ** 2, 100)
    step = min(next((each for each in following if each >= needed), following[-1]), trial.settings.steps)
    share = step * trial.share / trial.settings.steps
    rounded = math.ceil(share * 10 ** (digits := 1 - math.floor(math.log10(share)))) / 10**digits
    return NextLook(step - taken, rounded, (step - taken) * trial.seconds / taken)


OWN_LENGTH, AT_REST = 0.5, 0.98
"""|w − w₀|/|w₀| after the trial steps that says the steps are long, and share of the best constant answer's loss above
which nothing is learnt.
"""
GROWN, STEADY = 0.05, 3.0
"""Growth of the loss, as a share of its start, that counts as such, and standard errors of the slope from which on it
falls.
"""


def cause_of(ahead: LookAhead, smoothness: float | None) -> Cause:
    """The most likely reason for a bad verdict, told by the losses of the trial steps.

    Losses that grow say that the rate is too high, and so do weights that have moved by more than their own length
    while the loss is no better than the best constant answer's: such steps have destroyed the network. Losses that
    fall, steadily but not far enough, or weights that hardly move where the first step did what its gradient promised,
    say that it is too low.

    Args:
        ahead: the trial steps.
        smoothness: cosine between the input's gradients at neighbouring inputs; None where it is not known.
    """
    losses, late = ahead.losses, ahead.losses[len(ahead.losses) // 2 :]
    if smoothness is not None and smoothness < 0.05 and ahead.trust < 1e-4:
        return "shattered"
    start = max(mean(losses[:3]), losses[0])
    if not all(map(math.isfinite, losses)) or mean(late) - start > GROWN * abs(start):
        return "rate-too-high"
    constant = ahead.constant
    at_rest = constant is not None and mean(late) > constant - (1 - AT_REST) * abs(constant)
    if ahead.moved > OWN_LENGTH and at_rest:
        return "rate-too-high"
    if deviate_of_slope(losses) < -STEADY or (ahead.moved < 1e-3 and ahead.trust > 0.5):
        return "rate-too-low"
    return "does-not-learn"


def deviate_of_slope(losses: tuple[float, ...]) -> float:
    """The slope of the losses over the steps, in standard errors; 0 of fewer than three."""
    steps = range(len(losses))
    if len(losses) < 3:
        return 0.0
    slope, intercept = linear_regression(steps, losses)
    error = stdev(loss - slope * step - intercept for step, loss in zip(steps, losses, strict=True))
    spread = math.sqrt(len(losses)) * stdev(steps)
    return slope * spread / error if error else math.copysign(math.inf, slope) if slope else 0.0


REASONS: dict[Cause, str] = {
    "rate-too-high": "Steps that are too long overshoot and raise the loss instead of lowering it.",
    "rate-too-low": "The planned steps end before anything is learned.",
    "shattered": "The loss is so rugged that its gradient says nothing about the outcome of a step: gradients at "
    "neighbouring inputs are unrelated.",
    "does-not-learn": "A network that learns falls below the best constant answer; this one learns at most how "
    "frequent the answers are.",
}
SOURCES: dict[Cause, str] = {
    "shattered": "Balduzzi et al. 2017 (https://arxiv.org/abs/1702.08591)",
}
MEASURED = "measured: first losses of trainings, benchmarks/trainability"
