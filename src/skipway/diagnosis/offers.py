"""Remedies that were tried: each on a copy, whose first steps were looked at as long as the original's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from skipway.diagnosis.findings import LEVELS, Finding, Verdict, format_share
from skipway.diagnosis.odds import CHECKPOINTS, is_hopeless
from skipway.diagnosis.outlook import Cause, Outlook, cause_of, foresee
from skipway.diagnosis.remedies import (
    Case,
    Clip,
    LearningRate,
    Remedy,
    Rescheme,
    Together,
    UnitVariance,
    WarmUp,
)
from skipway.diagnosis.residual_warmup import judged_warmup
from skipway.diagnosis.rule_context import STRUCTURAL, Context, calming
from skipway.diagnosis.settings import USUAL_RATES, Settings
from skipway.diagnosis.subject import Subject, reseed
from skipway.diagnosis.trial import Trial
from skipway.errors import SkipwayError
from skipway.surgery.operation import Operation
from skipway.tracing.module_state import copy_module
from skipway.tracing.restoration import random_states, restored

__all__ = ["GOOD", "Offer", "applied", "rising", "try_remedies"]

CLEAR = 0.2
"""Rise of the odds from which on a remedy is offered."""
ALIKE = 0.1
"""Difference from the best odds up to which the smaller change is the better offer."""
SETTINGS_ALONE = (LearningRate, WarmUp, Clip)
"""Remedies that leave the model as it is."""
GOOD = 0.8
"""Odds from which on nothing further is tried, since no remedy could raise them clearly."""
FAR = 1e4
"""Factor between rates from which on the usual one is tried first."""
LEAST_STEPS = 48
"""Trial steps that a remedy gets, where the allowance holds as many and the original was given up earlier."""


@dataclass(frozen=True)
class Offer:
    """A remedy that was tried.

    Args:
        remedy: what was applied to a copy of the model, or to the settings.
        odds: that the remedied training learns.
        verdict: on it.
    """

    remedy: Remedy
    odds: float
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.remedy}: odds {format_share(self.odds)}, {self.verdict}"


def rising(tried: Sequence[Offer], odds: float, rate: float) -> tuple[Offer, ...]:
    """Those of the tried remedies that raise the odds clearly: first those that train, of them the smallest change."""
    clear = [each for each in tried if each.verdict == "trains" or each.odds > odds + CLEAR]

    best = max((each.odds for each in clear), default=0.0)

    def order(offer: Offer) -> tuple[bool, float, float]:
        trains = offer.verdict == "trains"
        worse = 0.0 if trains or offer.odds > best - ALIKE else 1 - offer.odds
        return not trains, worse, size_of_change(offer.remedy, rate)

    return tuple(sorted(clear, key=order))


def size_of_change(remedy: Remedy, rate: float) -> float:
    """How much a remedy changes, to order those that help alike: settings, then weights, then the architecture."""
    if isinstance(remedy, Together):
        return sum(size_of_change(each, rate) for each in remedy.remedies)
    if isinstance(remedy, LearningRate):
        return abs(math.log10(remedy.value / rate)) / 3
    return 0.4 if isinstance(remedy, SETTINGS_ALONE) else 3.0 if isinstance(remedy, UnitVariance | Rescheme) else 2.0


def applied(
    remedy: Remedy, subject: Subject, settings: Settings, *, inplace: bool = False
) -> tuple[Subject, Settings, tuple[Operation, ...]]:
    """The subject and settings after a remedy, on a copy of the model where it changes that, and the operations that
    were carried out on it.
    """
    parts, operations = remedy.remedies if isinstance(remedy, Together) else (remedy,), []
    for part in parts:
        if isinstance(part, SETTINGS_ALONE):
            settings = part.apply(Case(subject.model, settings, subject.inputs, subject.chain)).settings
            continue
        subject = subject if inplace else replace(subject, model=copy_module(subject.model))
        inplace = True  # a copy from here on
        with restored(random_states(subject.model)):
            reseed(subject.seed)  # the weights that are drawn are those that were tried
            case = part.apply(Case(subject.model, settings, subject.inputs, subject.chain))
        subject, settings = replace(subject, model=case.model), case.settings
        operations += [case.operation] * (case.operation is not None)
    return subject, settings, tuple(operations)


def try_remedies(
    context: Context, findings: Sequence[Finding], *, certainty: float, allowance: float, most: int
) -> tuple[Offer, ...]:
    """Try remedies until two of them train or so many were tried; the model is left as it is.

    Args:
        context: of the diagnosis, whose verdict is not "trains".
        findings: whose remedies are tried.
        certainty: as `diagnose` has it.
        allowance: as `diagnose` has it.
        most: remedies that are tried.
    """
    search = RemedySearch(context, findings, certainty, allowance)
    for remedy in search.candidates():
        if len(search.found) >= most or sum(each.verdict == "trains" for each in search.found.values()) >= 2:
            break
        context.subject.begin(f"remedy {len(search.found) + 1} of at most {most}: {remedy}")
        search.look_at(remedy)
    return tuple(Offer(remedy, each.odds, each.verdict) for remedy, each in search.found.items())


class RemedySearch:
    """The remedies to try, in an order that follows what those before have shown.

    Args:
        context, findings, certainty, allowance: as of `try_remedies`.
    """

    def __init__(self, context: Context, findings: Sequence[Finding], certainty: float, allowance: float) -> None:
        self.context, self.findings, self.certainty = context, findings, certainty
        ahead = context.outlook.ahead
        taken = CHECKPOINTS[0] if ahead is None else len(ahead.losses)
        share = 1.0 if ahead is None else ahead.size / context.subject.size
        steps = context.settings.steps
        self.allowance = max(taken * share / steps, min(allowance, LEAST_STEPS * share / steps))
        self.found: dict[Any, Outlook] = {}

    def look_at(self, remedy: Remedy) -> None:
        """Try one remedy; one that cannot be applied, or whose model fails, is left out."""
        if remedy in self.found:
            return
        with suppress(SkipwayError, RuntimeError, ValueError, TypeError, IndexError):
            subject, settings, _ = applied(remedy, self.context.subject, self.context.settings)
            if subject is not self.context.subject:
                if changes_frozen(self.context.subject.model, subject.model):
                    return
                subject.objective = self.context.subject.objective
                subject.warmup = judged_warmup(subject.model, settings.steps)
            trial = Trial(subject, settings)
            self.found[remedy] = foresee(trial, certainty=self.certainty, allowance=self.allowance)

    def candidates(self) -> Iterator[Remedy]:
        """The remedies: rates where the losses tell a direction, what the findings name, both together, the rest."""
        context = self.context
        cause = None if context.outlook.ahead is None else cause_of(context.outlook.ahead, context.smoothness)
        structural = self.structural()
        if cause in DIRECTIONS:
            blown_up = context.outlook.ahead is not None and is_hopeless(context.outlook.ahead.losses, 0.0)
            built = cause == "rate-too-high" and any(finding.rule in STRUCTURAL for finding in self.findings)
            # a rate too high by orders of magnitude is so whatever else is wrong, unless no rate suits such a stream
            built = built and (not blown_up or self.grows_beyond_rates())
            yield from self.usual_rate(DIRECTIONS[cause] < 1)
            yield from self.rates(DIRECTIONS[cause], 1 if built else 3)
        yield from structural[:2]
        for remedy in [each for each in structural[:2] if each in self.found]:
            yield from self.combined(remedy)
            yield from self.clipped(remedy)
        if cause == "rate-too-high":
            yield WarmUp(max(100, context.settings.steps // 20))
            yield Clip(1.0)
        if cause not in DIRECTIONS:
            yield from self.usual_rate(False)
            yield from self.rates(0.1, 2)
            if not self.helped():
                yield from self.rates(10.0, 2)
        if self.helped():
            return
        yield from structural[2:]
        drawn = [UnitVariance(context.maps)] if context.maps and not context.trained else []
        for remedy in (*calming(context), *drawn):
            yield remedy
            if remedy in self.found:
                yield from self.combined(remedy)

    def grows_beyond_rates(self) -> bool:
        """Whether the stream grows by so many orders of magnitude that no learning rate makes up for it."""
        grown = (each.evidence["growth"] for each in self.findings if each.rule == "stream-grows")
        return any(growth > FAR**2 for growth in grown)  # of a variance

    def structural(self) -> list[Remedy]:
        """The remedies of the findings that change the model, the worst finding's first, the first of each in front."""
        ordered = sorted(self.findings, key=lambda finding: LEVELS.index(finding.level))
        first = [finding.remedies[0] for finding in ordered if finding.remedies]
        others = [remedy for finding in ordered for remedy in finding.remedies[1:]]
        kept = [each for each in (*first, *others) if not isinstance(each, LearningRate | WarmUp)]
        return [each for number, each in enumerate(kept) if each not in kept[:number]]

    def helped(self) -> bool:
        """Whether a remedy that was tried raises the odds clearly."""
        return any(each.odds > self.context.outlook.odds + CLEAR for each in self.found.values())

    def usual_rate(self, lower: bool) -> Iterator[Remedy]:
        """The optimizer's usual rate, where that is orders of magnitude away in the direction that is asked for."""
        settings = self.context.settings
        usual = USUAL_RATES.get(settings.optimizer, 1e-3)
        if usual < settings.rate / FAR if lower else usual > settings.rate * FAR:
            yield LearningRate(usual)

    def rates(self, factor: float, most: int = 3) -> Iterator[Remedy]:
        """Rates further and further from the one that was asked about, and back half-way from one that is too far."""
        before, best = 0.0, 0.0
        for power in (1.0, 2.0, 4.0)[:most]:
            remedy = LearningRate(self.context.settings.rate * factor**power)
            yield remedy
            seen = self.found.get(remedy)
            if seen is None or seen.ahead is None or seen.odds >= GOOD or seen.odds < best - CLEAR:
                return
            cause, best = cause_of(seen.ahead, None), seen.odds
            if cause in DIRECTIONS and (DIRECTIONS[cause] > 1) != (factor > 1):
                yield LearningRate(self.context.settings.rate * factor ** ((before + power) / 2))
                return
            before = power

    def combined(self, remedy: Remedy) -> Iterator[Remedy]:
        """A remedy of the model with the rate that its own losses ask for, twice at most in one direction."""
        seen, factor, cause = self.found.get(remedy), 1.0, None
        for _ in range(2):
            if seen is None or seen.ahead is None or seen.odds > 0.5:
                return
            before, cause = cause, cause_of(seen.ahead, None)
            if cause not in DIRECTIONS or before not in (None, cause):
                return
            factor *= DIRECTIONS[cause]
            both = Together((remedy, LearningRate(self.context.settings.rate * factor)))
            yield both
            seen = self.found.get(both)

    def clipped(self, remedy: Remedy) -> Iterator[Remedy]:
        """A remedy of the model with clipped gradients, where its losses still grow."""
        seen = self.found.get(remedy)
        if seen is None or seen.ahead is None or seen.odds > 0.5 or self.helped():
            return
        if self.context.settings.clip is None and cause_of(seen.ahead, None) == "rate-too-high":
            yield Together((remedy, Clip(1.0)))


def changes_frozen(before: nn.Module, after: nn.Module) -> bool:
    """Whether a remedy has changed the values of weights that are not trained, or taken them out."""
    frozen = {name: each for name, each in weights_of(before).items() if not each.requires_grad}
    now = weights_of(after)
    return any(name not in now or not torch.equal(each, now[name].to(each.dtype)) for name, each in frozen.items())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model, and the weights and biases that it holds as buffers, by name."""
    held = {name: each for name, each in model.named_buffers() if name.rpartition(".")[2] in ("weight", "bias")}
    return {**held, **dict(model.named_parameters())}


DIRECTIONS: dict[Cause | None, float] = {"rate-too-high": 0.1, "rate-too-low": 10.0}
"""Causes that are about the rate alone, with the factor to try first."""
