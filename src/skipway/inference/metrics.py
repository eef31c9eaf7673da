"""Classification metrics: recall, precision, F1, confused pairs, calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    *("Bin", "Calibration", "ClassScores", "calibration", "class_scores", "confused_pairs", "confusion_entries"),
    *("looked_at", "percent"),
]

# as in Guo 2017, "On calibration of modern neural networks"
BINS = 15


@dataclass(frozen=True)
class ClassScores:
    """Metrics per class; float64 of shape (classes,), 0 where the denominator is 0.

    Args:
        images: number of images of the class.
        recall: fraction of the images of the class that are predicted as it.
        precision: fraction of the predictions of the class that are correct.
        f1: harmonic mean of both, 2 TP / (images + predictions).
    """

    images: Tensor
    recall: Tensor
    precision: Tensor
    f1: Tensor

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall over the classes with images; nan if there are none."""
        return float(self.recall[self.images > 0].mean())

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes with images; nan if there are none."""
        return float(self.f1[self.images > 0].mean())


def confusion_entries(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of a confusion matrix that are not 0, row by row: row, column and count, each int64 (M,).

    >>> [part.tolist() for part in confusion_entries(torch.tensor([[3, 1], [0, 4]]))]
    [[0, 0, 1], [0, 1, 1], [3, 1, 4]]
    """
    entries = (confusion if confusion.is_sparse else confusion.to_sparse()).coalesce()
    rows, columns = entries.indices()
    return rows, columns, entries.values()


def class_scores(confusion: Tensor) -> ClassScores:
    """Compute recall, precision and F1 of each class.

    Args:
        confusion: (classes, classes), dense or sparse: images of class [row] predicted as class [column].

    >>> scores = class_scores(torch.tensor([[3, 1], [0, 4]]))
    >>> scores.recall.tolist(), scores.precision.tolist()
    ([0.75, 1.0], [1.0, 0.8])
    """
    rows, columns, counts = confusion_entries(confusion)

    def summed(places: Tensor, values: Tensor) -> Tensor:
        return torch.zeros(confusion.shape[0], dtype=torch.float64).index_add_(0, places, values.double())

    hits, images, predicted = summed(rows, counts * (rows == columns)), summed(rows, counts), summed(columns, counts)

    def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
        return torch.where(denominator > 0, numerator / denominator.clamp(min=1), 0.0)

    return ClassScores(images, divide(hits, images), divide(hits, predicted), divide(2 * hits, images + predicted))


def confused_pairs(confusion: Tensor, most: int) -> list[tuple[int, int, int]]:
    """Return up to `most` (true class, predicted class, count) of misclassified images, in descending order of count.

    >>> confused_pairs(torch.tensor([[3, 1], [2, 4]]), 5)
    [(1, 0, 2), (0, 1, 1)]
    """
    rows, columns, counts = confusion_entries(confusion)
    wrong = (rows != columns).nonzero()[:, 0]
    order = wrong[counts[wrong].sort(descending=True, stable=True).indices[:most]]
    return list(zip(*(part[order].tolist() for part in (rows, columns, counts)), strict=True))


@dataclass(frozen=True)
class Bin:
    """Images with confidence in (low, high]: their number, mean confidence and accuracy."""

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Reliability of the predicted confidence.

    Args:
        bins: the bins with images, by ascending confidence.
        error: expected calibration error: mean of |accuracy - confidence| over the bins, weighted by their images.
    """

    bins: tuple[Bin, ...]
    error: float


def calibration(confidence: Tensor, correct: Tensor, *, bins: int = BINS) -> Calibration:
    """Compare confidence with accuracy in bins of equal width (Guo 2017).

    Args:
        confidence: (N,), the largest probability of each image, in [0, 1]; non-finite values are ignored.
        correct: (N,), whether the prediction is correct.
        bins: number of bins.

    >>> calibration(torch.tensor([0.9, 0.9, 0.6]), torch.tensor([True, False, True]), bins=2).bins[0].images
    3
    """
    known = torch.isfinite(confidence)
    confidence, correct = confidence[known].double(), correct[known].double()
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    images = torch.bincount(number, minlength=bins)
    mean_confidence = torch.bincount(number, weights=confidence, minlength=bins) / images.clamp(min=1)
    right = torch.bincount(number, weights=correct, minlength=bins) / images.clamp(min=1)
    rows = zip(images.tolist(), mean_confidence.tolist(), right.tolist(), strict=True)
    found = tuple(Bin(place / bins, (place + 1) / bins, *row) for place, row in enumerate(rows) if row[0])
    gaps = sum(each.images * abs(each.accuracy - each.confidence) for each in found)
    return Calibration(found, gaps / max(1, len(confidence)))


def percent(fraction: float) -> str:
    """Format a fraction between 0 and 1 as a percentage.

    >>> percent(0.9861), percent(1.0)
    ('98.6 %', '100.0 %')
    """
    return f"{100 * fraction:.1f} %"


def looked_at(tests: int, when: str) -> str:
    """How often a test split was looked at, the last time at the time that `when` says, as the end of a sentence.

    >>> looked_at(1, "at the end")
    'looked at once, at the end'
    >>> looked_at(2, "at the end")
    'looked at 2 times, the last time at the end: the run was made longer when an earlier result was known'
    """
    if tests < 2:
        return f"looked at once, {when}"
    return f"looked at {tests} times, the last time {when}: the run was made longer when an earlier result was known"
