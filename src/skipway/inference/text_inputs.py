"""`TextInputs`: what a language model has to be given, stored with its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipway.data.text import Tokenizer, tokenizer_from_json
from skipway.errors import CheckpointError, DataError
from skipway.validation import is_whole

__all__ = ["TextInputs"]


@dataclass(frozen=True)
class TextInputs:
    """The inputs of a language model: tokens of this tokenizer, as many at once as the context.

    Args:
        tokenizer: text to tokens and back.
        context: tokens.
    """

    tokenizer: Tokenizer
    context: int

    @property
    def example(self) -> Tensor:
        """Two sequences in which all tokens take turns, int64 (2, context)."""
        return (torch.arange(2 * self.context) % self.tokenizer.size).view(2, self.context)

    def encode(self, text: str) -> Tensor:
        """A text as tokens, int64 (1, T).

        Raises:
            DataError: the tokenizer cannot represent it.
        """
        return torch.from_numpy(self.tokenizer.encode(text))[None]

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` restores the inputs."""
        return {"tokenizer": self.tokenizer.to_json(), "context": self.context}

    @classmethod
    def from_json(cls, values: Any, source: str) -> TextInputs:
        """Restore the inputs from `to_json` values.

        Raises:
            CheckpointError: the values are damaged.
        """
        if not isinstance(values, dict) or not is_whole(values.get("context"), 1):
            raise CheckpointError(f"{source}: the header does not describe the inputs of a language model")
        try:
            return cls(tokenizer_from_json(values["tokenizer"]), values["context"])
        except (DataError, KeyError, TypeError) as error:
            raise CheckpointError(f"{source}: its tokenizer cannot be read: {error}") from error
