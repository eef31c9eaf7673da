"""`TextData`: the splits of a text as batches of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipway.data.ranks import check_ranks
from skipway.data.sources.splits import SPLITS, Split
from skipway.data.text.samplers import SAMPLERS, Sampler
from skipway.data.text.token_split import IGNORED, TokenSplit
from skipway.data.text.tokenizer import Tokenizer
from skipway.errors import DataError, spell
from skipway.validation import is_whole

__all__ = ["TextData"]


@dataclass(frozen=True, kw_only=True)
class TextData:
    """The training, validation and test tokens of a text, and the tokenizer that any other text needs.

    A batch is (ids, targets), int64 (N, context) each: the target at a position is the id at the next one, or -100
    where none is scored. Documents are packed: a window may begin in one and end in another, past a separator.

    Args:
        name: of the source.
        tokenizer: of the text; it travels with weights.
        context: length of every window.
        train: tokens that are learned from.
        validation: tokens that the best step is chosen on; may be empty.
        test: tokens that the result is measured on, once, at the end; may be empty.
        seed: of the windows.
        sampling: "packed" or "random".
        fingerprint: 16 hexadecimal digits that change with the text of any split, and with the tokenizer.
        origin: how the text was read and split, as JSON values.
        remarks: sentences about what a user may not expect.
    """

    name: str
    tokenizer: Tokenizer
    context: int
    train: TokenSplit
    validation: TokenSplit
    test: TokenSplit
    seed: int
    sampling: str
    fingerprint: str
    origin: Mapping[str, Any]
    remarks: tuple[str, ...] = ()

    @property
    def sampler(self) -> Sampler:
        """What draws the windows of a step."""
        return SAMPLERS[self.sampling]

    def steps(self, batch_size: int) -> int:
        """Number of batches in an epoch, of `batch_size` windows over all ranks."""
        return self.sampler.steps(self.train.targets, self.context, batch_size)

    def train_batch(
        self, epoch: int, step: int, batch_size: int, *, rank: int = 0, world: int = 1, seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The windows of one training step: a function of (seed, epoch, step), whatever was asked for before.

        Args:
            epoch: from 0.
            step: of the epoch, from 0.
            batch_size: windows, over all ranks.
            rank: the contiguous slice of the batch to return.
            world: number of ranks.
            seed: of the windows; None: that of the data.

        Returns:
            ids and targets, (batch_size / world, context) each.

        Raises:
            DataError: the ranks cannot share the batch evenly, or there is no such step.
        """
        check_ranks(batch_size, rank, world, thing="window")
        if not 0 <= step < (steps := self.steps(batch_size)):
            raise DataError(f"{spell('step', step)}: an epoch has the steps 0 to {steps - 1}")
        seed = self.seed if seed is None else seed
        ends, scored = self.sampler.draw(self.train.targets, self.context, batch_size, seed, epoch, step)
        share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        return self.train.windows(ends[share], scored[share], self.context)

    def evaluation_batches(
        self, split: Split, batch_size: int, *, stride: int | None = None, rank: int = 0, world: int = 1, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches that score every target of a split once, in order.

        Every batch has the same shape, and every rank the same number of batches: the last ones are filled up with
        windows of which nothing is scored.

        Args:
            split: "train", "validation" or "test".
            batch_size: windows, over all ranks.
            stride: positions from one window to the next; the first `context - stride` of a window are read and not
                scored, but for those of the first window. None: `context`, windows that do not overlap.
            rank: of the process.
            world: number of ranks.
            start: the first batch to yield.

        Raises:
            DataError: a value outside its rule.
        """
        check_ranks(batch_size, rank, world, thing="window")
        stride = self.context if stride is None else stride
        if not (is_whole(stride, 1) and stride <= self.context):
            raise DataError(f"{spell('stride', stride)}: the rule is from 1 to the context, {self.context}")
        if split not in SPLITS:
            raise DataError(f"{spell('split', split)}: the rule is {', '.join(SPLITS)}")
        part: TokenSplit = getattr(self, split)
        count = 0 if part.targets == 0 else 1 + -(-max(0, part.targets - self.context) // stride)
        share = batch_size // world
        for first in range(start * batch_size, count, batch_size):
            numbers = first + rank * share + np.arange(share)
            yield self.evaluation_windows(part, numbers[numbers < count], stride, share)

    def evaluation_windows(
        self, part: TokenSplit, numbers: np.ndarray, stride: int, rows: int
    ) -> tuple[Tensor, Tensor]:
        """The windows of an evaluation by number, filled up to `rows` with windows of which nothing is scored."""
        ids = torch.zeros(rows, self.context, dtype=torch.int64)
        targets = torch.full((rows, self.context), IGNORED)
        if len(numbers):
            length = min(self.context, part.targets)
            ends = np.minimum(numbers * stride + length, part.targets)
            scored = np.where(numbers == 0, length, ends - ((numbers - 1) * stride + length))
            ids[: len(numbers), :length], targets[: len(numbers), :length] = part.windows(ends, scored, length)
        return ids, targets

    def describe(self) -> dict[str, Any]:
        """What a run writes down about its text, as JSON values."""
        parts = {
            split: {
                "tokens": len(part := getattr(self, split)),
                "documents": len(part.documents) - 1,
                "bytes": part.bytes,
                "unknown_tokens": part.unknown_tokens,
            }
            for split in SPLITS
        }
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer.kind,
            "vocabulary": self.tokenizer.size,
            "context": self.context,
            "sampling": self.sampling,
            "seed": self.seed,
            **self.origin,
            "splits": parts,
        }
