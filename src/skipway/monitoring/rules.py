"""Early warnings: rules over the losses, gradient norms and samples of a training, each with its source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch

from skipway.monitoring.spikes import SPIKE

__all__ = ["RULES", "EarlyWarning", "Evidence", "Rule", "WarningLog", "grown", "near_overflow", "not_finite"]

Rows = Mapping[str, Mapping[str, float]]
Found = Iterator[tuple[str, str]]
GROWN = 1e3
"""Growth of a stream or gradient since the first sample that is on the way out of float's range."""
NEAR_OVERFLOW = 1 / 16
"""Share of the largest number of the arithmetic; sums of squares overflow before the values do."""
LARGE_UPDATE, FIRST_UPDATE, SMALL_UPDATE = 0.1, 1.0, 1e-6
"""Relative updates |Δw| / |w| in one step, a hundred times and a thousandth of the usual 1e-3."""
LARGE_LOGIT, LOGIT_GROWTH = 50.0, 1.5
DEAD, DEAD_RISE = 0.5, 0.2
REPEATED_SPIKES = 3
RECENT, PATIENCE = 64, 256
"""Losses of which a mean is taken, and losses before one that stands still says something."""
STILL, RISEN, SOON_RISEN, HIGH = 0.98, 1.5, 3.0, 100.0
REPEAT = 1000
"""Steps after which a rule warns again."""


@dataclass(frozen=True)
class EarlyWarning:
    """A sign that a training is going wrong.

    Args:
        step: after which it was seen.
        rule: its name.
        connection: where it was seen; empty for the whole network.
        text: a sentence with values and limits.
        source: of the rule.
    """

    step: int
    rule: str
    connection: str
    text: str
    source: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.text}"


@dataclass
class Evidence:
    """What rules read.

    Args:
        first: the first sample.
        rows: the newest one; empty where there is no new one.
        losses, norms: of every step so far; norms are those of all gradients that the optimizer was given.
        spikes: scores of the newest step, by "loss" and "gradient norm".
        recent_spikes: spikes of the gradient norm within 128 steps.
        constant: loss of the best constant answer, where it is known.
        dtype: of the forward passes.
    """

    first: Rows = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)
    losses: Sequence[float] = ()
    norms: Sequence[float] = ()
    spikes: Mapping[str, float] = field(default_factory=dict)
    recent_spikes: int = 0
    constant: float = math.nan
    dtype: torch.dtype = torch.float32


def grown(key: str, evidence: Evidence) -> Found:
    """The stream or gradient has grown a thousandfold since the first sample."""
    for name, row in evidence.rows.items():
        early, now = evidence.first.get(name, row).get(key, math.nan), row.get(key, math.nan)
        if math.isfinite(now) and now > GROWN * early > 0:
            yield name, f"the {key} after {name} has grown from {early:.3g} to {now:.3g} since the start"


def not_finite(key: str, evidence: Evidence) -> Found:
    """The stream or gradient holds NaN or infinity."""
    for name, row in evidence.rows.items():
        if not math.isfinite(row.get(key, 0.0)):
            yield name, f"the {key} after {name} is not finite"


def near_overflow(evidence: Evidence) -> Found:
    """The stream comes near the largest number of its type."""
    most = torch.finfo(evidence.dtype).max * NEAR_OVERFLOW
    for name, row in evidence.rows.items():
        if row.get("largest", 0.0) > most:
            yield (
                name,
                f"the stream after {name} reaches {row['largest']:.3g}, near the largest number of {evidence.dtype}",
            )


def large_update(evidence: Evidence) -> Found:
    """A step changes the weights by a tenth of themselves; the first one, which is larger if adaptive, by all."""
    limit = FIRST_UPDATE if evidence.rows is evidence.first else LARGE_UPDATE
    for name, row in evidence.rows.items():
        if row.get("update", 0.0) > limit:
            yield name, f"one step changes the weights of {name} by {row['update']:.3g} of their size; 1e-3 is usual"


def small_update(evidence: Evidence) -> Found:
    """Steps change the weights of most connections by less than a millionth."""
    if evidence.rows is evidence.first:
        return
    small = [name for name, row in evidence.rows.items() if row.get("update", 1.0) < SMALL_UPDATE]
    if len(small) * 2 > len(evidence.rows):
        largest = max(evidence.rows[name]["update"] for name in small)
        yield (
            small[0],
            f"one step changes the weights of {len(small)} connections by less than {largest:.1g} of their size",
        )


def large_logits(evidence: Evidence) -> Found:
    """Attention logits are large, and larger than at the start."""
    for name, row in evidence.rows.items():
        now, early = row.get("logits", 0.0), evidence.first.get(name, {}).get("logits", math.nan)
        if now > LARGE_LOGIT and now > LOGIT_GROWTH * early:
            yield name, f"attention logits of {name} have grown from {early:.3g} to {now:.3g}"


def rising_dead(evidence: Evidence) -> Found:
    """Half of a rectifier's channels are 0 for all samples, and fewer were at the start."""
    for name, row in evidence.rows.items():
        now, early = row.get("dead", 0.0), evidence.first.get(name, {}).get("dead", math.nan)
        if now > DEAD and now > early + DEAD_RISE:
            yield name, f"{now:.0%} of the channels of a rectifier in {name} are dead, {early:.0%} at the start"


def bad_number(evidence: Evidence) -> Found:
    """The newest loss or gradient norm is NaN or infinity."""
    for name, values in (("loss", evidence.losses), ("gradient norm", evidence.norms)):
        if values and math.isinf(evidence.spikes.get(name, 0.0)):
            yield "", f"the {name} is {values[-1]}"


def loss_spike(evidence: Evidence) -> Found:
    """The loss is 6 standard deviations above the mean of the last 128."""
    score = evidence.spikes.get("loss", 0.0)
    if SPIKE < score < math.inf:
        yield "", f"the loss is {evidence.losses[-1]:.4g}, {score:.1f} σ above the mean of the last 128 steps"


def gradient_spikes(evidence: Evidence) -> Found:
    """Several spikes of the gradient norm within 128 steps."""
    if evidence.recent_spikes >= REPEATED_SPIKES and evidence.spikes.get("gradient norm", 0.0) > SPIKE:
        yield "", f"{evidence.recent_spikes} spikes of the gradient norm within 128 steps, now {evidence.norms[-1]:.3g}"


def loss_risen(evidence: Evidence) -> Found:
    """The mean of 16 losses is half again that of the first 16; of the first 32, two in a row are thrice the first."""
    losses, half = evidence.losses, RECENT // 4
    least = evidence.constant if evidence.constant > 0 else 0.0
    if len(losses) < 2 * half:
        now, first, factor = min(losses[-2:], default=0.0), max(losses[:1], default=0.0), SOON_RISEN
    else:
        now, first, factor = fmean(losses[-half:]), fmean(losses[:half]), RISEN
    if now > factor * max(first, least) > 0:
        yield "", f"the loss has risen to {now:.4g}, from {first:.4g} in the first steps"


def loss_high(evidence: Evidence) -> Found:
    """After the first steps the loss is still a hundred times that of the best constant answer."""
    half = RECENT // 4
    if evidence.constant > 0 and len(evidence.losses) >= 2 * half:
        now = fmean(evidence.losses[-half:])
        if HIGH * evidence.constant < now < math.inf:
            yield (
                "",
                f"the loss is {now:.4g} after {len(evidence.losses)} steps; the best constant answer has "
                f"{evidence.constant:.4g}: the outputs are too large by orders of magnitude",
            )


def loss_flat(evidence: Evidence) -> Found:
    """After some hundred steps the loss is still that of the best constant answer, or that of the start."""
    losses = evidence.losses
    if len(losses) < PATIENCE or len(losses) % RECENT:
        return
    now, before = fmean(losses[-RECENT:]), fmean(losses[-3 * RECENT : -2 * RECENT])
    if now < STILL * before:
        return
    if evidence.constant > 0:
        if now > STILL * evidence.constant:
            best = f"the best constant answer has {evidence.constant:.4g}"
            yield "", f"the loss is {now:.4g} after {len(losses)} steps; {best}"
    elif now > STILL * fmean(losses[:8]) > 0:
        yield "", f"the loss is {now:.4g} after {len(losses)} steps, as in the first ones"


@dataclass(frozen=True)
class Rule:
    """One sign of a training that goes wrong.

    Args:
        name: of the rule.
        find: yields the connection, empty for the whole network, and a sentence.
        source: where it comes from.
        note: whether trainings that learn show it as often as those that fail, so that it is written down and no more
            (`benchmarks/early_warning`).
    """

    name: str
    find: Callable[[Evidence], Found]
    source: str
    note: bool = False


OLMO = "allenai/OLMo-core, StabilityMonitorCallback; OLMo 2, https://arxiv.org/abs/2501.00656"
NUMBERS = "IEEE 754: a sum of squares overflows before its terms do"
USUAL = "Karpathy, https://cs231n.github.io/neural-networks-3/: the ratio of updates to weights should be about 1e-3"
RULES: tuple[Rule, ...] = (
    Rule("stream not finite", lambda e: not_finite("stream", e), NUMBERS),
    Rule("gradient not finite", lambda e: not_finite("gradient", e), NUMBERS),
    Rule("not finite", bad_number, NUMBERS),
    Rule("overflow", near_overflow, NUMBERS),
    Rule("stream grown", lambda e: grown("stream", e), "De & Smith 2020, https://arxiv.org/abs/2002.10444, fig. 1"),
    Rule(
        "gradient grown", lambda e: grown("gradient", e), "Zhang et al. 2019, https://arxiv.org/abs/1901.09321, sec. 2"
    ),
    Rule("loss spike", loss_spike, OLMO),
    Rule("spikes of the gradient", gradient_spikes, OLMO, note=True),
    Rule("loss risen", loss_risen, "a loss above that of the start is worse than no training"),
    Rule("loss high", loss_high, "the best constant answer needs no training: this network began far above it"),
    Rule("loss flat", loss_flat, "the best constant answer needs no input: nothing of it is used"),
    Rule("large update", large_update, USUAL),
    Rule("small update", small_update, USUAL),
    Rule(
        "attention logits", large_logits, "Dehghani et al. 2023, https://arxiv.org/abs/2302.05442, sec. 2.1", note=True
    ),
    Rule("dead units", rising_dead, "Lu et al. 2019, https://arxiv.org/abs/1903.06733"),
)
"""Every rule, the most certain ones first."""


@dataclass
class WarningLog:
    """Applies the rules; each warns once, of the first connection that it holds for, and again after 1,000 steps.

    A rule whose arithmetic fails, on numbers near the largest one, has found nothing.
    """

    rules: tuple[Rule, ...] = RULES
    last: dict[str, int] = field(default_factory=dict)

    def find(self, step: int, evidence: Evidence) -> list[tuple[Rule, str, str]]:
        """The rules that warn now, each with connection and sentence.

        >>> first = {"blocks.0": {"stream": 1.0, "gradient": 1.0}}
        >>> evidence = Evidence(first, {"blocks.0": {"stream": 2e3, "gradient": 1.0}})
        >>> WarningLog().find(70, evidence)[0][1:]
        ('blocks.0', 'the stream after blocks.0 has grown from 1 to 2e+03 since the start')
        """
        new: list[tuple[Rule, str, str]] = []
        for rule in self.rules:
            if step - self.last.get(rule.name, -REPEAT) < REPEAT:
                continue
            try:
                found = next(rule.find(evidence), None)
            except (ArithmeticError, ValueError):
                continue
            if found is not None:
                self.last[rule.name] = step
                new.append((rule, *found))
        return new
