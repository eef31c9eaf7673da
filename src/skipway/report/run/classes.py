"""Results by class: confusion matrix, confused pairs, scores of the classes and their number of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from skipway.inference.metrics import ClassScores, class_scores, confused_pairs, percent
from skipway.report.chart import Bars, Figure, HeatCell, Heatmap, Series
from skipway.report.page import PageTable, number_cell, text_cell
from skipway.report.svg_style import clipped

__all__ = ["class_sizes", "class_table", "confused_table", "confusion_matrix"]

MOST_IN_MATRIX, PAIRS, FEW_PAIRS, MOST_ROWS, MOST_BARS = 30, 30, 10, 1000, 40
"""Classes up to which there is a matrix, pairs without and with it, rows of the table, classes up to which bars."""


def confusion_matrix(confusion: Tensor, names: Sequence[str]) -> Heatmap | None:
    """Return the confusion matrix; None for more than 30 classes."""
    if len(names) > MOST_IN_MATRIX:
        return None
    return Heatmap(
        title="Confusion matrix of the test images",
        rows=tuple(names),
        columns=tuple(names),
        row_title="true class",
        column_title="predicted class",
        cells=tuple(confusion_row(names, true, row) for true, row in enumerate(confusion.tolist())),
        note="Stronger colour: a larger fraction of the true class.",
    )


def confusion_row(names: Sequence[str], true: int, counts: Sequence[int]) -> tuple[HeatCell, ...]:
    """The cells of a true class."""
    total = sum(counts)
    return tuple(
        HeatCell(
            count / max(1, total),
            f"{names[true]} predicted as {names[predicted]}: {count:,} of {total:,}, "
            f"{100 * count / max(1, total):.1f} %",
            "hit" if true == predicted else "miss",
            f"{count:,}" if count else "",
            f"{100 * count / max(1, total):.0f} %",
        )
        for predicted, count in enumerate(counts)
    )


def confused_table(confusion: Tensor, names: Sequence[str]) -> PageTable:
    """Build the table of the most frequent mistakes; without rows if there are none."""
    images = class_scores(confusion).images.tolist()
    rows = []
    for true, predicted, count in confused_pairs(confusion, PAIRS if len(names) > MOST_IN_MATRIX else FEW_PAIRS):
        fraction = count / max(1, images[true])
        numbers = number_cell(count, f"{count:,}"), number_cell(fraction, percent(fraction))
        rows.append([text_cell(names[true]), text_cell(names[predicted]), *numbers])
    return PageTable(["true class", "predicted class", "images", "fraction of class"], rows)


def class_table(scores: ClassScores, names: Sequence[str]) -> PageTable:
    """Build the table of recall, precision, F1 and test images of each class, the lowest F1 first."""
    order = torch.where(scores.images > 0, scores.f1, 2.0).sort(stable=True).indices.tolist()
    columns = [scores.recall.tolist(), scores.precision.tolist(), scores.f1.tolist()]
    images = scores.images.long().tolist()
    rows = [
        [
            text_cell(names[place]),
            *(number_cell(column[place], percent(column[place])) for column in columns),
            number_cell(images[place], f"{images[place]:,}"),
        ]
        for place in order[:MOST_ROWS]
    ]
    return PageTable(["class", "recall", "precision", "F1", "images"], rows)


def class_sizes(labels: Mapping[str, Tensor], names: Sequence[str]) -> Bars | Figure:
    """Return the chart of the number of images of each class in each split.

    Args:
        labels: class numbers (N,) of the images of each split; splits without an image are left out.
        names: of the classes.
    """
    counts = {
        split: torch.bincount(numbers, minlength=len(names)).tolist()
        for split, numbers in labels.items()
        if len(numbers)
    }
    title = "Images of each class"
    if len(names) <= MOST_BARS:
        return Bars(
            title=title,
            categories=tuple(names),
            series=tuple((split, tuple(map(float, column))) for split, column in counts.items()),
        )
    first = next(iter(counts.values()))
    order = sorted(range(len(names)), key=lambda place: -first[place])
    series = [
        Series.of(split, [(float(rank), float(column[place])) for rank, place in enumerate(order, 1)])
        for split, column in counts.items()
    ]
    largest, smallest = (f"{clipped(names[place], 40)}, {first[place]:,}" for place in (order[0], order[-1]))
    return Figure(
        title=title,
        x_label="classes, largest first",
        series=tuple(series),
        log_y=None,
        note=f"Largest: {largest}. Smallest: {smallest}.",
    )
