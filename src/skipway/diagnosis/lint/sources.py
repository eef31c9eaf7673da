"""Rules on networks whose blocks read earlier outputs, with learned weights or by attention over depth."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from skipway.diagnosis.findings import format_number
from skipway.diagnosis.lint.rule import Hit, lint_rule
from skipway.diagnosis.lint.survey import Survey
from skipway.errors import counted
from skipway.tracing import Program, Value

__all__ = ["drawn_queries", "unsafe_depth_weights"]

FEWEST = 3
"""Blocks that make a pattern."""


@lint_rule(
    "P35",
    "weights of earlier outputs that are drawn at random, or decayed",
    "serious",
    why="DenseFormer's averages start at 1 for the newest output and 0 for the others, which is the plain network. An "
    "initialisation of all linear maps undoes that, and weight decay pulls the stream itself to 0.",
    source="README of https://github.com/epfml/DenseFormer; Pagliardini et al. 2024: https://arxiv.org/abs/2402.02622",
)
def unsafe_depth_weights(survey: Survey) -> Iterator[Hit]:
    """Parameters alike but for their lengths, k, k + 1, k + 2, …: neither one 1 among zeros nor equal, or decayed."""
    for names in growing_families(survey):
        values = [value.flatten() for name in names if (value := survey.value(name)) is not None]
        drawn = not survey.pretrained and len(values) == len(names) and not all(map(is_chosen, values))
        decay = max(float(survey.groups.get(name, {}).get("weight_decay") or 0.0) for name in names)
        if drawn:
            newest = sum(float(value[-1]) for value in values) / len(values)
            yield Hit(
                what=f"{len(names)} averages over earlier outputs start at random, the newest one with "
                f"{format_number(newest)}; start it at 1 and the others at 0, after any other initialisation",
                where=names,
                evidence={"averages": len(names), "weight of the newest": newest},
            )
        if decay > 0:
            yield Hit(
                what=f"{len(names)} averages of earlier outputs have weight decay {format_number(decay)}; set it to 0",
                where=names,
                evidence={"averages": len(names), "weight decay": decay},
            )


def growing_families(survey: Survey) -> list[tuple[str, ...]]:
    """Names that differ by a number, of vectors each of which is one longer than the one before."""
    families: dict[str, list[str]] = {}
    for name in survey.parameters:
        families.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    found = []
    for names in families.values():
        values = [survey.parameters[name] for name in names]
        lengths = [value.numel() for value in values]
        vectors = all(value.numel() == max(value.shape, default=0) > 1 for value in values)
        if vectors and len(names) >= FEWEST and all(later - earlier == 1 for earlier, later in pairwise(lengths)):
            found.append(tuple(names))
    return found


def is_chosen(value: Tensor) -> bool:
    """Whether numbers are one among zeros, or all equal."""
    return int(value.count_nonzero()) <= 1 or bool((value == value[0]).all())


@lint_rule(
    "P31",
    "queries over depth that do not start at 0",
    "serious",
    why="With a query of 0 all earlier outputs weigh the same, which is a pre-norm network. Drawn at random, it "
    "prefers some outputs before they mean anything; all starts but 0 were worse.",
    source="Kimi Team 2026, sec. 5: https://arxiv.org/abs/2603.15031; "
    "https://github.com/linkedin/Liger-Kernel/pull/1293",
)
def drawn_queries(survey: Survey) -> Iterator[Hit]:
    """Parameters that make the logits of softmaxes over a number of sources that grows with depth."""
    if survey.pretrained or survey.program is None:
        return
    names = [name for name in queries(survey, survey.program) if survey.value(name) is not None]
    drawn = [name for name in names if bool(survey.parameters[name].detach().any())]
    if drawn:
        size = max(float(survey.parameters[name].detach().abs().max()) for name in drawn)
        yield Hit(
            what=f"{counted(len(drawn), 'query', 'queries')} over earlier outputs start at up to "
            f"{format_number(size)}; start them at 0",
            where=tuple(drawn),
            evidence={"queries": len(drawn), "largest": size},
        )


def queries(survey: Survey, program: Program) -> list[str]:
    """The parameters that make the logits over earlier outputs, in order; none where their number does not grow."""
    found: list[tuple[tuple[int, ...], set[str]]] = []
    for value in program.values:
        if value.part == "softmax" and value.signal and value.operator.strip("_").endswith("softmax"):
            names = logit_vectors(survey, program, value)
            if names:
                found.append((value.shape, names))
    ranks = {len(shape) for shape, _ in found}
    for axis in range(ranks.pop() if len(ranks) == 1 else 0):
        if grows([shape[axis] for shape, _ in found]):
            return [name for name in survey.parameters if any(name in names for _, names in found)]
    return []


def grows(sizes: Sequence[int]) -> bool:
    """Whether numbers of sources begin small and rise by one now and then."""
    return sizes[0] <= 3 <= sizes[-1] and sizes[-1] - sizes[0] > 1 and all(b - a in (0, 1) for a, b in pairwise(sizes))


def logit_vectors(survey: Survey, program: Program, softmax: Value) -> set[str]:
    """The vectors of parameters whose inner product with something makes the logits of a softmax."""
    found: set[str] = set()
    waiting, seen = program.signals(softmax), set()
    while waiting:
        value = program[waiting.pop()]
        if value.number in seen or value.norm is not None:
            continue
        seen.add(value.number)
        if value.part in ("map", "scale") and value.parameters:
            vectors = {name for name in value.parameters & survey.parameters.keys() if is_vector(survey, name)}
            found |= vectors
            if vectors:
                continue
        if value.part in ("carry", "slice", "shift", "scale", "join", "pad", "mean"):
            waiting.extend(program.signals(value))
    return found


def is_vector(survey: Survey, name: str) -> bool:
    """Whether a parameter has one axis longer than 1."""
    return sum(size > 1 for size in survey.parameters[name].shape) == 1
