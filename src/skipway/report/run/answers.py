"""What a network said of each test image: the class, how sure it was, how wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from skipway.data import Batch

__all__ = ["AnswerLog", "Answers", "Mistake", "answers"]


# wrong answers whose images are kept
MISTAKES = 32


class Mistake(NamedTuple):
    """A wrong answer: its loss, where it stands among the answers, and the image as the network got it (C, H, W)."""

    loss: float
    place: int
    inputs: Tensor


@dataclass(frozen=True)
class Answers:
    """One entry per image, on the CPU.

    Args:
        numbers: which image of the part it is.
        labels: its class.
        taken: the class with the largest probability.
        confidence: that probability, float32.
        mistakes: the wrong answers with the largest losses, the largest first.
    """

    numbers: Tensor
    labels: Tensor
    taken: Tensor
    confidence: Tensor
    mistakes: tuple[Mistake, ...]


class AnswerLog:
    """Collects the answers to batches, one after the other."""

    def __init__(self) -> None:
        self.rows: list[tuple[Tensor, ...]] = []
        self.mistakes: list[Mistake] = []
        self.done = 0

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Take in a batch and the logits (B, classes) of the network for it."""
        confidence, taken = logits.softmax(1).max(1)
        losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        losses = torch.where(taken == batch.labels, -1.0, losses.nan_to_num(torch.inf))
        for loss, place in zip(*(each.tolist() for each in losses.topk(min(MISTAKES, len(losses)))), strict=True):
            if loss >= 0 and (len(self.mistakes) < MISTAKES or loss > self.mistakes[-1].loss):
                self.mistakes.append(Mistake(loss, self.done + place, batch.inputs[place].cpu()))
        self.mistakes = sorted(self.mistakes, key=lambda mistake: -mistake.loss)[:MISTAKES]
        self.rows.append((batch.numbers.cpu(), batch.labels.cpu(), taken.cpu(), confidence.cpu()))
        self.done += len(batch.labels)

    def answers(self) -> Answers:
        """The answers so far; at least one batch was added."""
        return Answers(*(torch.cat(column) for column in zip(*self.rows, strict=True)), mistakes=tuple(self.mistakes))


@torch.inference_mode()
def answers(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    autocast: Callable[[], AbstractContextManager[object]],
    flip: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Answers | None:
    """The answers of a network that is in evaluation mode; None if `stop` said so before the end."""
    log = AnswerLog()
    for batch in batches:
        with autocast():
            logits = model(batch.inputs).float()
            if flip:
                logits = (logits + model(batch.inputs.flip(-1)).float()) / 2
        log.add(batch, logits)
        if stop():
            return None
    return log.answers()
