"""A batch of a file of text, for `skipway diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipway.errors import SkipwayError, printable

if TYPE_CHECKING:
    from skipway.zoo import LoadedModel

__all__ = ["text_batch"]

# tokens of all windows: 32 of GPT-2's 1,024 took minutes before anything was said
MOST_TOKENS, SHORTEST = 4096, 16


def text_batch(loaded: LoadedModel, file: Path, samples: int, seed: int, tokenizer: Path | None) -> tuple[Any, str]:
    """Windows of a text as a language model takes them, and what they are in words.

    Args:
        loaded: a model that takes tokens.
        file: of text.
        samples: windows.
        seed: chooses them.
        tokenizer: a `tokenizer.json`; None: bytes are tokens.

    Raises:
        SkipwayError: the model takes fewer tokens than the text has.
        DataError: the text cannot be read, or is too short.
    """
    from skipway.data.text import load_text

    assert loaded.vocabulary is not None
    if tokenizer is None and loaded.vocabulary < 256:
        raise SkipwayError(
            f"--batch {file}: the rule is a vocabulary of at least 256, for bytes, and the model has "
            f"{loaded.vocabulary}; leave --batch away for random tokens"
        )
    chosen: Any = "bytes" if tokenizer is None else tokenizer
    length = min(loaded.shape[0], max(SHORTEST, MOST_TOKENS // samples))
    data = load_text(file, tokenizer=chosen, context=length, holdout=0.0, validation=0.0, seed=seed)
    if data.tokenizer.size > loaded.vocabulary:
        raise SkipwayError(
            f"--batch {file}: {tokenizer} knows {data.tokenizer.size:,} tokens, and the model {loaded.vocabulary:,}"
        )
    ids, _ = data.train_batch(epoch=0, step=0, batch_size=samples)
    kind = "bytes" if tokenizer is None else f"tokens of {tokenizer.name}"
    return loaded.call_with(ids), printable(f"{samples} windows of {length} {kind} of {file}")
