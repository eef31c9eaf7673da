"""Rules on what a network puts out and on the numbers on the way: answers in sight, starts, logits, precision."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from skipway.diagnosis.activations import Activations
from skipway.diagnosis.findings import Finding, format_number
from skipway.diagnosis.remedies import Damp, FullPrecision, LearningRate, Remedy, Shrink, WarmUp
from skipway.diagnosis.rule_context import Context, Rule, calming
from skipway.diagnosis.trial import LookAhead
from skipway.errors import counted

__all__ = ["OUTPUT_RULES"]

HALF = 65504.0
"""Largest number of float16."""


def answer_in_sight(context: Context) -> Iterator[Finding]:
    """The output at a position depends on the token that the loss asks for there."""
    asked = context.measured.asked
    if asked is None or asked.ahead is None:
        return
    following = asked.ahead == 1
    yield Finding(
        rule="missing-causal-mask" if following else "copied-target",
        level="serious" if following else "note",
        what="the loss asks for the next token, and the output at a position changes with it: it is in sight"
        if following
        else "the loss asks at every position for the token that stands there: copying it is enough",
        why="The loss falls below what is possible for text, and the network generates nothing of use: set the causal "
        "mask (is_causal=True) in every layer that mixes positions, or hide the tokens that are asked for."
        if following
        else "The loss falls to 0 without a model of the text. Shift the targets by one position (next tokens), or "
        "hide the tokens that are asked for and set the other labels to -100 (masked language models).",
        source="Vaswani et al. 2017, sec. 3.2.3 (https://arxiv.org/abs/1706.03762); measured by exchanging that token",
        evidence={"positions ahead": float(asked.ahead), "entropy of the targets": asked.entropy},
    )


def loud_start(context: Context) -> Iterator[Finding]:
    """Outputs far from 0 before training, or a loss far above that of an even answer."""
    measured, asked = context.measured, context.measured.asked
    far = asked is not None and asked.cross_entropy > asked.uniform + FAR
    if not measured.finite or not (measured.logits > LOUD or far):
        return
    tied = tied_table(context)
    yield Finding(
        rule="loud-start",
        level="note",
        what=f"before training the output has rms {format_number(measured.logits)} and the loss is "
        f"{format_number(measured.loss)}"
        + (f"; an even answer has log {asked.classes:,} = {format_number(asked.uniform)}" if asked else ""),
        why="The first steps only undo what the random start put there. A classifier that knows nothing should have "
        "the loss log(number of classes)." + TIED * (tied is not None),
        source="Zhang et al. 2019, sec. 3, start the classifier at 0 (https://arxiv.org/abs/1901.09321)"
        + ("; Vaswani et al. 2017, sec. 3.4 (https://arxiv.org/abs/1706.03762), for tied tables" if tied else ""),
        evidence={"output rms": measured.logits, "loss": measured.loss},
        where=(tied,) if tied else (),
        remedies=quieter_head(context, tied),
    )


TIED = (
    " The head is the table of the tokens: drawn with deviation 1 it puts out logits of √width, with 1/√width or "
    "GPT-2's 0.02 small ones."
)
LOUD = 10.0
FAR = 1.0
"""Nats above log(classes): logits of deviation σ cost about σ²/2, so that σ is above 1.4."""


def tied_table(context: Context) -> str | None:
    """The parameter that tokens are looked up in and that multiplies the last signal, too."""
    values = context.subject.program.values
    looked_up = {name for v in values if v.operator == "embedding" for name in owned(context, v.operands[0])}
    maps = [value for value in values if value.part == "map"]
    return next((n for value in maps[-1:] for o in value.operands for n in owned(context, o) if n in looked_up), None)


def owned(context: Context, number: int) -> frozenset[str]:
    """The parameters that a value was computed from, where it is no signal."""
    return context.subject.program[number].parameters


def quieter_head(context: Context, tied: str | None) -> tuple[Remedy, ...]:
    """Remedies that bring the outputs near 0: a smaller last map, or smaller branches."""
    asked, layers = context.measured.asked, context.subject.layers
    name = tied or (f"{layers[-1]}.weight" if layers else "")
    if asked is None or name not in context.subject.parameters:
        return calming(context)
    return (Shrink(name, 0.5 / context.measured.logits), *calming(context))


def sharp_attention(context: Context) -> Iterator[Finding]:
    """Logits of an attention so large that each query sees one key, at the start or after the trial steps."""
    ahead = context.measured.ahead
    seen = () if ahead is None else tuple(a for a in ahead.activations if a.spread > SHARP)
    if ahead is None or not seen:
        return
    at_start = ahead.activations[0].spread > SHARP
    yield Finding(
        rule="sharp-attention",
        level="note",
        what=f"the attention logits of {seen[0].spread_in or 'the network'} have deviation "
        f"{format_number(seen[0].spread)} over the keys"
        + ("" if at_start else f" after {counted(len(ahead.losses), 'trial step')}"),
        why="A softmax over such logits picks one entry and passes hardly any gradient, and in half precision they are "
        "rounded to whole numbers. Divide them by the root of the heads' width, normalise queries and keys (qk-norm), "
        "or cap them (soft-capping).",
        source="Dehghani et al. 2023, sec. 3.1 (https://arxiv.org/abs/2302.05442); Zhai et al. 2023 "
        "(https://arxiv.org/abs/2303.06296); Gemma 2, sec. 2 (https://arxiv.org/abs/2408.00118), for the cap",
        evidence={name: a.spread for name, a in zip(("before", "after"), ahead.activations, strict=True)},
        where=tuple(dict.fromkeys(a.spread_in for a in seen)),
        remedies=() if at_start else (LearningRate(context.settings.rate / 10),),
    )


SHARP = 10.0
"""e^10 = 22,000 lies between a logit and one that is one deviation larger."""


def growing_logits(context: Context) -> Iterator[Finding]:
    """Outputs that the trial steps blow up."""
    ahead, asked = context.measured.ahead, context.measured.asked
    if ahead is None or asked is None or not all(map(math.isfinite, ahead.outputs)):
        return
    before, after = ahead.outputs
    if not (after > LOUD and after > 3 * before):
        return
    yield Finding(
        rule="growing-logits",
        level="note",
        what=f"{counted(len(ahead.losses), 'trial step')} raise the rms of the logits from {format_number(before)} to "
        f"{format_number(after)}",
        why="Nothing in the cross-entropy holds the sum of the exponentials near 1, so that the logits drift away "
        "together, until half precision rounds them. A term 1e-4 · log² of that sum (z-loss) or a cap by a tanh holds "
        "them.",
        source="Chowdhery et al. 2022, sec. 5 (https://arxiv.org/abs/2204.02311); Wortsman et al. 2023, sec. 3.2 "
        "(https://arxiv.org/abs/2309.14322)",
        evidence={"output rms before": before, "output rms after": after},
        remedies=(LearningRate(context.settings.rate / 10),),
    )


def long_first_step(context: Context) -> Iterator[Finding]:
    """The first step moves the outputs of a deep network by more than their softmax can bear."""
    ahead, length = context.measured.ahead, len(context.subject.chain)
    if ahead is None or length < DEEP or context.settings.warmup or context.measured.asked is None:
        return
    change = ahead.first_change
    if not (math.isfinite(change) and change > max(1.0, ahead.outputs[0])):
        return
    yield Finding(
        rule="rate-times-depth",
        level="note",
        what=f"the first step at rate {context.settings.rate:.3g} moves the logits by {format_number(change)} (rms), "
        f"through {length} connections",
        why="Every branch is updated at once, and what they change adds up along the stream: at the same rate the step "
        "of the whole network grows with its depth. A rate that falls as 1/√L, or a warm-up, keeps it near 1.",
        source="Liu et al. 2020, theorem 2 (https://arxiv.org/abs/2004.08249); Bordelon et al. 2024 "
        "(https://arxiv.org/abs/2309.16620) and Yang et al. 2024 (https://arxiv.org/abs/2310.02244) for the rate",
        evidence={"change of the logits": change, "connections": float(length)},
        remedies=(LearningRate(context.settings.rate / change / 2), WarmUp(max(100, context.settings.steps // 20))),
    )


DEEP = 24
"""Connections of a transformer of 12 layers."""


def growth_by_depth(context: Context) -> Iterator[Finding]:
    """A deep pre-norm network whose stream grows by a unit per branch: the last maps start as large as the others."""
    chain, points = context.subject.chain, context.measured.connections
    if len(points) < 2 * DEEP or not all("pre" in c.seen.norms and "post" not in c.seen.norms for c in chain):
        return
    growth = points[-1].variance_after / max(points[0].variance_before, points[0].variance_branch, 1e-30)
    ratios = [last_over_first(context, c.seen.maps, c.seen.last) for c in chain]
    known = sorted(ratio for ratio in ratios if ratio is not None)
    if not growth > len(points) / 2 or not known or known[len(known) // 2] < 2 * len(points) ** -0.5:
        return
    yield Finding(
        rule="growth-by-depth",
        level="note",
        what=f"the variance of the residual stream grows {format_number(growth)}-fold over {len(points)} connections, "
        "and the last maps of the branches start as large as their other maps",
        why="Under pre-norm each of L branches adds one unit to the variance, so that the later a branch, the less it "
        "changes the stream, down to 1/√L. Last maps that start 1/√L smaller (GPT-2: 1/√(2 · layers)) keep it near 2.",
        source="Radford et al. 2019, sec. 2.3; De & Smith 2020 (https://arxiv.org/abs/2002.10444); Sun et al. 2025 "
        "for what deep branches lose (https://arxiv.org/abs/2502.05795)",
        evidence={"growth": growth, "last over first weights": known[len(known) // 2]},
        where=tuple(c.name for c in chain),
        remedies=(Damp(),),
    )


def last_over_first(context: Context, maps: tuple[str, ...], last: str | None) -> float | None:
    """Deviation of the weights of a branch's last map over that of its first one."""
    if not maps or last is None or last == maps[0]:
        return None
    parameters = context.subject.parameters
    weights = [parameters[f"{name}.weight"] for name in (last, maps[0]) if f"{name}.weight" in parameters]
    if len(weights) < 2 or not bool(weights[1].any()):
        return None
    return float(weights[0].detach().float().std() / weights[1].detach().float().std())


def low_precision(context: Context) -> Iterator[Finding]:
    """Values and weights for which float16 is too narrow, and additions that bfloat16 rounds away."""
    yield from overflow(context)
    yield from half_weights(context)
    lost = [c for c in context.measured.connections if c.swallowed > 0.9]
    if lost:
        yield Finding(
            rule="lost-in-bfloat16",
            level="note",
            what=f"bfloat16 would round away the output of {counted(len(lost), 'branch', 'branches')}: |F(x)|/|x| is "
            f"{format_number(max(c.ratio for c in lost))} at most",
            why="bfloat16 has 8 significant bits, so an addend below 1/256 of the stream is lost. Keep the stream in "
            "float32, as autocast does, until the branches have grown.",
            source="bfloat16: 8 significant bits",
            evidence={"largest share of lost elements": max(c.swallowed for c in lost)},
            where=tuple(c.name for c in lost),
        )


def overflow(context: Context) -> Iterator[Finding]:
    """Values at connections, or products of maps and gates within branches, that float16 cannot hold."""
    over = [c for c in context.measured.connections if c.overflow > 1 / 16]
    inside = largest_inside(context.measured.ahead)
    most = max([c.overflow for c in over] + [inside.largest / HALF])
    if not most > 1 / 16:
        return
    where = [c.name for c in over] or [inside.largest_in] * bool(inside.largest_in)
    ahead = context.measured.ahead
    after = ahead is not None and inside is ahead.activations[-1] and inside.largest / HALF >= most
    when = " after the trial steps" if after else ""
    yield Finding(
        rule="overflow",
        level="serious" if most > 1 and in_half(context) else "note",
        what=f"values reach {format_number(most * HALF)}{when}, and float16 ends at 65504",
        why="Larger values are infinite in float16, and activations grow further during training. bfloat16 has the "
        "range of float32.",
        source="IEEE 754-2019, table 3.5",
        evidence={"largest value over float16's": most},
        where=tuple(where),
        remedies=calming(context),
    )


def largest_inside(ahead: LookAhead | None) -> Activations:
    """The pass, before or after the trial steps, with the largest activations."""
    if ahead is None:
        return Activations()
    return max(ahead.activations, key=lambda each: -1.0 if math.isnan(each.largest) else each.largest)


def half_weights(context: Context) -> Iterator[Finding]:
    """Weights in float16, whose gradients and moments underflow."""
    half = [name for name, p in context.subject.parameters.items() if p.dtype == torch.float16]
    if not half:
        return
    yield Finding(
        rule="float16-weights",
        level="serious",
        what=f"{counted(len(half), 'parameter')} held in float16",
        why="The smallest number of float16 is 6e-8: squares of gradients and an ε of 1e-8 become 0, so that Adam "
        "divides 0 by 0, and an update below 1/2048 of a weight is lost.",
        source="Micikevicius et al. 2018, sec. 3 (https://arxiv.org/abs/1710.03740)",
        evidence={"parameters": float(len(half))},
        where=tuple(half),
        remedies=(FullPrecision(),),
    )


def in_half(context: Context) -> bool:
    """Whether the diagnosis itself runs in float16, under autocast or with such weights."""
    if any(parameter.dtype == torch.float16 for parameter in context.subject.parameters.values()):
        return True
    return any(torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) == torch.float16 for d in ("cpu", "cuda"))


OUTPUT_RULES: tuple[Rule, ...] = (
    answer_in_sight,
    low_precision,
    loud_start,
    sharp_attention,
    growing_logits,
    long_first_step,
    growth_by_depth,
)
