"""How a run went: loss, accuracy, learning rate and gradient over the epochs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from skipway.report.charts import Mark, Series, chart

__all__ = ["curves"]

Rows = Sequence[dict[str, Any]]


def curves(epochs: Rows, steps: Rows, steps_in_epoch: int, best: int) -> Iterator[str]:
    """Four charts, as far as there is something to draw.

    Args:
        epochs: the lines of `metrics.jsonl`.
        steps: the lines of `steps.jsonl`.
        steps_in_epoch: turns steps into epochs.
        best: the epoch with the best validation accuracy, from 1.
    """
    span = (0.0, max([value(row, "epoch") for row in epochs] + [1.0]))
    marks = [Mark(float(best), f"best: {best}")] if best else []
    made = {"across": "epoch", "span": span}
    yield chart(
        "Loss",
        [
            Series("faint", "train, single steps", by_step(steps, "loss", steps_in_epoch)),
            Series("a", "train, mean", by_epoch(epochs, "train_loss"), dots=len(epochs) < 30),
            Series("b", "validation", by_epoch(epochs, "validation_loss"), dots=len(epochs) < 30),
        ],
        marks=marks,
        **made,
    )
    yield chart(
        "Accuracy",
        [
            Series("a", "train", by_epoch(epochs, "train_accuracy"), dots=len(epochs) < 30),
            Series("b", "validation", by_epoch(epochs, "validation_accuracy"), dots=len(epochs) < 30),
        ],
        whole=True,
        log=False,
        marks=marks,
        **made,
    )
    rates = by_step(steps, "lr", steps_in_epoch) or by_epoch(epochs, "lr")
    yield chart("Learning rate", [Series("a", "learning rate", rates)], log=False, **made)
    norms = by_step(steps, "norm", steps_in_epoch)
    yield chart("Gradient", [Series("a", "norm before clipping", norms)], log=True, **made)


def by_epoch(rows: Rows, name: str) -> list[tuple[float, float]]:
    """A column of the metrics, at the end of each epoch."""
    return [(value(row, "epoch"), value(row, name)) for row in rows]


def by_step(rows: Rows, name: str, steps_in_epoch: int) -> list[tuple[float, float]]:
    """A column of the steps, in epochs."""
    return [(value(row, "step") / max(1, steps_in_epoch), value(row, name)) for row in rows]


def value(row: dict[str, Any], name: str) -> float:
    """A number of a row; nan where it has none.

    >>> value({"loss": None}, "loss")
    nan
    """
    found = row.get(name)
    return float(found) if isinstance(found, int | float) else math.nan
