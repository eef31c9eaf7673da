"""Scores of a network by which blocks are ranked."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.validation import check_rule

__all__ = ["Score", "ScoreError", "checked_score"]

Score = Callable[[nn.Module], float]
"""Model to number, higher is better: the accuracy on a validation set, for example."""


class ScoreError(SkipwayError):
    """A score that is no number."""


def checked_score(score: Score) -> Score:
    """A score whose values are checked.

    Raises:
        SkipwayError: it cannot be called.
        ScoreError: when called, it returns no finite number.
    """
    rule = "a function of a model that returns a number, higher is better"
    check_rule("score", score, callable(score), rule)

    def measure(model: nn.Module) -> float:
        value = score(model)
        try:
            number = float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if not math.isfinite(number):
            raise ScoreError(f"score(model) returned {value!r:.60}: the rule is a finite number, higher is better")
        return number

    return measure
