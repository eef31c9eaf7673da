"""From measurements to findings: each rule has a source, each threshold a theory or a measurement."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from skipway.diagnosis.findings import Finding, Level, Verdict, format_number
from skipway.diagnosis.loss_rules import LOSS_RULES
from skipway.diagnosis.measurement import ConnectionSignal, LayerSignal
from skipway.diagnosis.offers import Offer
from skipway.diagnosis.outlook import MEASURED, REASONS, SOURCES, cause_of
from skipway.diagnosis.output_rules import OUTPUT_RULES
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
from skipway.diagnosis.rule_context import SIGNAL, STRUCTURAL, Context, Rule, calming
from skipway.errors import counted
from skipway.tracing.program import Program

__all__ = ["RULES", "blame", "causes_of"]


def not_finite(context: Context) -> Iterator[Finding]:
    """The loss or its gradient is not finite."""
    measured = context.measured
    if measured.finite:
        return
    points: Sequence[ConnectionSignal | LayerSignal] = measured.connections or measured.layers
    first = next((p.name for p in points if not math.isfinite(size_of(p))), None)
    yield Finding(
        rule="not-finite",
        level="fatal",
        what=f"before the first step the loss is {format_number(measured.loss)} "
        f"and the gradient norm {format_number(measured.gradient)}",
        why="A step along a gradient that is not finite makes the weights NaN.",
        source="IEEE 754-2019, sec. 6",
        evidence={"loss": measured.loss, "gradient norm": measured.gradient},
        where=() if first is None else (first,),
        remedies=calming(context),
    )


def size_of(point: ConnectionSignal | LayerSignal) -> float:
    """The size of the signal at a connection or layer."""
    return point.stream if isinstance(point, ConnectionSignal) else point.std


def stream_grows(context: Context) -> Iterator[Finding]:
    """The variance of the stream grows far faster than by one unit per branch."""
    points = [c for c in context.measured.connections if c.variance_after > 0 and c.variance_before > 0]
    if len(points) < 2:
        return
    # a stem that is small beside a normed branch is no growth: such branches add one unit each
    growth = points[-1].variance_after / max(points[0].variance_before, points[0].variance_branch)
    allowed = 10 * (len(points) + 1)
    if not growth > allowed:
        return
    rate = growth ** (1 / len(points))
    worst = [c.name for c in points if c.variance_after / c.variance_before > 1.5]
    yield Finding(
        rule="stream-grows",
        level="note",
        what=f"the variance of the residual stream grows {format_number(growth)}-fold over {len(points)} connections, "
        f"{format_number(rate)}-fold per connection",
        why="A branch whose output is as large as its input doubles the variance of the stream, so L of them multiply "
        "it by 2^L, and the curvature of the loss grows with it. With a norm at the start of every branch the variance "
        "grows by one unit per branch, to L + 1.",
        source="De & Smith 2020, sec. 2 (https://arxiv.org/abs/2002.10444); the rule allows ten times L + 1",
        evidence={"growth": growth, "allowed growth": float(allowed), "growth per connection": rate},
        where=tuple(worst or [points[-1].name]),
        remedies=calming(context),
    )


def two_zeros(context: Context) -> Iterator[Finding]:
    """A branch in which no weight has a gradient, although a gradient reaches the addition."""
    still = set(context.measured.still)
    parameters, model = context.subject.parameters, context.subject.model
    # a bias after both zeros moves, and adds the same to all samples
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
        level="serious",
        what=f"in {len(dead)} of {len(context.subject.chain)} branches no weight has a gradient",
        why="Two factors of the branch are zero, such as its last map and its scale. The gradient of each is a "
        "multiple of the other, so neither ever moves. One zero is enough for a silent start.",
        source="product rule: ∂(ab)/∂a = b",
        evidence={"branches": float(len(dead))},
        where=tuple(dead),
        remedies=(Revive(tuple(maps)),) if maps else (),
    )


def residual_warmup(context: Context) -> Iterator[Finding]:
    """A clock that something has to move, and a training that ends before it does."""
    warmup = context.subject.warmup
    if warmup is None:
        return
    late = (
        ""
        if not warmup.planned.running
        else f"; after the {warmup.total:,} planned steps they end at "
        + (f"{min(warmup.planned.factors):.3g}, which a share of the training, prores(0.25), avoids")
    )
    silent = any(signal.branch == 0 for signal in context.measured.connections)
    yield Finding(
        rule="residual-warmup",
        level="note",
        what=f"the residual warm-up stands at {warmup.now}; the network is judged as at {warmup.judged}{late}",
        why="A branch adds nothing and has no gradient while its factor is 0. Something has to move the clock: a loop "
        "that does not call skipway.set_step(model, step, total) after each optimizer step trains stem and head alone."
        + " The branches start at 0 themselves, too: two zeros at step 0, and one from step 1 on."
        * silent,
        source="Chen et al. 2026, eq. 3 (https://arxiv.org/abs/2603.05369)",
        evidence={"step": float(warmup.now.step), "smallest factor": min(warmup.now.factors)},
    )


def similarity_collapse(context: Context) -> Iterator[Finding]:
    """Different samples, or the tokens of one sample, end up in the same direction."""
    points: Sequence[ConnectionSignal | LayerSignal] = context.measured.connections or context.measured.layers[:-1]
    same = [p for p in points if p.distinct < INDISTINCT]
    tokens = [p for p in points if p.tokens_distinct < INDISTINCT]
    for found, name, who in ((same, "samples-collapse", "samples"), (tokens, "rank-collapse", "tokens of a sample")):
        # a class token or a silent head is the same for all samples by design
        if not found or len(found) < len(points) / 4:
            continue
        last = found[-1]
        distinct = last.tokens_distinct if found is tokens else last.distinct
        yield Finding(
            rule=name,
            level="note",
            what=f"from {found[0].name} on, different {who} have the same direction: "
            f"1 − cosine similarity is {format_number(distinct)} at {last.name}",
            why="No later layer can tell apart what has become equal, and the gradient carries only what all of them "
            "have in common.",
            source="Schoenholz et al. 2017, eq. 5 (https://arxiv.org/abs/1611.01232); for tokens Dong et al. 2021, "
            "theorem 2.2 (https://arxiv.org/abs/2103.03404)",
            evidence={"1 − cosine": distinct, "places": float(len(found))},
            where=tuple(p.name for p in found),
            remedies=skips(context) if not context.measured.connections else calming(context),
        )


INDISTINCT = 1e-3


def no_skips(context: Context) -> Iterator[Finding]:
    """A deep network without any residual connection."""
    depth, smoothness = maps_in_sequence(context.subject.program), context.measured.jacobians.shattering
    if context.subject.chain or context.subject.stream_connections or depth < 12:
        return
    yield Finding(
        rule="no-skips",
        level="note",
        what=f"{depth} linear maps in sequence, and no residual connection",
        why="Without skips the size of the gradient is a product over the layers, and gradients at neighbouring inputs "
        "lose their correlation as 2^−L. Plain networks of 56 layers end with a higher training error than of 20.",
        source="He et al. 2015, fig. 6 (https://arxiv.org/abs/1512.03385); Balduzzi et al. 2017, theorem 1",
        evidence={
            "linear maps": float(depth),
            "gradient cosine between neighbouring inputs": smoothness or math.nan,
        },
        where=(),
        remedies=skips(context),
    )


def maps_in_sequence(program: Program) -> int:
    """The linear maps on the shortest way from an input to the output, of several inputs the longest such way: ways
    around others, such as the concatenations of a U-Net, are skips.
    """
    lengths: dict[int, dict[int, int]] = {}
    for value in program.values:
        if not value.signal:
            continue
        own, before = int(value.part == "map"), program.signals(value)
        ways = [lengths[number] for number in before] or [{value.number: 0}]
        inputs = {number for way in ways for number in way}
        lengths[value.number] = {each: own + min(way[each] for way in ways if each in way) for each in inputs}
    outputs = [lengths[number] for number in program.returned.get("", {}).values() if number in lengths]
    return max((length for way in outputs for length in way.values()), default=0)


def skips(context: Context) -> tuple[Remedy, ...]:
    """Remedies that give a network skips; those for other networks where it has several streams."""
    if context.trained:
        return ()
    if context.subject.stream_connections:
        return calming(context)
    if context.ours:
        return (Rescheme("identity"), Rescheme("preactivation"))
    found = context.subject.skippable
    return ((AddSkips(found),) if found else ()) + (UnitVariance(context.maps),)


def gradients_differ(context: Context) -> Iterator[Finding]:
    """The gradients of the first and of the last layers differ by orders of magnitude."""
    layers = [layer for layer in context.measured.layers if layer.weight > 0 and math.isfinite(layer.weight)]
    layers = [layer for layer in layers if not math.isnan(layer.gradient)]
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
        what=f"the gradient at {layers[0].name or 'the model'} is {format_number(ratio)} times the gradient at "
        f"{layers[-2].name}",
        why="No learning rate suits both ends: one that is right for the last layers is far too high for the first."
        if grows
        else "The first layers hardly learn, and the last ones fit whatever noise the first layers produce.",
        source="Glorot & Bengio 2010, sec. 4.2; Yang et al. 2019 for BatchNorm (https://arxiv.org/abs/1902.08129)",
        evidence={"first gradient": early, "last gradient": late, "ratio": ratio},
        where=(layers[0].name, layers[-2].name),
        remedies=skips(context) if not context.subject.chain else calming(context),
    )


UNEVEN = 1e3


def post_norm(context: Context) -> Iterator[Finding]:
    """A deep network that normalises the stream after every addition; a skip of α ≥ √L, as in Keel, outweighs that."""
    chain = context.subject.chain
    normed = [c.name for c in chain if "post" in c.seen.norms and c.seen.weights[0] ** 2 < len(chain)]
    warm = max(100, context.settings.steps // 20)
    if len(normed) < 12 or len(normed) < len(chain) / 2 or context.settings.warmup >= warm:
        return
    switch = bool(layers_with_switch(context.subject.model))
    first: Remedy = NormFirst() if switch else Rescheme("preactivation") if context.ours else Damp(0.1)
    yield Finding(
        rule="post-norm",
        level="note",
        what=f"{len(normed)} of {len(chain)} connections normalise the stream after the addition (post-norm)",
        why="Every norm shrinks the skip by about √2, so that the gradient of the first layers falls with depth while "
        "that of the last layers stays large. Such networks need warm-up, or norms inside of the branches (pre-norm).",
        source="Xiong et al. 2020, theorem 1 (https://arxiv.org/abs/2002.04745)",
        evidence={"connections": float(len(normed))},
        where=tuple(normed),
        remedies=(first, WarmUp(warm)),
    )


def dead_units(context: Context) -> Iterator[Finding]:
    """Rectified channels that are zero for every sample."""
    found = [c for c in context.measured.connections if c.dead > 0.5]
    if not found:
        return
    yield Finding(
        rule="dead-units",
        level="note",
        what=f"in {counted(len(found), 'branch', 'branches')} more than half of the channels are 0 for every sample",
        why="A rectifier that is 0 for every sample passes no gradient, so the weights before it never move.",
        source="Lu et al. 2019 (https://arxiv.org/abs/1903.06733)",
        evidence={"largest share of dead channels": max(c.dead for c in found)},
        where=tuple(c.name for c in found),
        remedies=(UnitVariance(context.maps),),
    )


RULES: tuple[Rule, ...] = (
    not_finite,
    two_zeros,
    residual_warmup,
    stream_grows,
    similarity_collapse,
    no_skips,
    gradients_differ,
    post_norm,
    dead_units,
    *LOSS_RULES,
    *OUTPUT_RULES,
)


def causes_of(context: Context) -> list[Finding]:
    """What the rules find, those about the architecture before those about its signal. What they call fatal is proved,
    whatever the trial steps say.
    """
    causes = [finding for rule in RULES for finding in rule(context)]
    return sorted(causes, key=lambda cause: cause.rule not in STRUCTURAL)


def level_of(cause: Finding, verdict: Verdict) -> Level:
    """The level of a cause beside a verdict, which the trial steps have given: what the rules find is fatal where the
    network will not train, and no more than a note about a structure that trains.
    """
    if cause.rule not in STRUCTURAL | SIGNAL:
        return cause.level
    if verdict == "will not train":
        return "fatal"
    if cause.rule == "two-zeros" or (verdict == "undecided" and cause.rule in STRUCTURAL):
        return "serious"
    return "note"


def blame(context: Context, causes: Sequence[Finding], offers: Sequence[Offer]) -> list[Finding]:
    """The causes, with that of a bad verdict that the losses and the tried remedies tell.

    A rate that alone makes the network train was at fault, in the direction in which it was moved, and other causes are
    to be mended all the same; else the losses of the trial steps tell.
    """
    outlook = context.outlook
    causes = [replace(cause, level=level_of(cause, outlook.verdict)) for cause in causes]
    rates = [each.remedy for each in offers[:1] if isinstance(each.remedy, LearningRate)]
    if outlook.ahead is None or outlook.verdict == "trains" or not (rates or outlook.verdict == "will not train"):
        return [*causes]
    cause = cause_of(outlook.ahead, context.smoothness)
    if rates:
        cause = "rate-too-low" if rates[0].value > context.settings.rate else "rate-too-high"
        causes = [replace(each, level="serious") if each.rule in STRUCTURAL | SIGNAL else each for each in causes]
    finding = Finding(
        rule=cause,
        level="fatal" if outlook.verdict == "will not train" else "serious",
        what=outlook.text,
        why=REASONS[cause],
        source=SOURCES.get(cause, MEASURED),
        evidence=outlook.evidence,
        remedies=tuple(rates),
    )
    return [*causes, finding]
