"""From measurements to findings: each rule has a source, each threshold a theory or a measurement behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from skipway.diagnosis.findings import Finding, number
from skipway.diagnosis.measurement import ConnectionSignal, LayerSignal, Measurement
from skipway.diagnosis.outlook import Outlook
from skipway.diagnosis.remedies import (
    AddSkips,
    Damp,
    LearningRate,
    NormFirst,
    Remedy,
    Rescheme,
    Revive,
    UnitVariance,
    WarmUp,
    layers_with_switch,
)
from skipway.diagnosis.settings import Settings
from skipway.diagnosis.subject import Subject

__all__ = ["RULES", "Context", "findings_of", "verdict_of"]

Verdict = Literal["trains", "trains if", "will not train"]


@dataclass(frozen=True)
class Context:
    """What a rule may look at.

    Args:
        measured: the model at its start.
        settings: of the training that is asked about.
        subject: the model, to read its structure and to aim remedies.
        outlook: what the look ahead says, with these settings and perhaps with others.
    """

    measured: Measurement
    settings: Settings
    subject: Subject
    outlook: Outlook

    @property
    def ours(self) -> bool:
        """Whether the network was built by `skipway.build`, and can be built anew in another scheme."""
        return hasattr(getattr(self.subject.model, "config", None), "scheme")

    @property
    def maps(self) -> tuple[str, ...]:
        """Modules with a weight of two axes or more, in the order of the signal, that can be drawn anew."""
        modules = ((name, self.subject.model.get_submodule(name)) for name in self.subject.layers)
        return tuple(name for name, module in modules if getattr(getattr(module, "weight", None), "ndim", 0) > 1)


Rule = Callable[[Context], Iterator[Finding]]


def not_finite(context: Context) -> Iterator[Finding]:
    """Loss or gradient are no numbers."""
    measured = context.measured
    if measured.finite:
        return
    points: Sequence[ConnectionSignal | LayerSignal] = measured.connections or measured.layers
    first = next((p.name for p in points if not math.isfinite(size_of(p))), None)
    yield Finding(
        rule="not-finite",
        level="fatal",
        what=f"the loss is {number(measured.loss)} and the gradient {number(measured.gradient)} at the start",
        why="a step along a gradient that is not finite makes every weight not finite",
        source="IEEE 754-2019, sec. 6",
        evidence={"loss": measured.loss, "gradient": measured.gradient},
        where=() if first is None else (first,),
        remedies=calming(context),
    )


def size_of(point: ConnectionSignal | LayerSignal) -> float:
    return point.stream if isinstance(point, ConnectionSignal) else point.std


def calming(context: Context) -> tuple[Remedy, ...]:
    """What keeps a signal in bounds: for connections a smaller branch, without them weights at unit variance."""
    if not context.measured.connections:
        return (UnitVariance(context.maps),)
    return (Rescheme("skipinit(init='depth')"), Damp()) if context.ours else (Damp(), UnitVariance(context.maps))


def stream_grows(context: Context) -> Iterator[Finding]:
    """The stream's variance grows faster than one unit for each branch."""
    points = [c for c in context.measured.connections if c.variance_after > 0 and c.variance_before > 0]
    if len(points) < 2:
        return
    growth = points[-1].variance_after / points[0].variance_before
    allowed = 10 * (len(points) + 1)
    if not growth > allowed:
        return
    rate = growth ** (1 / len(points))
    worst = [c.name for c in points if c.variance_after / c.variance_before > 1.5]
    yield Finding(
        rule="stream-grows",
        level="note",
        what=f"the variance of the stream grows {number(growth)}-fold over {len(points)} connections, "
        f"{number(rate)}-fold each",
        why="branches as large as their stream double its variance, 2^L over L of them, and with it the curvature; "
        "with a norm in each branch it grows by about one unit a branch, L + 1",
        source="De & Smith 2020, sec. 2 (https://arxiv.org/abs/2002.10444); allowed is ten times L + 1",
        evidence={"growth": growth, "allowed": float(allowed), "per connection": rate},
        where=tuple(worst or [points[-1].name]),
        remedies=calming(context),
    )


def two_zeros(context: Context) -> Iterator[Finding]:
    """A branch in which no weight has a gradient, although one reaches the sum."""
    still = set(context.measured.still)
    parameters, model = context.subject.parameters, context.subject.model
    # a bias behind both zeros moves, and what it adds is the same for all samples
    biases = {id(getattr(module, "bias", None)) for module in model.modules()}
    weights: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        if id(parameter) not in biases:
            weights.setdefault(name.rpartition(".")[0], []).append(name)
    dead, maps = [], []
    for connection, signal in zip(context.subject.chain, context.measured.connections, strict=True):
        scale = connection.seen.scale
        own = [name for module in connection.seen.modules for name in weights.get(module, ())]
        own += [name for name in (() if scale is None else scale.parameters) if name in parameters]
        if own and signal.gradient_after > 0 and still.issuperset(own):
            dead.append(connection.name)
            maps += [connection.seen.last] if connection.seen.last else []
    if not dead:
        return
    yield Finding(
        rule="two-zeros",
        level="fatal" if len(dead) > len(context.subject.chain) / 2 else "serious",
        what=f"no weight of {len(dead)} of {len(context.subject.chain)} branches has a gradient",
        why="two factors of one branch are zero: each hides the other's gradient, so neither ever moves. One zero "
        "is enough to silence a branch at the start",
        source="product rule; pitfall P13: a zero gain over a zero last map",
        evidence={"branches": float(len(dead))},
        where=tuple(dead),
        remedies=(Revive(tuple(maps)),) if maps else (),
    )


def collapse(context: Context) -> Iterator[Finding]:
    """The samples, or the tokens of one sample, become one direction."""
    points: Sequence[ConnectionSignal | LayerSignal] = context.measured.connections or context.measured.layers[:-1]
    same = [p for p in points if p.distinct < INDISTINCT]
    tokens = [p for p in points if p.tokens_distinct < INDISTINCT]
    for found, name, who in ((same, "samples-collapse", "samples"), (tokens, "rank-collapse", "tokens of a sample")):
        # not what the model's own start puts there: a class token or a silent head is the same for all
        if not found or len(found) < len(points) / 4:
            continue
        last = found[-1]
        distinct = last.tokens_distinct if found is tokens else last.distinct
        yield Finding(
            rule=name,
            level="note",
            what=f"from {found[0].name} on, different {who} are the same direction: 1 − cosine is {number(distinct)}",
            why="what has become the same cannot be told apart by any later layer, and gradients of all of them agree "
            "on the mean alone",
            source="Schoenholz et al. 2017, eq. 5 (https://arxiv.org/abs/1611.01232); for tokens Dong et al. 2021, "
            "theorem 2.2 (https://arxiv.org/abs/2103.03404)",
            evidence={"distinct": distinct, "points": float(len(found))},
            where=tuple(p.name for p in found),
            remedies=skips(context) if not context.measured.connections else calming(context),
        )


INDISTINCT = 1e-3


def no_skips(context: Context) -> Iterator[Finding]:
    """Deep, and no connection at all."""
    depth = len(context.maps)
    if context.subject.chain or depth < 12:
        return
    yield Finding(
        rule="no-skips",
        level="serious" if depth >= DEEP_WITHOUT_SKIPS else "note",
        what=f"{depth} maps one behind the other and no residual connection",
        why="without skips the gradient's size is a product over the layers and the correlation between gradients at "
        "neighbouring inputs falls as 2^−L; plain networks of 56 layers are worse than of 20",
        source="He et al. 2015, fig. 6 (https://arxiv.org/abs/1512.03385); Balduzzi et al. 2017, theorem 1",
        evidence={"maps": float(depth), "smoothness": context.measured.jacobians.shattering or math.nan},
        where=(),
        remedies=skips(context),
    )


DEEP_WITHOUT_SKIPS = 40
"""Of the networks without skips and with at least 40 layers in the chosen half of the benchmark 2 of 16 trained."""


def skips(context: Context) -> tuple[Remedy, ...]:
    """Ways to give a network skips."""
    if context.ours:
        return (Rescheme("identity"), Rescheme("preactivation"))
    found = context.subject.skippable
    return ((AddSkips(found),) if found else ()) + (UnitVariance(context.maps),)


def gradients_differ(context: Context) -> Iterator[Finding]:
    """The gradient of the first layers and that of the last are of different orders."""
    layers = [layer for layer in context.measured.layers if layer.weight > 0 and math.isfinite(layer.weight)]
    if len(layers) < 4:
        return
    early, late = layers[0].gradient, layers[-2].gradient
    ratio = early / late if late else math.inf
    if UNEVEN > ratio > 1 / UNEVEN:
        return
    grows = ratio > 1
    yield Finding(
        rule="exploding-gradient" if grows else "vanishing-gradient",
        level="note",
        what=f"the gradient is {number(ratio)} times as large at the first map as at the last but one",
        why="one learning rate cannot suit both ends: where it suits one, the other is torn apart or stands still"
        if grows
        else "the first layers learn nothing while the last ones fit what they are given",
        source="Glorot & Bengio 2010, sec. 4.2; Yang et al. 2019 for BatchNorm (https://arxiv.org/abs/1902.08129)",
        evidence={"first": early, "last": late, "ratio": ratio},
        where=(layers[0].name, layers[-2].name),
        remedies=skips(context) if not context.subject.chain else calming(context),
    )


UNEVEN = 1e3


def post_norm(context: Context) -> Iterator[Finding]:
    """A deep network whose stream itself is normed after every addition."""
    chain = context.subject.chain
    normed = [c.name for c in chain if "post" in c.seen.norms]
    if len(normed) < 12 or len(normed) < len(chain) / 2:
        return
    switch = bool(layers_with_switch(context.subject.model))
    first: Remedy = NormFirst() if switch else Rescheme("preactivation") if context.ours else Damp(0.1)
    yield Finding(
        rule="post-norm",
        level="serious" if len(normed) >= DEEP_POST_NORM and not context.settings.warmup else "note",
        what=f"{len(normed)} of {len(chain)} connections norm the stream behind the addition",
        why="every norm scales the skip down by about √2, so that the gradient of the first layers shrinks with depth "
        "while that of the last stays large: such networks need warm-up, or norms inside of the branches",
        source="Xiong et al. 2020, theorem 1 (https://arxiv.org/abs/2002.04745)",
        evidence={"connections": float(len(normed))},
        where=tuple(normed),
        remedies=(first, WarmUp(max(100, context.settings.steps // 20))),
    )


DEEP_POST_NORM = 24
"""Connections, of a 12-layer transformer: from there on Xiong et al. find warm-up indispensable behind post-norm."""


def dead_units(context: Context) -> Iterator[Finding]:
    """Channels that are zero for every sample."""
    found = [c for c in context.measured.connections if c.dead > 0.5]
    if not found:
        return
    yield Finding(
        rule="dead-units",
        level="note",
        what=f"more than half of the channels are 0 for every sample in {len(found)} branches",
        why="a rectifier that is 0 for every sample passes no gradient",
        source="Lu et al. 2019 (https://arxiv.org/abs/1903.06733)",
        evidence={"share": max(c.dead for c in found)},
        where=tuple(c.name for c in found),
        remedies=(UnitVariance(context.maps),),
    )


def low_precision(context: Context) -> Iterator[Finding]:
    """What float16 cannot hold, and what bfloat16 would round away."""
    over = [c for c in context.measured.connections if c.overflow > 1 / 16]
    if over:
        most = max(c.overflow for c in over)
        yield Finding(
            rule="overflow",
            level="serious" if most > 1 and in_half() else "note",
            what=f"values reach {number(most)} times what float16 can hold",
            why="above 65504 float16 is infinite; activations grow further in training",
            source="IEEE 754-2019, table 3.5",
            evidence={"times float16": most},
            where=tuple(c.name for c in over),
            remedies=calming(context),
        )
    lost = [c for c in context.measured.connections if c.swallowed > 0.9]
    if lost:
        yield Finding(
            rule="swallowed",
            level="note",
            what=f"bfloat16 would round away what {len(lost)} branches add: |F(x)|/|x| is "
            f"{number(max(c.ratio for c in lost))} at most",
            why="bfloat16 has 8 bits: an addition below 1/256 of the stream is lost. Keep the stream in float32 "
            "(autocast does) until the branches have grown",
            source="bfloat16: 8 significant bits",
            evidence={"share": max(c.swallowed for c in lost)},
            where=tuple(c.name for c in lost),
        )


def in_half() -> bool:
    """Whether the diagnosis itself runs in float16, under autocast."""
    return any(torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) == torch.float16 for d in ("cpu", "cuda"))


def loud_start(context: Context) -> Iterator[Finding]:
    """Logits far from 0 at the start."""
    measured = context.measured
    if not (measured.finite and measured.logits > LOUD):
        return
    yield Finding(
        rule="loud-start",
        level="note",
        what=f"the output has size {number(measured.logits)} at the start, the loss is {number(measured.loss)}",
        why="the first steps only undo what chance put there; the loss of a network that knows nothing is log(classes)",
        source="Zhang et al. 2019 start the classifier at 0 (https://arxiv.org/abs/1901.09321, sec. 3)",
        evidence={"logits": measured.logits, "loss": measured.loss},
        remedies=calming(context),
    )


LOUD = 10.0

RULES: tuple[Rule, ...] = (
    not_finite,
    two_zeros,
    stream_grows,
    collapse,
    no_skips,
    gradients_differ,
    post_norm,
    dead_units,
    low_precision,
    loud_start,
)


# of the configurations of benchmarks/trainability with smaller odds, 3 of 93 trained all the same; of those with odds
# between this and a half, 17 of 71 did: too many to say that they will not
HOPELESS = 0.1


def looks_ahead(context: Context) -> Iterator[Finding]:
    """What the look ahead says, and the settings under which it says otherwise."""
    outlook = context.outlook
    if outlook.trains or not context.measured.finite:
        return
    better = outlook.better
    yield Finding(
        rule=outlook.cause,
        level="fatal" if better is None and not outlook.wakes and outlook.probability < HOPELESS else "serious",
        what=outlook.what,
        why=outlook.why,
        source=outlook.source,
        evidence=outlook.evidence,
        remedies=() if better is None else (LearningRate(better),),
    )


def findings_of(context: Context) -> list[Finding]:
    """What all rules find. Where the look ahead says no and no other rate helps, the causes that were found are what
    is at fault, and their remedies what to do.
    """
    causes = [finding for rule in RULES for finding in rule(context)]
    ahead = list(looks_ahead(context))
    if (
        ahead
        and not ahead[0].remedies
        and any(cause.rule in STRUCTURAL for cause in causes)
        and not context.outlook.wakes
    ):
        ahead = [replace(ahead[0], level="fatal")]  # bad odds, and a reason for them
    if ahead:
        level = ahead[0].level
        blamed = STRUCTURAL if level == "serious" else STRUCTURAL | SIGNAL
        causes = [replace(c, level=level) if c.level != "fatal" and c.rule in blamed else c for c in causes]
        if level == "fatal" and not any(c.remedies and c.level == "fatal" for c in causes):
            ahead = [replace(ahead[0], remedies=last_resorts(context))]
    return [*sorted(causes, key=lambda cause: cause.rule not in STRUCTURAL), *ahead]


STRUCTURAL = frozenset({"no-skips", "two-zeros", "stream-grows", "post-norm"})
"""Rules that blame the way a network is put together: where another rate would help too, it is a way around."""
SIGNAL = frozenset({"samples-collapse", "rank-collapse", "exploding-gradient", "vanishing-gradient", "dead-units"})
"""Rules that say what the network does to its signal."""


def last_resorts(context: Context) -> tuple[Remedy, ...]:
    """What to try where nothing but the outcome is known."""
    rate = context.settings.rate
    fresh: tuple[Remedy, ...] = (UnitVariance(context.maps),) if context.maps else ()
    return (*calming(context), *fresh, LearningRate(rate / 10), LearningRate(rate * 10))


def verdict_of(findings: Sequence[Finding]) -> tuple[Verdict, tuple[str, ...]]:
    """Fatal findings say no; serious ones say on which condition."""
    if any(finding.level == "fatal" for finding in findings):
        return "will not train", ()
    serious = [finding for finding in findings if finding.level == "serious"]
    conditions = tuple(dict.fromkeys(condition(finding) for finding in serious))
    return ("trains if", conditions) if serious else ("trains", ())


def condition(finding: Finding) -> str:
    """What a serious finding makes the training depend on."""
    if not finding.remedies:
        chance = finding.evidence.get("probability")
        return finding.what if chance is None else f"it is lucky: so begun, {chance:.0%} do"
    remedy = finding.remedies[0]
    if isinstance(remedy, LearningRate):
        return f"learning rate {'at most' if finding.rule == 'rate-too-high' else 'about'} {remedy.value:.2g}"
    return str(remedy)
