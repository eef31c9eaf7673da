"""Rules on stochastic depth: modules that drop branches, in what mode, by whose random numbers, where, at what rate."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from skipway.diagnosis.findings import number
from skipway.diagnosis.lint.rule import Hit, rule
from skipway.diagnosis.lint.survey import Survey
from skipway.errors import SkipwayError
from skipway.tracing import Program, find_residual_adds, watch

__all__ = ["by_python", "in_evaluation", "odd_rates", "without_skip"]

DROP = re.compile(r"drop_?path|stochastic_?depth|drop_?block", re.IGNORECASE)
PROBABILITIES = ("probability", "drop_prob", "p", "prob", "drop_path_rate", "drop_rate", "drop_path", "rate")
UNSURE = {"parallel", "unrelated", "pyramid", "hierarchical"}
"""Reasons to refuse an addition one of whose sides might be a branch after all."""


@dataclass(frozen=True)
class Drop:
    """A module that drops branches.

    Args:
        path: of the module.
        module: itself.
        key: its attribute that holds the probability.
        probability: of dropping.
    """

    path: str
    module: nn.Module
    key: str
    probability: float


def drops_of(model: nn.Module) -> list[Drop]:
    """The modules that drop branches: leaves without parameters, known by the names of class and probability."""
    found = []
    for path, module in model.named_modules():
        if DROP.search(type(module).__name__) and not [*module.children(), *module.parameters()]:
            held = ((key, getattr(module, key, None)) for key in PROBABILITIES)
            known = [Drop(path, module, key, float(value)) for key, value in held if isinstance(value, int | float)]
            found.extend(known[:1])
    return found


def active(model: nn.Module) -> list[Drop]:
    """Those that drop anything."""
    return [drop for drop in drops_of(model) if drop.probability > 0]


@dataclass(frozen=True)
class Trial:
    """What a dropping module did when it was tried.

    Args:
        still: whether it left ones alone in evaluation mode; True where it could not be called.
        python: whether it moved the state of Python's random numbers.
    """

    still: bool = True
    python: bool = False


def trial(drop: Drop) -> Trial:
    """Try a copy of a dropping module on ones, without its hooks, at probability ½ so that chance hides nothing."""
    twin = copy.copy(drop.module)
    before = random.getstate()
    ones = torch.ones(32, 2, 8, 8)
    try:
        setattr(twin, drop.key, 0.5)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            twin.training = False
            outputs = [twin.forward(ones.clone()) for _ in range(8)]
            twin.training = True
            twin.forward(ones.clone())
    except Exception:  # a stranger's forward, which may want other arguments
        return Trial()
    finally:
        moved = random.getstate() != before
        random.setstate(before)
    still = all(not isinstance(out, Tensor) or torch.equal(out, ones) for out in outputs)
    return Trial(still, moved)


@rule(
    "P9",
    "branches dropped in evaluation mode",
    "serious",
    why="Stochastic depth is a regulariser of training; in evaluation the full network is meant to run.",
    source="Huang et al. 2016, 'Deep Networks with Stochastic Depth', sec. 3: https://arxiv.org/abs/1603.09382",
)
def in_evaluation(survey: Survey) -> Iterator[Hit]:
    """The module itself is called on ones, in evaluation mode at probability ½."""
    found = [drop.path for drop in active(survey.model) if not trial(drop).still]
    if found:
        yield Hit(
            what=f"{len(found)} modules drop or rescale branches in evaluation mode; have them ask self.training",
            where=tuple(found),
            evidence={"modules": len(found)},
        )


@rule(
    "P9",
    "branches dropped by Python's random numbers",
    "note",
    why="torch.compile freezes Python's choice into the graph, and each rank of a distributed run makes its own.",
    source="https://github.com/pytorch/pytorch/issues/95425",
)
def by_python(survey: Survey) -> Iterator[Hit]:
    """Calling the module moves the state of Python's `random`."""
    found = [drop.path for drop in active(survey.model) if trial(drop).python]
    if found:
        yield Hit(
            what=f"{len(found)} modules draw from Python's random; draw a tensor, sample by sample",
            where=tuple(found),
            evidence={"modules": len(found)},
        )


@rule(
    "P9",
    "drop path outside of a branch",
    "serious",
    why="On the skip, or where no skip goes round it, a dropped sample loses all that the network knew of it; and what "
    "is not read again regularises nothing.",
    source="Huang et al. 2016, eq. 2: y = x + b F(x): https://arxiv.org/abs/1603.09382",
)
def without_skip(survey: Survey) -> Iterator[Hit]:
    """A training-mode pass is watched: what a dropping module did has to be part of some connection's branch.

    A note where additions were refused whose sides might be branches after all.
    """
    names = {drop.path for drop in active(survey.model)}
    program = watched_in_training(survey) if names else None
    if program is None:
        return
    sums, refused = find_residual_adds(program)
    outside = names - {path for each in sums for path in each.modules}
    ends = {value.owner: value.number for value in program.values if value.signal and value.owner in outside}
    if ends:
        lost = sum(not program.users[end] and end < len(program) - 1 for end in ends.values())  # the last is the output
        yield Hit(
            what=f"{len(ends)} modules drop what is no residual branch"
            + (f", {lost} of them what nothing reads again" if lost else "")
            + "; put them at the end of a branch",
            where=tuple(ends),
            evidence={"modules": len(ends), "without effect": lost},
            level="note" if any(refusal.reason in UNSURE for refusal in refused) else "serious",
        )


def watched_in_training(survey: Survey) -> Program | None:
    """What the model runs in training mode, if it can, with Python's random numbers left as they were."""
    if survey.example is None:
        return None
    state = random.getstate()
    try:
        return watch(survey.model, survey.example, training=True)
    except SkipwayError:  # BatchNorm on a single value, say
        return None
    finally:
        random.setstate(state)


@rule(
    "P9",
    "odd rates of stochastic depth",
    "note",
    why="Early branches are what all later ones build on: the rate rises with depth, from 0. At 1 a branch never runs.",
    source="Huang et al. 2016, eq. 4: p_l = 1 - l/L (1 - p_L): https://arxiv.org/abs/1603.09382",
)
def odd_rates(survey: Survey) -> Iterator[Hit]:
    """Rates that fall all the way, in the order of registration; rates of 1 or more, or below 0, are serious."""
    rates = {drop.path: drop.probability for drop in drops_of(survey.model)}
    wrong = {path: p for path, p in rates.items() if not 0.0 <= p < 1.0}
    if wrong:
        yield Hit(
            what=f"{len(wrong)} branches are dropped with probability {number(max(wrong.values()))}; it has to be "
            "at least 0 and below 1",
            where=tuple(wrong),
            evidence={"probability": max(wrong.values())},
            level="serious",
        )
        return
    values = list(rates.values())
    falling = all(later <= earlier for earlier, later in pairwise(values))
    if values and values[-1] < values[0] and falling:
        yield Hit(
            what=f"the rate of stochastic depth falls with depth, from {number(values[0])} to "
            f"{number(values[-1])}; turn it round",
            where=tuple(rates),
            evidence={"first": values[0], "last": values[-1]},
        )
