"""Training curves: loss, accuracy, learning rate and gradient norm by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skipway.report.chart import Figure, Mark, Series

__all__ = ["number_of", "training_figures"]

Rows = Sequence[Mapping[str, Any]]


def training_figures(epochs: Rows, steps: Rows, best: int) -> list[Figure]:
    """Return up to four figures; those without a value are left out.

    Args:
        epochs: the lines of `metrics.jsonl`.
        steps: the lines of `steps.jsonl`.
        best: the epoch with the best validation accuracy, from 1.
    """
    span = (0.0, max([number_of(row, "epoch") for row in epochs] + [1.0]))
    marks = (Mark(float(best), f"best: {best}"),) if best else ()
    rates = by_step(steps, "lr", epochs) or by_epoch(epochs, "lr")
    figures = [
        Figure(
            title="Loss",
            x_label="epoch",
            series=(
                Series.of("single training steps", by_step(steps, "loss", epochs), "faint"),
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
            series=(Series.of("gradient norm", by_step(steps, "norm", epochs)),),
            log_y=True,
            span=span,
        ),
    ]
    return [figure for figure in figures if figure.drawn]


def by_epoch(rows: Rows, name: str) -> list[tuple[float, float]]:
    """Return a column of the metrics by epoch."""
    return [(number_of(row, "epoch"), number_of(row, name)) for row in rows]


def by_step(steps: Rows, name: str, epochs: Rows) -> list[tuple[float, float]]:
    """Return a column of the steps as a function of the epoch: an epoch may be any number of steps, which are evenly
    spread over it.
    """
    ends = [0.0, *(number_of(row, "step") for row in epochs)]
    numbers = [0.0, *(number_of(row, "epoch") for row in epochs)]
    done = [row for row in steps if number_of(row, "step") <= ends[-1]]
    places = np.interp([number_of(row, "step") for row in done], ends, numbers).tolist()
    return [(place, number_of(row, name)) for place, row in zip(places, done, strict=True)]


def number_of(row: Mapping[str, Any], name: str) -> float:
    """Return a number of a row; NaN if there is none.

    >>> number_of({"loss": None}, "loss")
    nan
    """
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else math.nan
