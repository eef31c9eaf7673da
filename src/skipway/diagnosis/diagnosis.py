"""`diagnose(model, example)`: will the network train, which connection is at fault, why, and what to do."""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from skipway.diagnosis.findings import LEVELS, Finding, Verdict, format_number
from skipway.diagnosis.indicators import UNEQUAL, Indicators, read_indicators
from skipway.diagnosis.measurement import Measurement, measure
from skipway.diagnosis.outlook import outlook, probability
from skipway.diagnosis.passes import look_ahead
from skipway.diagnosis.progress import PassCounter
from skipway.diagnosis.remedies import Case, Remedy
from skipway.diagnosis.residual_warmup import judged_warmup
from skipway.diagnosis.rows import SignalRow, signal_rows
from skipway.diagnosis.rule_context import Context
from skipway.diagnosis.rules import findings_of, verdict_of
from skipway.diagnosis.settings import Settings, settings_of
from skipway.diagnosis.subject import Subject
from skipway.diagnosis.table import as_text, comparison_view, diagnosis_view, remedy_lines
from skipway.errors import SkipwayError, counted
from skipway.optim.roles import parameter_roles
from skipway.probes.objective import Loss
from skipway.tracing import Example, as_batch, unwrap
from skipway.tracing.chain import Chain, WatchedConnection
from skipway.tracing.containers import tensors_in
from skipway.tracing.foreign_errors import ForeignErrors
from skipway.tracing.module_state import copy_module
from skipway.tracing.paths import condense_paths
from skipway.tracing.watch import refuse_scripted
from skipway.validation import check_rule, is_whole

__all__ = ["Diagnosis", "Treatment", "diagnose"]

PASSES = 10
"""Forward-backward passes that a diagnosis takes at most."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Result of `diagnose`: the verdict on a network at its start, what is wrong and what to do.

    `print(diagnosis)` shows the verdict and a line for each finding, `print(diagnosis.table())` the signal at each
    connection and the findings in full, as a rich console prints the diagnosis itself in colours;
    `skipway.report.save(diagnosis, "report.html")` writes a page, a picture or JSON.

    Args:
        verdict: "trains", "trains if" (see `conditions`) or "will not train".
        conditions: of "trains if", in words.
        findings: the worst first.
        measurement: all that was measured.
        settings: optimizer, learning rate and length of the training that was asked about.
        chain: the residual connections, and the additions that are none.
        seconds: time that the diagnosis took.
        subject: the model with its example, targets and loss, for `fix`.
    """

    verdict: Verdict
    conditions: tuple[str, ...]
    findings: tuple[Finding, ...]
    measurement: Measurement = field(repr=False)
    settings: Settings
    chain: Chain[WatchedConnection] = field(repr=False)
    seconds: float
    subject: Subject = field(repr=False)

    @property
    def trains(self) -> bool:
        """Whether the verdict is "trains" or "trains if"."""
        return self.verdict != "will not train"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        """The first remedy of every finding above the level "note", each once, in the findings' order."""
        first = (finding.remedies[0] for finding in self.findings if finding.remedies and finding.level != "note")
        return tuple(dict.fromkeys(first))

    @property
    def largest_rate(self) -> float:
        """The learning rate above which SGD diverges on a quadratic of the loss's sharpness λ: 2/λ, with momentum β
        2(1 + β)/λ (Cohen et al. 2021, https://arxiv.org/abs/2103.00065, sec. 2). Adaptive optimizers rescale λ: for
        them it is 2/λ, and a hint at most.
        """
        return self.measurement.curvature.largest_rate * (1.0 if self.settings.adaptive else 1.9)

    def range_test(self, rates: Sequence[float] | None = None) -> dict[float, float]:
        """Look a few steps ahead at each learning rate, and return the probability that the network trains at it.

        The model is left as it is. Probabilities are those of `benchmarks/trainability`.

        Args:
            rates: learning rates; None: five, half a decade apart, around the one that was asked about.
        """
        around = self.settings.rate
        chances: dict[float, float] = {}
        subject = self.subject
        for rate in rates or [around * 10 ** (step / 2) for step in range(-2, 3)]:
            chosen = self.settings.at(rate)
            ahead = look_ahead(subject, lambda chosen=chosen: chosen.make(subject.model, subject.program))
            chances[rate] = probability(read_indicators(replace(self.measurement, ahead=ahead), chosen))
        return chances

    @property
    def updates(self) -> dict[str, float]:
        """Relative update |Δw|/|w| of the first step: the median over the parameters of each role."""
        by_role: dict[str, list[float]] = {}
        updates = {} if self.measurement.ahead is None else self.measurement.ahead.updates
        roles = parameter_roles(self.subject.model, self.subject.program) if updates else {}
        for name, size in updates.items():
            by_role.setdefault(roles[name].name, []).append(size)
        return {role: median(sizes) for role, sizes in by_role.items()}

    @cached_property
    def rows(self) -> tuple[SignalRow, ...]:
        """The signal at each connection, or at each layer of a network without connections."""
        return signal_rows(self.measurement, self.chain, self.findings)

    @property
    def heading(self) -> tuple[str, ...]:
        """What was diagnosed, in a few words each: the network, its connections, the training and the batch."""
        parts = [type(self.subject.model).__name__, counted(len(self.chain), "residual connection")]
        if not len(self.chain):
            parts = [parts[0], "no residual connection", counted(len(self.measurement.layers), "layer")]
        if self.chain.refused:
            parts.append(f"{counted(len(self.chain.refused), 'other addition')}")
        parts += [str(self.settings), counted(self.subject.size, "sample")]
        return (*parts,) if self.subject.training else (*parts, "evaluation mode")

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was decided about the batch and its training, and could have been decided otherwise: the loss, the axis
        of the samples, the parameters that no optimizer holds.
        """
        objective, outside = self.subject.objective, self.settings.outside
        remarks = [] if objective is None else [f"loss: {objective.description}"]
        asked = self.measurement.asked
        if asked is not None and asked.entropy < UNEQUAL * asked.uniform:
            remarks.append(f"chance: {asked}")
        if self.subject.random_modules:
            remarks.append(
                f"left out at random: {condense_paths(self.subject.random_modules)} in training; the choice is the "
                "same in every pass of the diagnosis"
            )
        remarks += [f"samples: {self.subject.samples.remark}"] if self.subject.samples.remark else []
        if outside:
            stay = f"{counted(len(outside), 'trainable parameter')} in none, which stay as they are"
            remarks.append(f"optimizer: {stay}: {condense_paths(outside)}")
        if several := self.subject.stream_connections:
            unseen = self.rows and all(math.isnan(row.backward) for row in self.rows)
            remarks.append(
                f"streams: {counted(several, 'connection')} of several streams; their numbers are those of all streams "
                f"together, and of a branch as it is written into them ({len(self.chain)} connections measured)"
                + ("; gradients at them are not measured, since one operator writes into all streams" if unseen else "")
            )
        if read := sum(connection.seen.skip == "read" for connection in self.chain):
            remarks.append(
                f"earlier outputs: {counted(read, 'connection')} read a weighted sum of all of them, and nothing is "
                "added to it; the stream is their sum, its gradient that of the newest, and what is carried past a "
                "branch is not measured"
            )
        if mixed := sum(c.seen.skip == "mixed" and c.seen.streams is None for c in self.chain) * (not several):
            remarks.append(
                f"fractions: {counted(mixed, 'connection')} of fractions of a stream; a branch is measured before it "
                "is weighed, and what is carried past it is not"
            )
        return tuple(remarks)

    @property
    def key_numbers(self) -> tuple[tuple[str, float], ...]:
        """The main numbers of the whole network, with their names; what was not measured is left out."""
        measured = self.measurement
        smoothness = measured.jacobians.shattering
        numbers = (
            ("loss", measured.loss),
            ("gradient norm", measured.gradient),
            ("output rms", measured.logits),
            ("output distinctness", measured.distinct),
            ("gradient cosine between samples", measured.noise.agreement),
            ("gradient cosine between neighbouring inputs", math.nan if smoothness is None else smoothness),
            ("sharpness λ", measured.curvature.sharpness),
            ("2/λ", measured.curvature.largest_rate if measured.curvature.sharpness > 0 else math.nan),
            ("effective path length", measured.effective_path),
        )
        kept = ("loss", "gradient norm")
        return tuple((name, value) for name, value in numbers if name in kept or not math.isnan(value))

    def __str__(self) -> str:
        lines = [f"{self.verdict}{': ' + '; '.join(self.conditions) if self.conditions else ''} ({self.settings})"]
        lines += [f"  {remark}" for remark in self.remarks]
        for finding, remedies in zip(self.findings, remedy_lines(self.findings), strict=True):
            lines += [f"  {finding}", *(f"    → {line}" for line in remedies)]
        return "\n".join(lines)

    def __rich__(self) -> Any:
        heading, numbers = self.heading, self.key_numbers
        return diagnosis_view(
            heading, self.verdict, self.conditions, numbers, self.rows, self.findings, remarks=self.remarks
        )

    def table(self) -> str:
        """The diagnosis as plain text of at most 100 columns: a row with bars for each connection, all findings.

        Of more than 40 connections about 20 are shown.
        """
        return as_text(self.__rich__())

    def to_json(self) -> str:
        """The diagnosis without the model, as JSON; numbers that are not finite as strings."""
        content = {
            "verdict": self.verdict,
            "conditions": list(self.conditions),
            "settings": str(self.settings),
            "remarks": list(self.remarks),
            "findings": [finding.to_json() for finding in self.findings],
            "measurement": json_ready(asdict(self.measurement)),
            "connections": [
                {
                    "name": c.name,
                    "skip": c.seen.skip,
                    "kind": c.seen.kind,
                    "norms": list(c.seen.norms),
                    "maps": list(c.seen.maps),
                    "scale": None if c.seen.scale is None else list(c.seen.scale.parameters),
                }
                for c in self.chain
            ],
            "refused": [{"owner": r.owner, "reason": r.reason} for r in self.chain.refused],
            "passes": self.measurement.passes,
            "seconds": self.seconds,
        }
        return json.dumps(content, indent=1)

    def fix(self, *remedies: Remedy, inplace: bool = False) -> Treatment:
        """Apply remedies to a copy of the model, diagnose the copy, and return both as a `Treatment`.

        Args:
            remedies: what to apply, in order. None given: while the verdict is not "trains", the first remedy of the
                worst finding, then a new diagnosis, at most three times.
            inplace: change the model itself instead of a copy. A remedy that builds anew (`Rescheme`) returns another
                model all the same.

        Raises:
            SkipwayError: no remedy is given, and no finding has one.
        """
        return treat(self, remedies, inplace=inplace)


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """Result of `Diagnosis.fix`. `print(treatment)` compares before and after.

    Args:
        model: the mended model.
        settings: to train it with.
        applied: the remedies, in order.
        before, after: the diagnoses.
    """

    model: nn.Module = field(repr=False)
    settings: Settings
    applied: tuple[Remedy, ...] = field(repr=False)
    before: Diagnosis
    after: Diagnosis

    def __rich__(self) -> Any:
        title = f"{type(self.before.subject.model).__name__}, remedies applied:"
        before, after = summary_of(self.before), summary_of(self.after)
        pairs = [(name, before[name] or "–", after[name] or "–") for name in before if before[name] or after[name]]
        verdicts = self.before.verdict, self.after.verdict
        return comparison_view(title, self.applied, verdicts, pairs, self.after.findings)

    def __str__(self) -> str:
        return as_text(self.__rich__())


def summary_of(diagnosis: Diagnosis) -> dict[str, str]:
    """The lines of a diagnosis that are compared with those of another one."""
    measured = diagnosis.measurement
    ahead = [] if measured.ahead is None else [measured.ahead.losses[0], measured.ahead.losses[-1]]
    blamed = [finding for finding in diagnosis.findings if finding.level != "note"]
    worst = dict.fromkeys(finding.rule for finding in blamed if finding.level == blamed[0].level)
    return {
        "condition": "; ".join(diagnosis.conditions),
        "training": str(diagnosis.settings),
        "loss": format_number(measured.loss),
        "gradient norm": format_number(measured.gradient),
        "stream, first → last": first_and_last([row.forward for row in diagnosis.rows]),
        "gradient, first → last": first_and_last([row.backward for row in diagnosis.rows]),
        "output distinctness": format_number(measured.distinct),
        "loss over the first steps": first_and_last(ahead),
        "worst findings": ", ".join(worst) or "none",
    }


def first_and_last(values: Sequence[float]) -> str:
    """The first and the last of the measured values."""
    known = [value for value in values if not math.isnan(value)]
    return f"{format_number(known[0])} → {format_number(known[-1])}" if known else ""


def diagnose(
    model: nn.Module,
    example: Example,
    *,
    targets: Any = None,
    loss: Loss | None = None,
    optimizer: str | torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = "sgd",
    lr: float | None = None,
    weight_decay: float = 0.0,
    warmup: int = 0,
    steps: int = 1000,
    training: bool = True,
    thorough: bool = False,
    seed: int = 0,
) -> Diagnosis:
    """Tell from one batch before training whether a network will train, what is at fault, why, and what to do.

    The model is left alone: its parameters, gradients and buffers, the mode of its modules and the random state are
    afterwards as they were, and no hook stays. It takes at most 10 forward-backward passes over the batch, some of
    them `optimizer`'s first steps, which are taken back, and says on a terminal how long they will take. The verdict
    was right for 84 % of 191 held-out networks, both outcomes weighted equally (`benchmarks/trainability`).

    Args:
        model: any `torch.nn.Module`, on any device, not yet trained.
        example: what the model is called with, 32 to 128 samples, at least 8 (or 4 sequences whose tokens have
            labels): a tensor, a tuple of positional arguments, a mapping of keyword arguments, or a `DataLoader`, whose
            first batch is taken. The samples are on the first axis, or on the second one if targets or outputs tell so.
        targets: what the loss compares the output with, a tensor or one for each part of the output; None: those of
            the `DataLoader`, the next tokens of a language model, else drawn at random.
        loss: (output, targets) → a scalar; None: as `skipway.probes.objective.choose_objective` chooses it, which
            `Diagnosis.remarks` tells: the model's own where it puts one out, else by the shapes of output and targets.
        optimizer: "sgd" (momentum 0.9), "adam", "adamw", "rmsprop", "adagrad", or a torch optimizer made for `model`,
            or several for parts of it, whose classes, groups and learning rates are taken over; they take no step
            themselves, and parameters outside of them stay as they are.
        lr: learning rate of the weights; None: the optimizer's own, else 0.1 for SGD, 0.01 for Adagrad and 0.001 for
            the others.
        weight_decay: of the weights; scales, norms and biases as `skipway.param_groups` has it.
        warmup: planned steps of warm-up.
        steps: planned steps of training; a learning rate that gets nowhere in them is too low.
        training: measure in training mode (batch statistics, dropout); False: in evaluation mode.
        thorough: also measure the largest singular value of every connection's Jacobian by power iteration, at six
            more passes.
        seed: of dropout and of random targets.

    Raises:
        SkipwayError: the model has nothing to train, no values (meta device) or fails on the example; the example has
            fewer than 8 samples; the targets fit no output; the output holds no tensor; the loss is no scalar or
            depends on no parameter.

    >>> import torch, skipway as sw
    >>> model = sw.build("resnet", depth=20, scheme="skipinit(init=1.0, norm='remove')", classes=10, width=8)
    >>> images, labels = torch.randn(32, 3, 16, 16), torch.randint(10, (32,))
    >>> diagnosis = sw.diagnose(model, images, targets=labels, lr=0.1)
    >>> diagnosis.measurement.passes <= 10
    True
    """
    began = time.perf_counter()
    model = unwrap(model)
    inputs, targets = as_batch(example, targets)
    settings = (
        Settings(optimizer=optimizer, weight_decay=weight_decay)
        if isinstance(optimizer, str)
        else settings_of(optimizer, model)
    )
    settings = replace(settings, warmup=warmup, steps=steps, lr=settings.lr if lr is None else lr)
    check_rule("seed", seed, is_whole(seed), "a whole number")
    check_rule("loss", loss, loss is None or callable(loss), "a function (output, targets) → a scalar")
    progress = PassCounter(PASSES + (6 if thorough else 0))
    subject = Subject(model, inputs, targets, loss, training=training, seed=seed, progress=progress)
    try:
        with ForeignErrors(model, inputs):
            check_subject(subject)
            return examine(subject, settings, thorough=thorough, began=began)
    finally:
        progress.finish()


def examine(subject: Subject, settings: Settings, *, thorough: bool = False, began: float | None = None) -> Diagnosis:
    """Measure a subject, judge it, and return the diagnosis."""
    began = time.perf_counter() if began is None else began
    iterations = 3 if thorough else 0
    subject.warmup = judged_warmup(subject.model, settings.steps)
    measurement = measure(subject, lambda: settings.make(subject.model, subject.program), iterations=iterations)
    labelled = subject.objective is None or subject.objective.labelled

    def look_again(rate: float) -> Indicators:
        ahead = look_ahead(subject, lambda: settings.at(rate).make(subject.model, subject.program))
        return read_indicators(replace(measurement, ahead=ahead), settings.at(rate), labelled=labelled)

    indicators = read_indicators(measurement, settings, labelled=labelled)
    expected = outlook(indicators, settings.rate, look_again if measurement.finite else None)
    measurement = replace(measurement, passes=subject.passes)
    context = Context(measurement, settings, subject, expected)
    findings = sorted(findings_of(context), key=lambda finding: LEVELS.index(finding.level))
    verdict, conditions = verdict_of(findings)
    return Diagnosis(
        verdict=verdict,
        conditions=conditions,
        findings=tuple(findings),
        measurement=measurement,
        settings=settings,
        chain=subject.chain,
        seconds=time.perf_counter() - began,
        subject=subject,
    )


def treat(diagnosis: Diagnosis, remedies: Sequence[Remedy], *, inplace: bool, rounds: int = 3) -> Treatment:
    """Apply the given remedies, or without any the best ones until the verdict is "trains", at most `rounds` times."""
    subject = diagnosis.subject
    if not remedies and not diagnosis.remedies:
        raise SkipwayError(
            f"fix(): the verdict is {diagnosis.verdict!r} and no finding names a remedy; give one of "
            "skipway.diagnosis.remedies: fix(Damp())"
        )
    model = subject.model if inplace else copy_module(subject.model)
    applied: list[Remedy] = []
    current = diagnosis
    case = Case(model, diagnosis.settings, subject.inputs, subject.chain)
    waiting = list(remedies)
    for _ in range(len(remedies) or rounds):
        following = waiting.pop(0) if waiting else next((r for r in current.remedies if r not in applied), None)
        if following is None:
            break
        fresh = replace(subject, model=case.model)
        case = following.apply(replace(case, chain=fresh.chain))
        applied.append(following)
        current = examine(replace(subject, model=case.model), case.settings)
        if not remedies and current.verdict == "trains":
            break
    return Treatment(model=case.model, settings=case.settings, applied=tuple(applied), before=diagnosis, after=current)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value of a tensor that can be read, a dense one on a real device, is finite."""
    looked_at = tensor.is_floating_point() and tensor.layout is torch.strided and not tensor.is_nested
    return not looked_at or tensor.is_meta or bool(tensor.isfinite().all())


def check_subject(subject: Subject) -> None:
    """Refuse, before anything runs, what cannot be diagnosed."""
    refuse_scripted(subject.model)
    if isinstance(subject.inputs, tuple):
        try:
            inspect.signature(subject.model.forward).bind(*subject.inputs)
        except TypeError as error:
            raise SkipwayError(
                f"example=({', '.join(type(part).__name__ for part in subject.inputs)}): a tuple is positional "
                f"arguments, and {type(subject.model).__name__}.forward refuses them ({error}); targets go to targets="
            ) from error
    if not subject.parameters:
        raise SkipwayError(
            f"model={type(subject.model).__name__}: no parameter has requires_grad=True, so there is nothing to train; "
            "unfreeze some"
        )
    if any(parameter.is_meta for parameter in subject.model.parameters()):
        raise SkipwayError(
            f"model={type(subject.model).__name__}: on the meta device it has no values to measure; initialise it on a "
            "real device, or look at its connections alone: skipway.chain(model, example)"
        )
    for name, given in (("example", subject.inputs), ("targets", subject.targets)):
        if not all(map(is_finite, tensors_in(given))):
            raise SkipwayError(f"{name} with values that are not finite: the rule is finite numbers")
    if subject.size < (4 if subject.terms >= 8 else 8):
        raise SkipwayError(
            f"example of {counted(subject.size, 'sample')}: the rule is at least 8 (4 sequences whose tokens have "
            "labels), 32 to 128 are better; give a larger batch"
        )


def json_ready(value: Any) -> Any:
    """A value as JSON can hold it: numbers that are not finite become strings."""
    if isinstance(value, dict):
        return {str(key): json_ready(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(entry) for entry in value]
    if isinstance(value, Tensor):
        return json_ready(value.tolist())
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
