"""Evaluation of a classifier: loss, confusion matrix, accuracy and its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipway.data import Batch

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
    # the bounds at 0 and 1 are exact, and rounding must not leave the proportion outside
    return max(0.0, min(share, (centre - half) / (1 + square))), min(1.0, max(share, (centre + half) / (1 + square)))


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a classifier on a set of images.

    Args:
        loss: mean cross-entropy, without label smoothing.
        confusion: int64 of shape (classes, classes): images of class [row] predicted as class [column].
    """

    loss: float
    confusion: Tensor

    @property
    def total(self) -> int:
        """Number of images."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """Number of correctly classified images."""
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        """Fraction of the images that are classified correctly, 0 to 1."""
        return self.correct / max(1, self.total)

    def worst_class(self) -> tuple[int, float, int]:
        """Return index, accuracy and number of images of the class with the lowest accuracy."""
        counts = self.confusion.sum(1)
        shares = torch.where(counts > 0, self.confusion.diagonal() / counts.clamp(min=1), torch.inf)
        worst = int(shares.argmin())
        return worst, float(shares[worst]), int(counts[worst])

    def top_confusion(self) -> tuple[int, int, int] | None:
        """Return the most frequent mistake as (true class, predicted class, count); None without mistakes."""
        mistakes = self.confusion.clone().fill_diagonal_(0)
        place = int(mistakes.argmax())
        row, column = divmod(place, mistakes.shape[1])
        count = int(mistakes[row, column])
        return (row, column, count) if count else None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    classes: int,
    autocast: Callable[[], AbstractContextManager[object]],
    stop: Callable[[], bool] = lambda: False,
    flip: bool = False,
    total: Callable[[Tensor], Tensor] = lambda values: values,
    rounds: int = 0,
    observe: Callable[[Batch, Tensor], None] | None = None,
) -> Evaluation | None:
    """Run the network in evaluation mode over all batches; None if `stop` said so before the end.

    The network is in its earlier mode again afterwards.

    Args:
        observe: called with each batch and its logits, float32 (B, classes).
        flip: average the logits of each image and its mirror image.
        total: sums a tensor over the processes that share the batches; all of them get the full evaluation.
        rounds: minimum number of forward passes; the last batch is repeated if there are fewer.
    """
    was_training = model.training
    model.eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    counts = torch.zeros(classes * classes + 1, dtype=torch.float64, device=device)
    stopped, done, batch = False, 0, None
    for batch in batches:
        with autocast():
            logits = model(batch.inputs).float()
            if flip:
                logits = (logits + model(batch.inputs.flip(-1)).float()) / 2
        if observe is not None:
            observe(batch, logits)
        losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        pairs = torch.bincount(batch.labels * classes + logits.argmax(1), minlength=classes * classes)
        counts[:-1] += pairs
        counts[-1] += losses.double().sum()
        done += 1
        stopped = stop()
        if stopped:
            break
    while batch is not None and done < rounds:
        model(batch.inputs)
        done += 1
    model.train(was_training)
    if bool(total(torch.tensor(float(stopped), device=device)) > 0):
        return None
    *found, loss = total(counts).tolist()
    confusion = torch.tensor(found, dtype=torch.float64).round().long().reshape(classes, classes)
    return Evaluation(loss / confusion.sum().item() if confusion.sum() else math.nan, confusion)
