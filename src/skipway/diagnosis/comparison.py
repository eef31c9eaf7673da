"""`Comparison`: several designs side by side, each looked at equally long, and which of them to train."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from skipway.diagnosis.diagnosis import Diagnosis, json_ready
from skipway.diagnosis.findings import Finding, format_number
from skipway.diagnosis.odds import CHECKPOINTS
from skipway.diagnosis.subject import reseed
from skipway.diagnosis.table import as_text, comparison_view, verdict_text
from skipway.diagnosis.trial import Trial
from skipway.errors import SkipwayError, counted
from skipway.probes.confidence import mean_bound

if TYPE_CHECKING:
    from skipway.diagnosis.offers import Offer

__all__ = ["ComparedModel", "Comparison", "LossDifference", "compare_diagnoses", "model_names"]

BATCHES = 8
"""Fresh batches on which designs are compared after their trial steps."""
ALIKE = 1.3
"""Ratio up to which the times of a step count as equal: a few passes on a busy machine do not measure better."""
ESTIMATED = 0.3
"""Share by which best constant answers differ that were found from different batches of one loader."""
ROUNDS, SHORT, MOST_ROUNDS = 5, 0.3, 40
"""Times that the pass of a step is measured, all designs in turn; more often while that takes less than 0.3 s."""
RANKS = {"trains": 0, "undecided": 1, "will not train": 2}


@dataclass(frozen=True)
class LossDifference:
    """How far the losses of two designs are apart on the same batches, after trial steps of the same cost.

    Args:
        first, second: names.
        values: loss of the second minus loss of the first, for each batch.
    """

    first: str
    second: str
    values: tuple[float, ...] = field(repr=False)

    @property
    def mean(self) -> float:
        """Mean difference."""
        return fmean(self.values)

    @property
    def bound(self) -> float:
        """Half width of the 95 % interval of the mean, over batches; other seeds would add to it."""
        return mean_bound(self.values)

    @property
    def told_apart(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.mean) > self.bound

    def __str__(self) -> str:
        size = f"{self.mean:+.2g} ± {self.bound:.1g}"
        return size if self.told_apart else f"{size}, not told apart"


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """One of several designs.

    Args:
        name: that it was given.
        diagnosis: of it; None where that failed.
        reason: why it failed.
        losses: on the batches that all are compared on, after the trial steps.
        curve: loss of the batch of each of these steps, before it.
        step_seconds: of a pass forward and backward over the batch of a step; NaN where none was taken.
    """

    name: str
    diagnosis: Diagnosis | None = field(default=None, repr=False)
    reason: str = ""
    losses: tuple[float, ...] = field(default=(), repr=False)
    curve: tuple[float, ...] = field(default=(), repr=False)
    step_seconds: float = math.nan

    @property
    def steps(self) -> int:
        """Trial steps that it took, of equal cost for all."""
        return len(self.curve)

    @property
    def loss(self) -> float:
        """Mean loss after the trial steps; NaN where there is none."""
        return fmean(self.losses) if self.losses else math.nan

    @property
    def parameters(self) -> int | None:
        """Number of parameters; None where the diagnosis failed."""
        return None if self.diagnosis is None else sum(p.numel() for p in self.diagnosis.subject.model.parameters())

    @property
    def verdict(self) -> str:
        """The verdict with its odds, or "failed"."""
        return "failed" if self.diagnosis is None else verdict_text(self.diagnosis.verdict, self.diagnosis.odds)

    @property
    def finding(self) -> Finding | None:
        """The worst finding; None where there is none."""
        return None if self.diagnosis is None else next(iter(self.diagnosis.findings), None)

    @property
    def offer(self) -> Offer | None:
        """The best offer; None where there is none."""
        return None if self.diagnosis is None else next(iter(self.diagnosis.offers), None)

    @property
    def signals(self) -> dict[str, str]:
        """Stream and gradient from the first connection to the last, and how far outputs differ."""
        if self.diagnosis is None:
            return {}
        rows, distinct = self.diagnosis.rows, self.diagnosis.measurement.distinct
        return {
            "stream": ends_of([row.forward for row in rows]),
            "gradient": ends_of([row.backward for row in rows]),
            "distinctness": "–" if math.isnan(distinct) else format_number(distinct),
        }

    def to_json(self) -> dict[str, Any]:
        """The row as values that JSON can hold, with the whole diagnosis."""
        if self.diagnosis is None:
            return {"name": self.name, "failed": self.reason}
        return {
            "name": self.name,
            "loss": self.loss if math.isfinite(self.loss) else str(self.loss),
            "steps": self.steps,
            "seconds per step": self.step_seconds if math.isfinite(self.step_seconds) else None,
            "parameters": self.parameters,
            "diagnosis": json.loads(self.diagnosis.to_json()),
        }


def ends_of(values: Sequence[float]) -> str:
    """The first and the last of the measured values."""
    known = [value for value in values if not math.isnan(value)]
    return f"{format_number(known[0])} → {format_number(known[-1])}" if known else "–"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Result of `diagnose` for several models: a row for each, the one to train first.

    Those that train come first, then the undecided, those that will not train, and those that failed; among equal
    verdicts the lower loss after trial steps of the same cost, where losses can be compared, else the higher odds.
    `print(comparison)` shows the table, `comparison["name"]` is the diagnosis of one.

    Args:
        rows: in that order.
        comparable: whether all losses are of the same kind and on the same batches.
        remarks: on what was compared.
    """

    rows: tuple[ComparedModel, ...]
    comparable: bool
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ComparedModel]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> Diagnosis:
        row = next((row for row in self.rows if row.name == name), None)
        if row is None:
            raise KeyError(name)
        if row.diagnosis is None:
            raise SkipwayError(f"{name} could not be diagnosed: {row.reason}")
        return row.diagnosis

    @cached_property
    def differences(self) -> dict[str, LossDifference]:
        """Difference of each row's loss from the first row's, by name; empty where losses cannot be compared."""
        first, *others = self.rows
        if not self.comparable or not all(map(math.isfinite, first.losses or [math.nan])):
            return {}
        finite = [row for row in others if row.losses and all(map(math.isfinite, row.losses))]
        return {
            row.name: LossDifference(
                first.name, row.name, tuple(b - a for a, b in zip(first.losses, row.losses, strict=True))
            )
            for row in finite
        }

    @property
    def best(self) -> tuple[str, ...]:
        """The designs to train: the first row if it trains, and those that train and are not told apart from it."""
        first = self.rows[0]
        if first.diagnosis is None or not first.diagnosis.trains:
            return ()
        equal = [name for name, each in self.differences.items() if not each.told_apart]
        unknown = [] if self.comparable else [row.name for row in self.rows[1:] if row.diagnosis is not None]
        return (first.name, *(name for name in (*equal, *unknown) if self[name].trains))

    @property
    def answer(self) -> str:
        """Which to train, in one sentence."""
        if not self.best:
            return "None of them trains as planned." if not self.undecided else "None of them is sure to train."
        if len(self.best) == 1:
            return f"Train {self.best[0]}."
        names = f"{', '.join(self.best[:-1])} and {self.best[-1]}"
        if not self.comparable:
            return f"{names} train; their losses cannot be compared."
        return f"{names} train, and cannot be told apart after so few steps."

    @property
    def undecided(self) -> tuple[str, ...]:
        """Names of the undecided ones."""
        return tuple(r.name for r in self.rows if r.diagnosis is not None and r.diagnosis.verdict == "undecided")

    def __rich__(self) -> Any:
        return comparison_view(self)

    def __str__(self) -> str:
        return as_text(comparison_view(self))

    def to_json(self) -> str:
        """The comparison with the diagnoses as JSON; numbers that are not finite as strings."""
        content = {
            "best": list(self.best),
            "undecided": list(self.undecided),
            "comparable": self.comparable,
            "remarks": list(self.remarks),
            "models": [row.to_json() for row in self.rows],
            "differences": [
                {"first": d.first, "second": d.second, "mean": d.mean, "bound": d.bound, "told apart": d.told_apart}
                for d in self.differences.values()
            ],
        }
        return json.dumps(json_ready(content), indent=1)


def model_names(models: Sequence[nn.Module] | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Models by name: of a sequence their classes, numbered where several have the same.

    Raises:
        SkipwayError: there is none, or one is no module.

    >>> list(model_names([nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)]))
    ['Linear 1', 'ReLU', 'Linear 2']
    """
    if isinstance(models, Mapping):
        named = {str(name): model for name, model in models.items()}
    else:
        kinds = [type(model).__name__ for model in models]
        numbers = [f" {kinds[: n + 1].count(kind)}" if kinds.count(kind) > 1 else "" for n, kind in enumerate(kinds)]
        named = {f"{kind}{number}": model for kind, number, model in zip(kinds, numbers, models, strict=True)}
    for name, model in named.items():
        if not isinstance(model, nn.Module):
            raise SkipwayError(f"model {name!r} is a {type(model).__name__}; the rule is a torch.nn.Module")
    if not named:
        raise SkipwayError(f"model={models!r}: the rule is one model or more")
    return named


def compare_diagnoses(outcomes: Mapping[str, Diagnosis | SkipwayError], *, allowance: float) -> Comparison:
    """Take trial steps of the same cost with every design, compare losses on the same batches, and order the designs.

    One trial is held at a time.

    Args:
        outcomes: diagnoses by name, or why there is none.
        allowance: share of the planned training that the slowest may take.
    """
    diagnoses = {name: each for name, each in outcomes.items() if not isinstance(each, SkipwayError)}
    looked_at = {name: each for name, each in diagnoses.items() if each.measurement.ahead is not None}
    seconds = pass_seconds(looked_at)
    steps = equal_steps(looked_at, seconds, allowance)
    behind = max(steps.values(), default=0)
    looks = {name: look_equally(each, steps[name], behind) for name, each in looked_at.items()}
    rows = [
        ComparedModel(
            name=name,
            diagnosis=diagnoses.get(name),
            reason="" if name in diagnoses else str(outcome),
            curve=looks[name][0] if name in looks else (),
            losses=looks[name][1] if name in looks else (),
            step_seconds=seconds.get(name, math.nan),
        )
        for name, outcome in outcomes.items()
    ]
    comparable = are_alike(list(looked_at.values()))
    kinds = "; ".join(dict.fromkeys(map(loss_kind, looked_at.values())))
    remarks = [] if comparable else [f"losses are not compared: {kinds}"]
    if comparable and any(not each.measurement.ahead.fresh for each in looked_at.values()):  # type: ignore[union-attr]
        remarks.append("losses are on the batch that the trial steps saw; a loader gives fresh ones")

    def place(row: ComparedModel) -> tuple[float, ...]:
        if row.diagnosis is None:
            return (3.0,)
        known = comparable and math.isfinite(row.loss)
        return (RANKS[row.diagnosis.verdict], not known, row.loss if known else -row.diagnosis.odds)

    return Comparison(rows=tuple(sorted(rows, key=place)), comparable=comparable, remarks=tuple(remarks))


def are_alike(diagnoses: Sequence[Diagnosis]) -> bool:
    """Whether losses can be compared: the same of as many samples. Of losses that the models compute themselves, or to
    targets drawn at random, words do not tell what they are; their best constant answers do, as closely as these are
    known.
    """
    objectives = [each.subject.objective for each in diagnoses]
    words = {(each and each.description, one.subject.size) for each, one in zip(objectives, diagnoses, strict=True)}
    if len(words) > 1 or all(each is not None and each.labelled and not each.own for each in objectives):
        return len(words) < 2
    aheads = [each.measurement.ahead for each in diagnoses]
    known = [each.constant for each in aheads if each is not None and each.constant is not None]
    fresh = any(each is not None and each.fresh for each in aheads)
    gap = max(known, default=0.0) - min(known, default=0.0)
    return len(known) in (0, len(aheads)) and gap <= (ESTIMATED if fresh else 0.01) * max(map(abs, known), default=0.0)


def loss_kind(diagnosis: Diagnosis) -> str:
    """What a loss is of, in words."""
    subject, ahead = diagnosis.subject, diagnosis.measurement.ahead
    known = "" if ahead is None or ahead.constant is None else f", best constant answer {ahead.constant:.3g}"
    loss = "" if subject.objective is None else subject.objective.description
    return f"{loss} ({counted(subject.size, 'sample')}{known})"


def pass_seconds(diagnoses: Mapping[str, Diagnosis]) -> dict[str, float]:
    """Seconds of a pass forward and backward over the batch of a step, by name: the least of several, taken in
    turns, since other work on the machine only adds to it.
    """
    seconds, first = dict.fromkeys(diagnoses, math.inf), time.perf_counter()
    for turn in range(MOST_ROUNDS):
        if turn >= ROUNDS and time.perf_counter() - first > SHORT:
            break
        for name, diagnosis in diagnoses.items():
            subject, ahead = diagnosis.subject, diagnosis.measurement.ahead
            fresh = ahead is not None and ahead.fresh and subject.batches is not None
            part = subject.batches.first if fresh else subject.part(0, subject.chunk)  # type: ignore[union-attr]
            devices = {parameter.device for parameter in subject.parameters.values() if parameter.is_cuda}
            began = time.perf_counter()
            subject.gradients(part)
            for device in devices:
                torch.cuda.synchronize(device)
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds


def equal_steps(diagnoses: Mapping[str, Diagnosis], seconds: Mapping[str, float], allowance: float) -> dict[str, int]:
    """Trial steps of every design that take equally long: as long as the longest look so far, and as the allowance of
    the slowest; not more than are planned.

    Args:
        seconds: of a step, by name. Times that differ by less than by a third count as equal.
    """
    slowest = max(seconds.values(), default=0.0)
    even = {name: slowest if slowest < ALIKE * each else each for name, each in seconds.items()}
    taken = {name: len(each.measurement.ahead.losses) for name, each in diagnoses.items()}  # type: ignore[union-attr]
    allowed = {
        name: min(allowance * d.settings.steps / step_share(d), CHECKPOINTS[-1]) for name, d in diagnoses.items()
    }
    least = [allowed[name] * slowest for name in diagnoses if even[name] == slowest]
    budget = max([*least, *(taken[name] * even[name] for name in diagnoses)], default=0.0)
    planned = {name: each.settings.steps for name, each in diagnoses.items()}
    return {name: min(max(round(budget / even[name]), 1), planned[name]) for name in diagnoses}


def step_share(diagnosis: Diagnosis) -> float:
    """What a trial step costs in steps of the planned training, see `Trial.share`."""
    ahead = diagnosis.measurement.ahead
    return 1.0 if ahead is None or ahead.fresh else ahead.size / diagnosis.subject.size


def look_equally(diagnosis: Diagnosis, steps: int, behind: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The losses of trial steps, and then those on fresh batches behind the first so many, or on the parts of the one
    batch; infinite where the steps diverged.
    """
    subject = diagnosis.subject
    trial = Trial(subject, diagnosis.settings).advance(steps)
    with subject.running(), trial.in_place(), torch.no_grad():
        parts = trial.parts
        if trial.fresh and subject.batches is not None:
            parts = list(islice(subject.batches, behind + 1, behind + 1 + BATCHES))  # the first is held out
        found = []
        for number, part in enumerate(parts):
            reseed(subject.seed + number)
            output = subject.call(part)
            reseed(subject.seed + number)  # of labels that are drawn at random, the ones that were trained on
            found.append(float(subject.value(output, part)))
    whole = not trial.ended and all(map(math.isfinite, found))
    return tuple(trial.losses), tuple(found) if whole else (math.inf,) * len(found)
