"""The tokens of one split, and the windows over them that training and evaluation read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["IGNORED", "TokenSplit"]

# the target of a position that is not scored, as torch's cross entropy has it
IGNORED = -100
# tokens that are counted at once
CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """Documents as one row of tokens; token q + 1 is the target at position q.

    Args:
        tokens: uint16 or uint32 (T,), mapped from the cache where there are many. Where the tokenizer has a separator
            and there are several documents, one stands in front of each.
        documents: int64 (D + 1,): document i is tokens[documents[i] : documents[i + 1]], its separator included.
        bytes: of the text in UTF-8, line ends being one byte.
        unknown: id of tokens that are not scored; None: all are.
        unknown_tokens: number of them.
        scored_bytes: bytes of the text whose tokens are scored: all but unknown ones and a first token without any
            before it.
    """

    tokens: np.ndarray = field(repr=False)
    documents: np.ndarray = field(repr=False)
    bytes: int
    unknown: int | None = None
    unknown_tokens: int = 0
    scored_bytes: int

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    @property
    def targets(self) -> int:
        """The number of positions that have a token after them."""
        return max(0, len(self.tokens) - 1)

    def id_counts(self, size: int) -> np.ndarray:
        """How often each id below `size` occurs, int64 (size,)."""
        counts = np.zeros(size, np.int64)
        for first in range(0, len(self.tokens), CHUNK):
            counts += np.bincount(self.tokens[first : first + CHUNK], minlength=size)
        return counts

    def bits_per_byte(self, nats: float) -> float:
        """The cost of a byte of text in bits, from the sum of the losses of all targets that are scored, in nats.

        It counts separators, which have to be predicted, and no bytes for them; so it compares tokenizers.
        """
        return nats / (math.log(2) * self.scored_bytes) if self.scored_bytes else math.nan

    def windows(self, ends: np.ndarray, scored: np.ndarray, context: int) -> tuple[Tensor, Tensor]:
        """The windows of `context` positions up to `ends`, of which the last `scored` have targets.

        Positions continue at the beginning behind the last one. A window that begins before position 0 takes what is
        at the end.

        Args:
            ends: int64 (N,): one behind the last position of each window.
            scored: int64 (N,).
            context: positions.

        Returns:
            ids and targets, int64 (N, context) each; a target that is not scored is -100.
        """
        columns = np.arange(context)
        positions = (ends[:, None] - context + columns) % self.targets
        ids, targets = self.tokens[positions], self.tokens[positions + 1].astype(np.int64)
        targets[columns < context - scored[:, None]] = IGNORED
        if self.unknown is not None:
            targets[targets == self.unknown] = IGNORED
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(targets)
