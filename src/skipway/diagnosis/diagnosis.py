"""`diagnose(model, example)`: will the network train, which connection is at fault, why, and what to do."""

from __future__ import annotations

import copy
import inspect
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skipway.diagnosis.findings import LEVELS, Finding
from skipway.diagnosis.indicators import Indicators, read_indicators
from skipway.diagnosis.measurement import Measurement, measure
from skipway.diagnosis.outlook import outlook, probability
from skipway.diagnosis.passes import look_ahead
from skipway.diagnosis.remedies import Case, Remedy
from skipway.diagnosis.rules import Context, findings_of, verdict_of
from skipway.diagnosis.settings import Settings, settings_of
from skipway.diagnosis.subject import Subject
from skipway.errors import SkipwayError
from skipway.optim.groups import role_of
from skipway.probes.objective import Loss
from skipway.tracing import Example, as_batch, unwrap
from skipway.tracing.chain import Chain, WatchedConnection

__all__ = ["Diagnosis", "Treatment", "Verdict", "diagnose"]

Verdict = Literal["trains", "trains if", "will not train"]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What is wrong with a model at its start, and what to do.

    Args:
        verdict: "trains", "trains if" (see `conditions`) or "will not train".
        conditions: what "trains if" depends on, in words.
        findings: the worst first.
        measurement: everything that was measured.
        settings: of the training that was asked about.
        chain: the residual connections, and the additions that are none.
        seconds: that it took.
        subject: the model, batch and loss, for `fix`.
    """

    verdict: Verdict
    conditions: tuple[str, ...]
    findings: tuple[Finding, ...]
    measurement: Measurement
    settings: Settings
    chain: Chain[WatchedConnection] = field(repr=False)
    seconds: float
    subject: Subject = field(repr=False)

    @property
    def trains(self) -> bool:
        """False where the verdict is "will not train"."""
        return self.verdict != "will not train"

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        """The first remedy of every finding that is not a note, each once, in order."""
        first = (finding.remedies[0] for finding in self.findings if finding.remedies and finding.level != "note")
        return tuple(dict.fromkeys(first))

    @property
    def largest_rate(self) -> float:
        """The learning rate above which gradient descent leaves a quadratic of this sharpness λ: 2/λ, with momentum β
        2(1 + β)/λ (Cohen et al. 2021, https://arxiv.org/abs/2103.00065, sec. 2). For SGD; the Adams rescale λ.
        """
        return self.measurement.curvature.largest_rate * (1.0 if self.settings.adaptive else 1.9)

    def range_test(self, rates: Sequence[float] | None = None) -> dict[float, float]:
        """A short look ahead at each learning rate: the probability, as far as the benchmark has seen, that it trains.

        Args:
            rates: by default five, half a decade apart, around the one that was asked about.
        """
        around = self.settings.rate
        found: dict[float, float] = {}
        for rate in rates or [around * 10 ** (step / 2) for step in range(-2, 3)]:
            chosen = self.settings.at(rate)
            ahead = look_ahead(self.subject, lambda chosen=chosen: chosen.make(self.subject.model))
            found[rate] = probability(read_indicators(replace(self.measurement, ahead=ahead), chosen))
        return found

    @property
    def updates(self) -> dict[str, float]:
        """Relative update |Δw|/|w| of the first step, the median over the parameters of each role."""
        by_role: dict[str, list[float]] = {}
        updates = {} if self.measurement.ahead is None else self.measurement.ahead.updates
        for name, size in updates.items():
            owner, _, own = name.rpartition(".")
            role = role_of(self.subject.model.get_submodule(owner), own).name
            by_role.setdefault(role, []).append(size)
        return {role: median(sizes) for role, sizes in by_role.items()}

    def __str__(self) -> str:
        lines = [f"{self.verdict}{': ' + '; '.join(self.conditions) if self.conditions else ''} ({self.settings})"]
        for finding in self.findings:
            lines.append(f"  {finding}")
            lines += [f"    → {remedy}" for remedy in finding.remedies]
        return "\n".join(lines)

    def table(self) -> str:
        """A row for each connection, with bars, as text."""
        from skipway.diagnosis.table import table

        return table(self)

    def plot(self, path: str | Path | None = None) -> Any:
        """The signal forward and backward by depth, on a logarithmic scale, with the findings marked.

        Args:
            path: where to save it, by its ending (.png, .svg, .pdf); None: only return the matplotlib figure.

        Raises:
            MissingExtraError: matplotlib is not installed (`pip install 'skipway[plot]'`).
        """
        from skipway.diagnosis.plot import plot

        return plot(self, path)

    def to_json(self) -> str:
        """Everything but the model, as JSON; numbers that are not finite as strings."""
        content = {
            "verdict": self.verdict,
            "conditions": list(self.conditions),
            "settings": str(self.settings),
            "findings": [finding.to_json() for finding in self.findings],
            "measurement": plain(asdict(self.measurement)),
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

    def to_html(self) -> str:
        """One page that needs nothing else."""
        from skipway.diagnosis.page import page

        return page(self)

    def save(self, path: str | Path) -> Path:
        """Write it to a file, by the ending: .json, .html, or a picture (.png, .svg, .pdf)."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(self.to_json() + "\n", encoding="utf-8")
        elif path.suffix in {".html", ".htm"}:
            path.write_text(self.to_html(), encoding="utf-8")
        elif path.suffix in {".png", ".svg", ".pdf"}:
            self.plot(path)
        else:
            raise SkipwayError(f"{path}: a diagnosis is saved as .json, .html, .png, .svg or .pdf")
        return path

    def fix(self, *remedies: Remedy, inplace: bool = False) -> Treatment:
        """Apply the remedies to a copy of the model, and diagnose that.

        Args:
            remedies: what to do; by default, while the verdict is not "trains", the first remedy of the worst finding,
                then diagnose again, at most three times.
            inplace: work on the model itself. A remedy that builds anew returns another model all the same.

        Raises:
            SkipwayError: there is nothing to apply.
        """
        return treat(self, remedies, inplace=inplace)


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What `Diagnosis.fix` did.

    Args:
        model: the mended model.
        settings: to train it with.
        applied: the remedies, in order.
        before, after: the diagnoses.
    """

    model: nn.Module = field(repr=False)
    settings: Settings
    applied: tuple[Remedy, ...]
    before: Diagnosis
    after: Diagnosis

    def __str__(self) -> str:
        from skipway.diagnosis.table import side_by_side

        return side_by_side(self)


def diagnose(
    model: nn.Module,
    example: Example,
    *,
    targets: Any = None,
    loss: Loss | None = None,
    optimizer: str | torch.optim.Optimizer = "sgd",
    lr: float | None = None,
    weight_decay: float = 0.0,
    warmup: int = 0,
    steps: int = 1000,
    training: bool = True,
    thorough: bool = False,
    seed: int = 0,
) -> Diagnosis:
    """Look at a model on one batch before it is trained: will it train, what is at fault, why, and what to do.

    Takes at most 10 forward-backward passes. The model, its gradients and buffers, the mode of its modules and the
    random state are left as they were; no hook stays behind.

    Args:
        model: any `torch.nn.Module`, on any device, not yet trained.
        example: what the model is called with, 32 to 128 samples, at least 8: a tensor, a tuple of positional
            arguments, a mapping of keyword arguments, or a `DataLoader`, whose first batch is taken.
        targets: what the loss compares the output with; None: those of the `DataLoader`, else drawn at random.
        loss: (output, targets) → a number; by default cross-entropy, or the loss that the model itself puts out.
        optimizer: "sgd" (with momentum 0.9), "adam", "adamw", "rmsprop", "adagrad", or an optimizer made for `model`,
            whose class, groups and rates are then asked about; it takes no step.
        lr: learning rate of the weights; by default 0.1 for SGD and 0.001 for the Adams.
        weight_decay: by role, see `skipway.param_groups`.
        warmup: planned steps of warm-up.
        steps: planned steps of training; a rate that gets nowhere in them is too low.
        training: measure in training mode (batch statistics, dropout), or in evaluation mode.
        thorough: also find the largest singular value of every connection's Jacobian by power iteration, six passes
            more.
        seed: of dropout and of random targets.

    Raises:
        SkipwayError: the forward pass fails, gives no tensor, or the batch is too small; says what to do.

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
        settings_of(optimizer, model)
        if isinstance(optimizer, torch.optim.Optimizer)
        else Settings(optimizer=optimizer, weight_decay=weight_decay)
    )
    settings = replace(settings, warmup=warmup, steps=steps, lr=settings.lr if lr is None else lr)
    subject = Subject(model, inputs, targets, loss, training=training, seed=seed)
    check_subject(subject)
    return examine(subject, settings, thorough=thorough, began=began)


def examine(subject: Subject, settings: Settings, *, thorough: bool = False, began: float | None = None) -> Diagnosis:
    """Measure, judge and put together."""
    began = time.perf_counter() if began is None else began
    labelled = subject.targets is not None or subject.loss is not None
    measurement = measure(subject, lambda: settings.make(subject.model), iterations=3 if thorough else 0)

    def look_again(rate: float) -> Indicators:
        ahead = look_ahead(subject, lambda: settings.at(rate).make(subject.model))
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
    """Apply given remedies, or one after another until the verdict is "trains"."""
    subject = diagnosis.subject
    if not remedies and not diagnosis.remedies:
        raise SkipwayError(f"nothing to apply: the verdict is {diagnosis.verdict!r} and no finding has a remedy")
    model = subject.model if inplace else copy.deepcopy(subject.model)
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


def check_subject(subject: Subject) -> None:
    """Refuse, before anything runs, what cannot be diagnosed."""
    if isinstance(subject.inputs, tuple):
        try:
            inspect.signature(subject.model.forward).bind(*subject.inputs)
        except TypeError as error:
            raise SkipwayError(
                f"example=({', '.join(type(part).__name__ for part in subject.inputs)}): a tuple is positional "
                f"arguments, and {type(subject.model).__name__}.forward refuses them ({error}); targets go to targets="
            ) from error
    if not subject.parameters:
        raise SkipwayError("the model has no trainable parameters; set requires_grad where it is to be trained")
    if any(parameter.is_meta for parameter in subject.model.parameters()):
        raise SkipwayError(
            "the model is on the meta device and has no values to measure; build it on a real device, or look at its "
            "connections alone: chain(model, example)"
        )
    if subject.size < 8:
        raise SkipwayError(
            f"example of {subject.size} samples: the rule is at least 8, 32 to 128 are better; give a larger batch"
        )


def plain(value: Any) -> Any:
    """What JSON can hold: numbers that are not finite become strings."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Tensor):
        return plain(value.tolist())
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
