"""Evaluation of a language model: the loss of every token, and what a byte of text costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipway.data.text import IGNORED
from skipway.hardware.precision import widest
from skipway.inference.modes import eval_mode

__all__ = ["TextEvaluation", "evaluate_text"]


@dataclass(frozen=True)
class TextEvaluation:
    """The evaluation of a language model on a text.

    Args:
        loss: mean cross-entropy of the scored tokens, in nats.
        total: number of scored tokens.
        correct: number of them that were the likeliest.
        bytes: of text that these tokens stand for.

    >>> result = TextEvaluation(loss=math.log(4), total=10, correct=5, bytes=20)
    >>> result.bits_per_byte, round(result.perplexity, 6), result.accuracy
    (1.0, 4.0, 0.5)
    """

    loss: float
    total: int
    correct: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """What a byte of text costs in bits: it compares tokenizers, which the loss of a token does not."""
        return self.loss * self.total / (math.log(2) * self.bytes) if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss) of a token."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def accuracy(self) -> float:
        """Share of the tokens that were the likeliest, 0 to 1."""
        return self.correct / max(1, self.total)


@torch.no_grad()
def evaluate_text(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    scored_bytes: int,
    autocast: Callable[[], AbstractContextManager[object]],
    stop: Callable[[], bool] = lambda: False,
    total: Callable[[Tensor], Tensor] = lambda values: values,
) -> TextEvaluation | None:
    """Run a language model in evaluation mode over all batches; None if `stop` said so before the end.

    The model is in its earlier mode again afterwards.

    Args:
        model: (N, T) ids → (N, T, vocabulary) logits.
        batches: ids and targets, (N, T) each; a target of -100 is not scored.
        scored_bytes: bytes of text that all scored targets stand for.
        autocast: context of the forward passes.
        stop: polled after every batch.
        total: sums a tensor over the processes that share the batches; all of them get the full evaluation.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    sums, stopped = widest(torch.zeros(4, device=device)), False
    with eval_mode(model):
        for ids, targets in batches:
            with autocast():
                logits = model(ids).flatten(0, 1).float()
            flat = targets.flatten()
            loss = nn.functional.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="sum")
            sums[:3] += torch.stack([widest(loss), (flat != IGNORED).sum(), (logits.argmax(1) == flat).sum()])
            stopped = stop()
            if stopped:
                break
    sums[3] = float(stopped)
    loss, scored, correct, stops = total(sums).tolist()
    if stops:
        return None
    return TextEvaluation(loss / scored if scored else math.nan, int(scored), int(correct), scored_bytes)
