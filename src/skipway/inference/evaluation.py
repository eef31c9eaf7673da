"""Evaluation of a classifier: loss, confusion matrix, accuracy and its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipway.data import Batch
from skipway.hardware.precision import widest
from skipway.inference.metrics import class_scores, confused_pairs, confusion_entries
from skipway.inference.modes import eval_mode

__all__ = ["Evaluation", "evaluate", "wilson_interval"]

# the 97.5 % point of the normal distribution
Z_95 = 1.959963984540054
# confusion matrices of more classes are sparse
MAX_DENSE_CLASSES = 1_000


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
        confusion: int64 of shape (classes, classes): images of class [row] predicted as class [column]; sparse for
            more than 1,000 classes, so that its size is that of the images.
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
        rows, columns, counts = confusion_entries(self.confusion)
        return int(counts[rows == columns].sum())

    @property
    def accuracy(self) -> float:
        """Fraction of the images that are classified correctly, 0 to 1."""
        return self.correct / max(1, self.total)

    def worst_class(self) -> tuple[int, float, int]:
        """Return index, accuracy and number of images of the class with the lowest accuracy."""
        scores = class_scores(self.confusion)
        worst = int(torch.where(scores.images > 0, scores.recall, torch.inf).argmin())
        return worst, float(scores.recall[worst]), int(scores.images[worst])

    def top_confusion(self) -> tuple[int, int, int] | None:
        """Return the most frequent mistake as (true class, predicted class, count); None without mistakes."""
        return next(iter(confused_pairs(self.confusion, 1)), None)


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
    filler: Tensor | None = None,
    observe: Callable[[Batch, Tensor], None] | None = None,
) -> Evaluation | None:
    """Run the network in evaluation mode over all batches; None if `stop` said so before the end.

    The network is in its earlier mode again afterwards.

    Args:
        observe: called with each batch and its logits, float32 (B, classes).
        flip: average the logits of each image and its mirror image.
        total: sums a tensor over the processes that share the batches; all of them get the full evaluation.
        rounds: number of batches up to which `filler` is evaluated where there are fewer, for the ranks of a sharded
            network, which must run it equally often.
        filler: images for that, on the device of the network.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    pairs, numbers = [torch.zeros(0, dtype=torch.int64, device=device)], [torch.zeros(0, dtype=torch.int64)]
    loss = widest(torch.zeros((), device=device))
    stopped, done = False, 0

    def logits_of(images: Tensor) -> Tensor:
        with autocast():
            logits = model(images).float()
            return (logits + model(images.flip(-1)).float()) / 2 if flip else logits

    with eval_mode(model):
        for batch in batches:
            logits = logits_of(batch.inputs)
            if observe is not None:
                observe(batch, logits)
            losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
            pairs.append(batch.labels * classes + logits.argmax(1))
            numbers.append(batch.numbers)
            loss += widest(losses).sum()
            done += 1
            stopped = stop()
            if stopped:
                break
        while filler is not None and done < rounds:
            logits_of(filler)
            done += 1
    if bool(total(torch.tensor(float(stopped), device=device)) > 0):
        return None
    seen = torch.cat(pairs)
    every, images, ranks = total(torch.stack([loss, loss.new_tensor(len(seen)), loss.new_tensor(1.0)])).tolist()
    if ranks > 1:
        # each image is on one rank, so that the sum over the ranks has all of them
        shared = torch.zeros(int(images), dtype=torch.int64, device=device)
        shared[torch.cat(numbers).to(device)] = seen
        seen = total(shared)
    return Evaluation(every / images if images else math.nan, confusion_of(seen.cpu(), classes))


def confusion_of(pairs: Tensor, classes: int) -> Tensor:
    """The confusion matrix of images, given as true class * classes + predicted class, int64 (N,)."""
    if classes <= MAX_DENSE_CLASSES:
        return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    places, counts = pairs.unique(return_counts=True)
    indices = torch.stack([places // classes, places % classes])
    return torch.sparse_coo_tensor(indices, counts, (classes, classes), is_coalesced=True, check_invariants=True)
