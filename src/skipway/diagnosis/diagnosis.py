"""`diagnose(model, example)`: will the network train, which connection is at fault, why, and what to do."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import Any

from torch import Tensor, nn

from skipway.diagnosis.findings import LEVELS, Finding, Verdict, format_number, format_share
from skipway.diagnosis.measurement import Measurement, measure
from skipway.diagnosis.odds import CHECKPOINTS, highest_certainty
from skipway.diagnosis.offers import GOOD, Offer, applied, rising, try_remedies
from skipway.diagnosis.outlook import NextLook, Outlook, foresee
from skipway.diagnosis.passes import is_narrow
from skipway.diagnosis.remedies import Remedy
from skipway.diagnosis.residual_warmup import judged_warmup
from skipway.diagnosis.rows import SignalRow, signal_rows
from skipway.diagnosis.rule_context import HOLLOW, Context
from skipway.diagnosis.rules import blame, causes_of
from skipway.diagnosis.settings import Settings
from skipway.diagnosis.subject import Subject
from skipway.diagnosis.table import as_text, diagnosis_view, offer_lines, remedy_lines, treatment_view
from skipway.diagnosis.trial import LookAhead, Trial
from skipway.errors import SkipwayError, counted
from skipway.optim.roles import parameter_roles
from skipway.surgery.operation import Operation
from skipway.surgery.transaction import transaction
from skipway.tracing.chain import Chain, WatchedConnection
from skipway.tracing.module_state import copy_module
from skipway.tracing.paths import condense_paths

__all__ = ["PASSES", "Diagnosis", "Treatment", "examine"]

PASSES = 6
"""Forward-backward passes over the batch that a diagnosis takes beside its trial steps, at most."""
UNEQUAL = 0.95
"""Share of log(classes) up to which the entropy of the targets counts as that of classes of unequal frequency."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Result of `diagnose`: the verdict on a network at its start, what is wrong and what to do.

    `print(diagnosis)` shows the verdict and a line for each finding, `print(diagnosis.table())` the signal at each
    connection and the findings in full, as a rich console prints the diagnosis itself in colours;
    `skipway.report.save(diagnosis, "report.html")` writes a page, a picture or JSON.

    Args:
        verdict: "trains", "will not train" or "undecided".
        odds: calibrated probability that the planned training learns: that it gets at least half-way from the best
            constant answer to what a good recipe reaches in the planned steps.
        next_look: what would probably decide an undecided verdict, and what that costs; else None.
        findings: the worst first.
        tried: remedies that were tried where the verdict is not "trains", in this order; see `offers`.
        measurement: all that was measured.
        settings: optimizer, learning rate and length of the training that was asked about.
        chain: the residual connections, and the additions that are none.
        seconds: time that the diagnosis took.
        subject: the model with its example, targets and loss, for `fix`.
        certainty, allowance: as `diagnose` was called with.
    """

    verdict: Verdict
    odds: float
    next_look: NextLook | None
    findings: tuple[Finding, ...]
    tried: tuple[Offer, ...] = field(repr=False)
    measurement: Measurement = field(repr=False)
    settings: Settings
    chain: Chain[WatchedConnection] = field(repr=False)
    seconds: float
    subject: Subject = field(repr=False)
    certainty: float = field(default=0.95, repr=False)
    allowance: float = field(default=0.03, repr=False)

    @property
    def trains(self) -> bool:
        """Whether the verdict is "trains"."""
        return self.verdict == "trains"

    @property
    def grounds(self) -> tuple[str, ...]:
        """The odds and, of an undecided verdict, what would decide it, in words."""
        ahead = self.measurement.ahead
        deciding = "" if self.next_look is None else str(self.next_look)
        if self.verdict == "undecided" and self.next_look is None:
            deciding = f"no look beyond {CHECKPOINTS[-1]} steps was calibrated"
            if ahead is not None and len(ahead.losses) >= self.settings.steps:
                deciding = "the planned training has no further step"
        hollow = [HOLLOW[finding.rule] for finding in self.findings if finding.rule in HOLLOW]
        if hollow and self.verdict == "undecided":
            return (f"odds {format_share(self.odds)} that the loss falls", *hollow)
        if self.verdict == "undecided" and ahead is not None and self.certainty > highest_certainty(ahead.fresh):
            deciding = f"certainty={self.certainty:g}: none above {highest_certainty(ahead.fresh):g} was calibrated"
        return tuple(filter(None, [f"odds {format_share(self.odds)}", deciding]))

    @property
    def offers(self) -> tuple[Offer, ...]:
        """The tried remedies that raise the odds clearly: first those that train, of them the smallest change."""
        return rising(self.tried, self.odds, self.settings.rate)

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        """The remedies of the offers, the best one first."""
        return tuple(offer.remedy for offer in self.offers)

    @property
    def why_no_offer(self) -> str:
        """Why there are no offers, as a clause; "" where there are some."""
        if self.offers:
            return ""
        if self.tried:
            count = len(self.tried)
            one = "the one remedy that was tried does not raise the odds clearly"
            return one if count == 1 else f"none of the {count} remedies that were tried raises the odds clearly"
        if self.trains:
            return "what trains needs no remedy"
        if any(finding.rule in HOLLOW for finding in self.findings):
            return "no remedy is tried where a falling loss is no learning"
        if self.odds >= GOOD:
            return f"at odds of {format_share(self.odds)} no remedy is tried"
        return "no remedy was tried"

    @property
    def largest_rate(self) -> float:
        """The learning rate above which SGD diverges on a quadratic of the loss's sharpness λ: 2/λ, with momentum β
        2(1 + β)/λ, by 1 + 2β lower with Nesterov's (Cohen et al. 2021, https://arxiv.org/abs/2103.00065, sec. 2 and
        app. B). Adaptive optimizers rescale λ: for them it is 2/λ, and a hint at most. NaN where λ was not measured.
        """
        limit = self.measurement.curvature.largest_rate
        if self.settings.adaptive:
            return limit
        groups = self.settings.make(self.subject.model, self.subject.program).param_groups
        return limit * min(map(momentum_factor, groups))

    def range_test(self, rates: Sequence[float] | None = None) -> dict[float, float]:
        """Take trial steps at each learning rate, as many as the diagnosis did, and return the odds that it trains.

        The model is left as it is. Where the odds are certain earlier, fewer steps are taken.

        Args:
            rates: learning rates; None: five, half a decade apart, around the one that was asked about.
        """
        around = self.settings.rate
        subject, taken = self.subject, len(self.measurement.ahead.losses) if self.measurement.ahead else CHECKPOINTS[0]
        chances: dict[float, float] = {}
        for rate in rates or [around * 10 ** (step / 2) for step in range(-2, 3)]:
            trial = Trial(subject, self.settings.at(rate))
            allowance = taken * trial.share / self.settings.steps
            chances[rate] = foresee(trial, certainty=0.95, allowance=allowance).odds
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
            parts.append(f"{counted(len(self.chain.refused), 'addition')} without a skip")
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
        constant = None if self.measurement.ahead is None else self.measurement.ahead.constant
        if asked is not None and (asked.entropy if constant is None else constant) < UNEQUAL * asked.uniform:
            remarks.append(f"chance: {asked.describe(constant)}")
        remarks += trial_remarks(self.measurement, self.subject, self.settings)
        if is_narrow(self.subject.parameters.values()):
            remarks.append("sharpness: not measured of weights of 16 bits, which round small steps away")
        if vain := [each for each in self.tried if each not in self.offers]:
            names = "; ".join(map(str, vain))
            told = "tried without a clear rise of the odds" if self.offers else self.why_no_offer
            remarks.append(f"remedies: {told}: {names}")
        if self.subject.random_modules:
            remarks.append(
                f"left out at random: {condense_paths(self.subject.random_modules)} in training; the choice is the "
                "same in every pass of the diagnosis"
            )
        remarks += [f"samples: {self.subject.samples.remark}"] if self.subject.samples.remark else []
        if self.subject.unreached:
            names = condense_paths(self.subject.unreached)
            count = counted(len(self.subject.unreached), "trainable parameter")
            remarks.append(f"no gradient: the loss does not depend on {count}: {names}")
        if resting := [name for name, module in self.subject.model.named_modules() if self.subject.rests(module)]:
            remarks.append(f"mode: {condense_paths(resting)} in evaluation mode, as given")
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
            ("rate limit 2/λ", measured.curvature.largest_rate if measured.curvature.sharpness > 0 else math.nan),
            ("effective path length", measured.effective_path),
        )
        kept = ("loss", "gradient norm")
        return tuple((name, value) for name, value in numbers if name in kept or not math.isnan(value))

    def __str__(self) -> str:
        lines = [f"{self.verdict}: {'; '.join(self.grounds)} ({self.settings})"]
        lines += [f"  {remark}" for remark in self.remarks]
        for finding, remedies in zip(self.findings, remedy_lines(self.findings), strict=True):
            lines += [f"  {finding}", *(f"    → {line}" for line in remedies)]
        lines += [f"  offer → {text}" for text in offer_lines(self.offers, self.odds)]
        return "\n".join(lines)

    def __rich__(self) -> Any:
        heading, numbers, offers = self.heading, self.key_numbers, offer_lines(self.offers, self.odds)
        return diagnosis_view(
            heading, self.verdict, self.grounds, numbers, self.rows, self.findings, remarks=self.remarks, offers=offers
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
            "odds": self.odds,
            "next_look": None if self.next_look is None else asdict(self.next_look),
            "settings": str(self.settings),
            "remarks": list(self.remarks),
            "findings": [finding.to_json() for finding in self.findings],
            "tried": [{"remedy": str(each.remedy), "odds": each.odds, "verdict": each.verdict} for each in self.tried],
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
            remedies: what to apply, in order. None given: while the verdict is not "trains", the first of the offers,
                then a new diagnosis, at most three times.
            inplace: change the model itself instead of a copy. A remedy that builds anew (`Rescheme`) returns another
                model all the same, and leaves this one as it was. On any exception the model is put back.

        Raises:
            SkipwayError: no remedy is given, and none that was tried raises the odds.
        """
        try:
            return treat(self, remedies, inplace=inplace)
        finally:
            if self.subject.progress is not None:
                self.subject.progress.finish()


def momentum_factor(group: Mapping[str, Any]) -> float:
    """The largest rate of SGD with the momentum of a group over that without.

    >>> momentum_factor({"momentum": 0.9}), momentum_factor({"lr": 0.1})
    (1.9, 1.0)
    """
    momentum, damped = group.get("momentum") or 0.0, group.get("dampening") or 0.0
    if not momentum:
        return 1.0
    factor = (1 + momentum) / (1 + 2 * momentum) if group.get("nesterov") else 1 + momentum
    return factor / (1 - damped) if damped < 1 else math.inf


def trial_remarks(measured: Measurement, subject: Subject, settings: Settings) -> list[str]:
    """What a reader has to know about the trial steps: their batches, and where the odds are on thin ice."""
    ahead = measured.ahead
    if ahead is None:
        return []
    remarks = batch_remarks(ahead, subject)
    if settings.steps < CHECKPOINTS[0]:
        remarks.append(f"steps: {settings.steps:,} planned, and the shortest look ahead takes {CHECKPOINTS[0]}")
    if settings.warmup > settings.steps:
        reached = format_share(settings.steps / settings.warmup)
        remarks.append(f"warm-up: longer than the {settings.steps:,} planned steps, which end at {reached} of the rate")
    if min(ahead.losses) < 0:
        remarks.append("negative loss: the odds were fitted on losses of at least 0, and are rougher here")
    return remarks


def batch_remarks(ahead: LookAhead, subject: Subject) -> list[str]:
    """Which batches the trial steps took."""
    steps = counted(len(ahead.losses), "trial step")
    if ahead.fresh:
        more = "" if subject.batches is None or not subject.batches.remark else f"; {subject.batches.remark}"
        return [f"batches: {steps}, each on another batch of the loader{more}"]
    parts = max(subject.size // ahead.size - 1, 1)
    return [
        f"batches: {steps} on {parts} parts of one batch, {ahead.size} samples each; one more part is held out; "
        "a loader in place of the batch gives a surer verdict"
    ]


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """Result of `Diagnosis.fix`. `print(treatment)` compares before and after.

    Args:
        model: the mended model.
        settings: to train it with.
        applied: the remedies, in order.
        before, after: the diagnoses.
        operations: the one by which they changed the model in place, if they did; `operation.undo()` takes it back. On
            a model that a remedy has built, those since, to be undone last one first.
    """

    model: nn.Module = field(repr=False)
    settings: Settings
    applied: tuple[Remedy, ...] = field(repr=False)
    before: Diagnosis
    after: Diagnosis
    operations: tuple[Operation, ...] = field(default=(), repr=False)

    def __rich__(self) -> Any:
        title = f"{type(self.before.subject.model).__name__}, remedies applied:"
        before, after = summary_of(self.before), summary_of(self.after)
        pairs = [(name, before[name] or "–", after[name] or "–") for name in before if before[name] or after[name]]
        verdicts = self.before.verdict, self.after.verdict
        return treatment_view(title, self.applied, verdicts, pairs, self.after.findings)

    def __str__(self) -> str:
        return as_text(self.__rich__())


def summary_of(diagnosis: Diagnosis) -> dict[str, str]:
    """The lines of a diagnosis that are compared with those of another one."""
    measured = diagnosis.measurement
    ahead = [] if measured.ahead is None else [measured.ahead.losses[0], measured.ahead.losses[-1]]
    blamed = [finding for finding in diagnosis.findings if finding.level != "note"]
    worst = dict.fromkeys(finding.rule for finding in blamed if finding.level == blamed[0].level)
    return {
        "odds": format_share(diagnosis.odds),
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


def examine(
    subject: Subject,
    settings: Settings,
    *,
    thorough: bool = False,
    certainty: float = 0.95,
    allowance: float = 0.03,
    remedies: int = 0,
    began: float | None = None,
) -> Diagnosis:
    """Measure a subject, judge it, and return the diagnosis."""
    began = time.perf_counter() if began is None else began
    subject.warmup = judged_warmup(subject.model, settings.steps)
    measurement = measure(subject, iterations=3 if thorough else 0)
    outlook = Outlook("will not train", 0.0)
    if measurement.finite:
        outlook = foresee(Trial(subject, settings), certainty=certainty, allowance=allowance)
    measurement = replace(measurement, ahead=outlook.ahead, passes=subject.passes)
    context = Context(measurement, settings, subject, outlook)
    causes, tried = causes_of(context), ()
    if any(cause.level == "fatal" for cause in causes):
        outlook = Outlook("will not train", 0.0, outlook.ahead)
        context = replace(context, outlook=outlook)
        remedies = remedies if any(cause.level == "fatal" and cause.remedies for cause in causes) else 0
    if any(cause.rule in HOLLOW for cause in causes):
        outlook, remedies = replace(outlook, verdict=hollow_verdict(outlook), next_look=None), 0
    if outlook.verdict != "trains" and outlook.odds < GOOD and remedies:
        tried = try_remedies(context, causes, certainty=certainty, allowance=allowance, most=remedies)
    blamed = blame(context, causes, rising(tried, outlook.odds, settings.rate))
    findings = sorted(blamed, key=lambda finding: LEVELS.index(finding.level))
    return Diagnosis(
        verdict=outlook.verdict,
        odds=outlook.odds,
        next_look=outlook.next_look,
        findings=tuple(findings),
        tried=tried,
        measurement=measurement,
        settings=settings,
        chain=subject.chain,
        seconds=time.perf_counter() - began,
        subject=subject,
        certainty=certainty,
        allowance=allowance,
    )


def hollow_verdict(outlook: Outlook) -> Verdict:
    """The verdict where a loss that falls is no learning."""
    return "undecided" if outlook.verdict == "trains" else outlook.verdict


def treat(diagnosis: Diagnosis, remedies: Sequence[Remedy], *, inplace: bool, rounds: int = 3) -> Treatment:
    """Apply the given remedies, or without any the best offers until the verdict is "trains", so many at most."""
    if not remedies and not diagnosis.offers:
        raise SkipwayError(
            f"fix(): the verdict is {diagnosis.verdict!r} and {diagnosis.why_no_offer}; give one of "
            "skipway.diagnosis.remedies: fix(Damp())"
        )
    subject, settings = diagnosis.subject, diagnosis.settings
    subject = subject if inplace else replace(subject, model=copy_module(subject.model))
    limits = {"certainty": diagnosis.certainty, "allowance": diagnosis.allowance}
    done: list[Remedy] = []
    operations: list[Operation] = []
    current, chosen = diagnosis, tuple(remedies) or diagnosis.remedies[:1]
    with transaction(subject.model, title="") as change:
        while chosen:
            for remedy in chosen:
                subject, settings, carried_out = applied(remedy, subject, settings, inplace=True)
                operations += carried_out
            done += chosen
            subject.begin("diagnosing the mended network", counted=True)
            current = examine(subject, settings, **limits, remedies=0 if remedies else len(diagnosis.tried))
            further = not remedies and current.verdict != "trains" and len(done) < rounds
            chosen = current.remedies[:1] if further else ()
        change.title = "; and ".join(map(str, done))
        parts = set(subject.model.modules())  # those of this model are undone by `change`, which is on none built anew
        kept = [each for each in operations if each.model in parts and each.model is not change.model]
        if change.mark and change.model in parts:
            kept.insert(0, change.commit())
    return Treatment(
        model=subject.model,
        settings=settings,
        applied=tuple(done),
        before=diagnosis,
        after=current,
        operations=tuple(kept),
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
