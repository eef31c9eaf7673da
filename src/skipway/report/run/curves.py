"""Training curves: loss, accuracy, learning rate and gradient norm by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from skipway.report.chart import Figure, Mark, Series

__all__ = ["number_of", "training_figures"]

Rows = Sequence[Mapping[str, Any]]


def training_figures(epochs: Rows, steps: Rows, steps_in_epoch: int, best: int) -> list[Figure]:
    """Return up to four figures; those without a value are left out.

    Args:
        epochs: the lines of `metrics.jsonl`.
        steps: the lines of `steps.jsonl`.
        steps_in_epoch: number of steps per epoch.
        best: the epoch with the best validation accuracy, from 1.
    """
    span = (0.0, max([number_of(row, "epoch") for row in epochs] + [1.0]))
    marks = (Mark(float(best), f"best: {best}"),) if best else ()
    rates = by_step(steps, "lr", steps_in_epoch) or by_epoch(epochs, "lr")
    figures = [
        Figure(
            title="Loss",
            x_label="epoch",
            series=(
                Series.of("single training steps", by_step(steps, "loss", steps_in_epoch), "faint"),
                Series.of("training", by_epoch(epochs, "train_loss")),
                Series.of("validation", by_epoch(epochs, "validation_loss")),
            ),
            log_y=None,
            span=span,
            marks=marks,
        ),
        Figure(
            title="Accuracy",
            x_label="epoch",
            series=(
                Series.of("training", by_epoch(epochs, "train_accuracy")),
                Series.of("validation", by_epoch(epochs, "validation_accuracy")),
            ),
            percent=True,
            span=span,
            marks=marks,
        ),
        Figure(title="Learning rate", x_label="epoch", series=(Series.of("learning rate", rates),), span=span),
        Figure(
            title="Gradient norm before clipping",
            x_label="epoch",
            series=(Series.of("gradient norm", by_step(steps, "norm", steps_in_epoch)),),
            log_y=True,
            span=span,
        ),
    ]
    return [figure for figure in figures if figure.drawn]


def by_epoch(rows: Rows, name: str) -> list[tuple[float, float]]:
    """Return a column of the metrics by epoch."""
    return [(number_of(row, "epoch"), number_of(row, name)) for row in rows]


def by_step(rows: Rows, name: str, steps_in_epoch: int) -> list[tuple[float, float]]:
    """Return a column of the steps as a function of the epoch."""
    return [(number_of(row, "step") / max(1, steps_in_epoch), number_of(row, name)) for row in rows]


def number_of(row: Mapping[str, Any], name: str) -> float:
    """Return a number of a row; NaN if there is none.

    >>> number_of({"loss": None}, "loss")
    nan
    """
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else math.nan
