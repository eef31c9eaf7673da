"""Predictions of a network for the test images, with its confidence and the images of its worst mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from skipway.data import Batch

__all__ = ["Mistake", "PredictionLog", "Predictions", "collect_predictions"]


# mistakes whose images are kept
MISTAKES = 32


class Mistake(NamedTuple):
    """A misclassified image: its loss, its index among the predictions, and the network's input (C, H, W)."""

    loss: float
    index: int
    inputs: Tensor


@dataclass(frozen=True)
class Predictions:
    """One entry per image, on the CPU.

    Args:
        numbers: index of the image in its split.
        labels: class of the image.
        predicted: class with the largest probability.
        confidence: probability of the predicted class, float32.
        mistakes: misclassified images with the largest losses, in descending order.
    """

    numbers: Tensor
    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    mistakes: tuple[Mistake, ...]


class PredictionLog:
    """Collects the predictions of successive batches."""

    def __init__(self) -> None:
        self.rows: list[tuple[Tensor, ...]] = []
        self.mistakes: list[Mistake] = []
        self.count = 0

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Record a batch and the network's logits (B, classes) for it."""
        confidence, predicted = logits.softmax(1).max(1)
        losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        losses = torch.where(predicted == batch.labels, -1.0, losses.nan_to_num(torch.inf))
        for loss, index in zip(*(each.tolist() for each in losses.topk(min(MISTAKES, len(losses)))), strict=True):
            if loss >= 0 and (len(self.mistakes) < MISTAKES or loss > self.mistakes[-1].loss):
                self.mistakes.append(Mistake(loss, self.count + index, batch.inputs[index].cpu()))
        self.mistakes = sorted(self.mistakes, key=lambda mistake: -mistake.loss)[:MISTAKES]
        self.rows.append((batch.numbers.cpu(), batch.labels.cpu(), predicted.cpu(), confidence.cpu()))
        self.count += len(batch.labels)

    def predictions(self) -> Predictions:
        """Return the predictions recorded so far; at least one batch must have been added."""
        columns = (torch.cat(column) for column in zip(*self.rows, strict=True))
        return Predictions(*columns, mistakes=tuple(self.mistakes))


@torch.inference_mode()
def collect_predictions(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    autocast: Callable[[], AbstractContextManager[object]],
    flip: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Predictions | None:
    """Predict every batch with `model`, which must be in evaluation mode; the model is not changed.

    Returns:
        the predictions; None if `stop` returned True before the last batch was done.
    """
    log = PredictionLog()
    for batch in batches:
        with autocast():
            logits = model(batch.inputs).float()
            if flip:
                logits = (logits + model(batch.inputs.flip(-1)).float()) / 2
        log.add(batch, logits)
        if stop():
            return None
    return log.predictions()
