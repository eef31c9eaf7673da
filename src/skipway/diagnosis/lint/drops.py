"""Rules on stochastic depth: the mode, the random numbers, the place and the rates of modules that drop branches."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from skipway.diagnosis.findings import format_number
from skipway.diagnosis.lint.rule import Hit, lint_rule
from skipway.diagnosis.lint.survey import Survey
from skipway.errors import SkipwayError, counted
from skipway.tracing import Program, find_residual_adds, watch

__all__ = ["by_python", "in_evaluation", "odd_rates", "without_skip"]

DROP = re.compile(r"drop_?path|stochastic_?depth|drop_?block", re.IGNORECASE)
PROBABILITIES = ("probability", "drop_prob", "p", "prob", "drop_path_rate", "drop_rate", "drop_path", "rate")
UNSURE = {"parallel", "unrelated", "pyramid", "hierarchical", "gated", "selected", "joined", "unknown"}
"""Reasons for refusing an addition one side of which may be a branch after all."""


@dataclass(frozen=True)
class Drop:
    """A module that drops branches.

    Args:
        path: of the module.
        module: the module itself.
        key: its attribute with the probability.
        probability: of dropping.
    """

    path: str
    module: nn.Module
    key: str
    probability: float


def drops_of(model: nn.Module) -> list[Drop]:
    """The modules that drop branches: leaves without parameters, recognised by their class name and an attribute."""
    found = []
    for path, module in model.named_modules():
        if DROP.search(type(module).__name__) and not [*module.children(), *module.parameters()]:
            held = ((key, getattr(module, key, None)) for key in PROBABILITIES)
            known = [Drop(path, module, key, float(value)) for key, value in held if isinstance(value, int | float)]
            found.extend(known[:1])
    return found


def active_drops(model: nn.Module) -> list[Drop]:
    """The modules that drop branches with a probability above 0."""
    return [drop for drop in drops_of(model) if drop.probability > 0]


@dataclass(frozen=True)
class DropTrial:
    """Behaviour of a dropping module in a trial.

    Args:
        still: it returned its input in evaluation mode, or could not be called.
        python: it moved the state of Python's random numbers.
    """

    still: bool = True
    python: bool = False


def try_drop(drop: Drop) -> DropTrial:
    """Call a copy of a dropping module, without its hooks, on ones at probability ½, so that chance hides nothing."""
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
    except Exception:  # its forward may need other arguments
        return DropTrial()
    finally:
        moved = random.getstate() != before
        random.setstate(before)
    still = all(not isinstance(out, Tensor) or torch.equal(out, ones) for out in outputs)
    return DropTrial(still, moved)


@lint_rule(
    "P9",
    "branches dropped in evaluation mode",
    "serious",
    why="Stochastic depth regularises training; in evaluation mode the full network should run.",
    source="Huang et al. 2016, 'Deep Networks with Stochastic Depth', sec. 3: https://arxiv.org/abs/1603.09382",
)
def in_evaluation(survey: Survey) -> Iterator[Hit]:
    """Calls the module on ones, in evaluation mode at probability ½."""
    found = [drop.path for drop in active_drops(survey.model) if not try_drop(drop).still]
    if found:
        yield Hit(
            what=f"branches are dropped or rescaled in evaluation mode by {counted(len(found), 'module')}; "
            "check self.training first",
            where=tuple(found),
            evidence={"modules": len(found)},
        )


@lint_rule(
    "P9",
    "branches dropped by Python's random numbers",
    "note",
    why="torch.compile bakes Python's choice into the graph, and each rank of a distributed run makes its own.",
    source="https://github.com/pytorch/pytorch/issues/95425",
)
def by_python(survey: Survey) -> Iterator[Hit]:
    """Calls the module, and checks whether that moves the state of Python's `random`."""
    found = [drop.path for drop in active_drops(survey.model) if try_drop(drop).python]
    if found:
        yield Hit(
            what=f"Python's random is used by {counted(len(found), 'module')}; draw a tensor, one number per sample",
            where=tuple(found),
            evidence={"modules": len(found)},
        )


@lint_rule(
    "P9",
    "drop path outside of a branch",
    "serious",
    why="On the skip, or where no skip leads around it, a dropped sample loses everything that was computed of it; a "
    "dropped tensor that nothing reads again regularises nothing.",
    source="Huang et al. 2016, eq. 2: y = x + b F(x): https://arxiv.org/abs/1603.09382",
)
def without_skip(survey: Survey) -> Iterator[Hit]:
    """Traces a pass in training mode: every dropping module has to be part of a connection's branch.

    A note where some additions were refused whose sides may be branches after all.
    """
    names = {drop.path for drop in active_drops(survey.model)}
    program = watched_in_training(survey) if names else None
    if program is None:
        return
    sums, refused = find_residual_adds(program)
    outside = names - {path for each in sums for path in each.modules}
    ends = {value.owner: value.number for value in program.values if value.signal and value.owner in outside}
    if ends:
        lost = sum(not program.users[end] and end < len(program) - 1 for end in ends.values())  # the last is the output
        yield Hit(
            what=f"tensors that are no residual branch are dropped by {counted(len(ends), 'module')}"
            + (f", {lost} of the tensors are never read again" if lost else "")
            + "; put them at the end of a branch",
            where=tuple(ends),
            evidence={"modules": len(ends), "without effect": lost},
            level="note" if any(refusal.reason in UNSURE for refusal in refused) else "serious",
        )


def watched_in_training(survey: Survey) -> Program | None:
    """The program of a pass in training mode, None where it fails; Python's random numbers are left as they were."""
    if survey.example is None:
        return None
    state = random.getstate()
    try:
        return watch(survey.model, survey.example, training=True)
    except SkipwayError:  # BatchNorm on a single value, for example
        return None
    finally:
        random.setstate(state)


@lint_rule(
    "P9",
    "falling or impossible rates of stochastic depth",
    "note",
    why="All later branches build on the early ones, so the rate should rise with depth, from 0. At 1 a branch never "
    "runs.",
    source="Huang et al. 2016, eq. 4: p_l = 1 - l/L (1 - p_L): https://arxiv.org/abs/1603.09382",
)
def odd_rates(survey: Survey) -> Iterator[Hit]:
    """Rates that fall all the way, in the order of registration; a rate of 1 or more, or below 0, is serious."""
    rates = {drop.path: drop.probability for drop in drops_of(survey.model)}
    wrong = {path: p for path, p in rates.items() if not 0.0 <= p < 1.0}
    if wrong:
        yield Hit(
            what=f"{counted(len(wrong), 'drop probability', 'drop probabilities')} up to "
            f"{format_number(max(wrong.values()))}; the rule is 0 <= p < 1",
            where=tuple(wrong),
            evidence={"probability": max(wrong.values())},
            level="serious",
        )
        return
    values = list(rates.values())
    falling = all(later <= earlier for earlier, later in pairwise(values))
    if values and values[-1] < values[0] and falling:
        yield Hit(
            what=f"the rate of stochastic depth falls with depth, from {format_number(values[0])} to "
            f"{format_number(values[-1])}; let it rise",
            where=tuple(rates),
            evidence={"first": values[0], "last": values[-1]},
        )
