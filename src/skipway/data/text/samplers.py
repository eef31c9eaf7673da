"""Which windows of the text a training step sees, as functions of (seed, epoch, step)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import NamedTuple, final

import numpy as np
import torch

from skipway.data.randomness import draw_key, generator, permutation

__all__ = ["SAMPLERS", "PackedSampler", "RandomSampler", "Sampler", "Windows"]


class Windows(NamedTuple):
    """Windows by the position behind their last one, and how many of their positions are scored: int64 (N,) each."""

    ends: np.ndarray
    scored: np.ndarray


class Sampler(ABC):
    """Draws the windows of a step from a text with a number of targets, all of which have the length `context`."""

    @abstractmethod
    def steps(self, targets: int, context: int, batch_size: int) -> int:
        """The number of steps of an epoch."""

    @abstractmethod
    def draw(self, targets: int, context: int, batch_size: int, seed: int, epoch: int, step: int) -> Windows:
        """The windows of a step."""


@final
class PackedSampler(Sampler):
    """Every target once an epoch.

    The text is cut into windows from a place that the epoch draws on, around its end, and the windows are shuffled.
    There are as many as fill whole batches, so the cuts are up to `context` apart; where they are less, a window begins
    before its cut, and what precedes the cut is read and not scored.

    >>> windows = PackedSampler().draw(targets=10, context=4, batch_size=3, seed=0, epoch=0, step=0)
    >>> sorted(windows.scored.tolist())
    [3, 3, 4]
    """

    def steps(self, targets: int, context: int, batch_size: int) -> int:
        return -(-targets // (context * batch_size))

    def draw(self, targets: int, context: int, batch_size: int, seed: int, epoch: int, step: int) -> Windows:
        count = self.steps(targets, context, batch_size) * batch_size
        numbers = shuffled(count, seed, epoch)[step * batch_size : (step + 1) * batch_size]
        start = draw_key(seed, "phase", epoch) % targets
        ends = (numbers + 1) * targets // count
        return Windows(start + ends, ends - numbers * targets // count)


@final
class RandomSampler(Sampler):
    """Windows that begin anywhere, drawn anew in every step, as nanoGPT draws them; an epoch is as many targets as the
    text has.
    """

    def steps(self, targets: int, context: int, batch_size: int) -> int:
        return max(1, targets // (context * batch_size))

    def draw(self, targets: int, context: int, batch_size: int, seed: int, epoch: int, step: int) -> Windows:
        source = generator(seed, "windows", epoch, step)
        starts = torch.randint(targets - context + 1, (batch_size,), generator=source).numpy()
        return Windows(starts + context, np.full(batch_size, context))


@lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the windows of an epoch, kept for its next step."""
    return permutation(count, seed, epoch).numpy()


SAMPLERS: dict[str, Sampler] = {"packed": PackedSampler(), "random": RandomSampler()}
