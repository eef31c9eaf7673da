"""Numbers that follow from what a classifier said: recall, precision, F1, confused pairs, calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Bin", "Calibration", "ClassScores", "calibration", "class_scores", "confused_pairs", "percent"]

# as in Guo 2017, "On calibration of modern neural networks"
BINS = 15


@dataclass(frozen=True)
class ClassScores:
    """How well each class is told; float64 of shape (classes,), 0 where a share of nothing is asked for.

    Args:
        images: that belong to the class.
        recall: share of these that are taken for the class.
        precision: share of what is taken for the class that belongs to it.
        f1: harmonic mean of both, 2 hits / (images + taken).
    """

    images: Tensor
    recall: Tensor
    precision: Tensor
    f1: Tensor

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall over the classes with images; nan without any."""
        return float(self.recall[self.images > 0].mean())

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes with images; nan without any."""
        return float(self.f1[self.images > 0].mean())


def class_scores(confusion: Tensor) -> ClassScores:
    """The scores of each class.

    Args:
        confusion: (classes, classes): images of class [row] taken for class [column].

    >>> scores = class_scores(torch.tensor([[3, 1], [0, 4]]))
    >>> scores.recall.tolist(), scores.precision.tolist()
    ([0.75, 1.0], [1.0, 0.8])
    """
    counts = confusion.double()
    hits, images, taken = counts.diagonal(), counts.sum(1), counts.sum(0)

    def share(of: Tensor, whole: Tensor) -> Tensor:
        return torch.where(whole > 0, of / whole.clamp(min=1), 0.0)

    return ClassScores(images, share(hits, images), share(hits, taken), share(2 * hits, images + taken))


def confused_pairs(confusion: Tensor, most: int) -> list[tuple[int, int, int]]:
    """The most frequent mistakes: (true class, taken for, how often), at most `most`, the most frequent first.

    >>> confused_pairs(torch.tensor([[3, 1], [2, 4]]), 5)
    [(1, 0, 2), (0, 1, 1)]
    """
    mistakes = confusion.clone().fill_diagonal_(0).flatten()
    counts, places = mistakes.sort(descending=True, stable=True)
    rows = zip(places[:most].tolist(), counts[:most].tolist(), strict=True)
    return [(*divmod(place, confusion.shape[1]), int(count)) for place, count in rows if count]


@dataclass(frozen=True)
class Bin:
    """Images whose confidence c is in low < c <= high, with their mean confidence and the share that is right."""

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How far confidence can be taken at its word.

    Args:
        bins: those that hold images, by rising confidence.
        error: expected calibration error: mean of |accuracy - confidence| over the bins, weighed by their images.
    """

    bins: tuple[Bin, ...]
    error: float


def calibration(confidence: Tensor, correct: Tensor, *, bins: int = BINS) -> Calibration:
    """Confidence against accuracy in bins of equal width (Guo 2017).

    Args:
        confidence: (N,), the largest probability of each image, in [0, 1]; what is not finite is left out.
        correct: (N,), whether the image is taken for what it is.
        bins: their number.

    >>> calibration(torch.tensor([0.9, 0.9, 0.6]), torch.tensor([True, False, True]), bins=2).bins[0].images
    3
    """
    known = torch.isfinite(confidence)
    confidence, correct = confidence[known].double(), correct[known].double()
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    images = torch.bincount(number, minlength=bins)
    surest = torch.bincount(number, weights=confidence, minlength=bins) / images.clamp(min=1)
    right = torch.bincount(number, weights=correct, minlength=bins) / images.clamp(min=1)
    rows = zip(images.tolist(), surest.tolist(), right.tolist(), strict=True)
    found = tuple(Bin(place / bins, (place + 1) / bins, *row) for place, row in enumerate(rows) if row[0])
    gaps = sum(each.images * abs(each.accuracy - each.confidence) for each in found)
    return Calibration(found, gaps / max(1, len(confidence)))


def percent(share: float) -> str:
    """A share between 0 and 1 as people read it.

    >>> percent(0.9861), percent(1.0)
    ('98.6 %', '100.0 %')
    """
    return f"{100 * share:.1f} %"
