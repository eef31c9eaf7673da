"""How well a network classifies: loss, confusion matrix, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Evaluation", "evaluate", "wilson_interval"]

# the 97.5 % point of the normal distribution
Z_95 = 1.959963984540054


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927): (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n).

    >>> tuple(round(bound, 4) for bound in wilson_interval(8, 10))
    (0.4902, 0.9433)
    """
    if total == 0:
        return 0.0, 1.0
    share, square = correct / total, Z_95**2 / total
    centre = share + square / 2
    half = math.sqrt(square * (share * (1 - share) + square / 4))
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))


@dataclass(frozen=True)
class Evaluation:
    """What a network did on a set of images.

    Args:
        loss: mean cross-entropy, without label smoothing.
        confusion: int64 of shape (classes, classes): images of class [row] taken for class [column].
    """

    loss: float
    confusion: Tensor

    @property
    def total(self) -> int:
        """Images evaluated."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """Images taken for what they are."""
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        """Share of the images taken for what they are, 0 to 1."""
        return self.correct / max(1, self.total)

    def worst_class(self) -> tuple[int, float, int]:
        """The class with the lowest accuracy among those with images: its number, its accuracy, its images."""
        counts = self.confusion.sum(1)
        shares = torch.where(counts > 0, self.confusion.diagonal() / counts.clamp(min=1), torch.inf)
        worst = int(shares.argmin())
        return worst, float(shares[worst]), int(counts[worst])

    def top_confusion(self) -> tuple[int, int, int] | None:
        """The most frequent mistake: (true class, taken for, how often); None without mistakes."""
        mistakes = self.confusion.clone().fill_diagonal_(0)
        place = int(mistakes.argmax())
        row, column = divmod(place, mistakes.shape[1])
        count = int(mistakes[row, column])
        return (row, column, count) if count else None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    classes: int,
    autocast: Callable[[], AbstractContextManager[object]],
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Run the network in evaluation mode over all batches; None if `stop` said so before the end."""
    was_training = model.training
    model.eval()
    confusion: Tensor | None = None
    losses: list[Tensor] = []
    for inputs, labels in batches:
        with autocast():
            logits = model(inputs).float()
        losses.append(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        pairs = torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes)
        confusion = pairs if confusion is None else confusion + pairs
        if stop():
            model.train(was_training)
            return None
    model.train(was_training)
    if confusion is None:
        return Evaluation(math.nan, torch.zeros(classes, classes, dtype=torch.int64))
    confusion = confusion.cpu().reshape(classes, classes)
    loss = sum(torch.stack(losses).double().tolist()) / max(1, int(confusion.sum()))
    return Evaluation(loss, confusion)
