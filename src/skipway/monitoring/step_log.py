"""Loss and gradient norm of every step: fetched rarely, scored against their past."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from skipway.monitoring.journal import FETCHED, WatchJournal
from skipway.monitoring.ranks import SamplingRanks
from skipway.monitoring.rules import Evidence
from skipway.monitoring.spikes import SPIKE, WINDOW, SpikeScore
from skipway.probes.signals import to_floats

__all__ = ["StepLog", "StepRecord", "mean_loss"]


def mean_loss(values: Sequence[float]) -> float:
    """The mean of some losses, infinite or NaN where that is none; NaN of none.

    >>> mean_loss([1.0, 2.0]), mean_loss([1e308, 1e308]), mean_loss([math.inf, -math.inf])
    (1.5, inf, nan)
    """
    try:
        return math.fsum(values) / len(values) if values else math.nan
    except (OverflowError, ValueError):
        return sum(values) / len(values)


@dataclass
class StepRecord:
    """What is known of one step, on its device.

    Args:
        step: its number.
        norms: of all parameters' gradients.
        losses: of its passes.
        own: whether the model has returned them.
        skipped: above 0 where a GradScaler lets the optimizer skip the step; its norms say nothing of the training.
    """

    step: int
    norms: Tensor | None = None
    losses: list[Any] = field(default_factory=list)
    own: bool = False
    skipped: Tensor | None = None


@dataclass
class StepLog:
    """Fetches the numbers of steps, in packs from a GPU, finds spikes, and applies the rules.

    Args:
        journal: that they are written to.
        ranks: over which sharded gradients are added.
        parameters: names, in the order of the norms.
        at_once: whether every step is fetched by itself.
        constant: () → the loss of the best constant answer, NaN where it is unknown.
    """

    journal: WatchJournal
    ranks: SamplingRanks
    parameters: list[str]
    at_once: bool
    constant: Callable[[], float]
    queue: list[StepRecord] = field(default_factory=list)
    spikes: dict[str, SpikeScore] = field(default_factory=lambda: {"loss": SpikeScore(), "gradient norm": SpikeScore()})
    scores: dict[str, float] = field(default_factory=dict)
    norm_spikes: deque[int] = field(default_factory=deque)

    def add(self, record: StepRecord) -> None:
        """A step is over."""
        self.queue.append(record)
        if self.at_once or len(self.queue) >= FETCHED:
            self.resolve()

    def resolve(self) -> None:
        """Fetch the numbers of the queued steps."""
        queue, self.queue = self.queue, []
        norms = [each.norms for each in queue if each.norms is not None]
        totals = iter(to_floats(list(self.ranks.total_norms(norms))) if norms else [])
        tensors = [each for record in queue for each in record.losses if isinstance(each, Tensor)]
        losses = iter(to_floats(tensors))
        skipped = iter(to_floats([each.skipped for each in queue if each.skipped is not None]))
        for record in queue:
            norm = math.nan if record.norms is None else next(totals)
            if record.skipped is not None and next(skipped):
                record.norms, norm = None, math.nan
            values = [next(losses) if isinstance(each, Tensor) else each for each in record.losses]
            self.judge(record, mean_loss(values), norm)

    def judge(self, record: StepRecord, loss: float, norm: float) -> None:
        """Take in one step: spikes and warnings."""
        journal = self.journal
        journal.add_step(record.step, loss, norm)
        values = {"loss": loss} if record.losses else {}
        values |= {"gradient norm": norm} if record.norms is not None else {}
        self.scores = {name: self.spikes[name].score(value) for name, value in values.items()}
        for name, score in self.scores.items():
            if score > SPIKE:
                journal.write("spike", step=record.step, what=name, value=values[name], score=score)
        if SPIKE < self.scores.get("gradient norm", 0.0) < math.inf:
            self.norm_spikes.append(record.step)
        while self.norm_spikes and self.norm_spikes[0] <= record.step - WINDOW:
            self.norm_spikes.popleft()
        if record.norms is not None and math.isinf(self.scores["gradient norm"]) and not journal.fault:
            pairs = zip(self.parameters, record.norms.tolist(), strict=True)
            bad = [name for name, each in pairs if not math.isfinite(each)]
            journal.fault = f"first in the gradient of {bad[-1]}" if bad else ""
        evidence = Evidence(
            losses=journal.history.losses, norms=journal.history.norms, spikes=self.scores,
            recent_spikes=len(self.norm_spikes), constant=self.constant(),
        )  # fmt: skip
        journal.warn(record.step, evidence)
