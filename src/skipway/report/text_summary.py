"""Lines printed before and after training on text, as (label, text) pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from skipway.data.text import TextData
from skipway.errors import counted, printable
from skipway.inference.text_evaluation import TextEvaluation

__all__ = ["bits_text", "chosen_step_text", "text_lines", "unigram_entropy"]


def text_lines(data: TextData) -> Iterator[tuple[str, str]]:
    """Describe the text: its size, tokenizer and splits, and what a user may not expect."""
    parts = (data.train, data.validation, data.test)
    each = [len(part.documents) - 1 for part in parts]
    documents = max(each) if data.origin["split_by"] == "parts" else sum(each)
    total = sum(part.bytes for part in parts)
    yield (
        "data",
        f"{printable(data.name)}: {counted(total, 'byte')} of text in {counted(documents, 'document')}, as "
        f"{counted(sum(map(len, parts)), 'token')} ({data.tokenizer.kind}, {data.tokenizer.size:,} different), "
        f"sequences of {data.context}",
    )
    validation = f"{len(data.validation):,} to validate on" if data.validation.targets else "none to validate on"
    yield "split", f"{counted(len(data.test), 'token')} to test on, {validation}, {len(data.train):,} to train on"
    for remark in data.remarks:
        yield "note", remark


def unigram_entropy(data: TextData) -> float:
    """The least loss of an output that is the same at every token: the entropy of the training tokens, in nats."""
    counts = np.bincount(data.train.tokens, minlength=data.tokenizer.size).astype(np.float64)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def bits_text(evaluation: TextEvaluation) -> str:
    """The result of an evaluation in words.

    >>> bits_text(TextEvaluation(loss=1.0, total=1000, correct=500, bytes=1000))
    '1.4427 bits per byte of 1,000 bytes; 1.0000 nats per token, perplexity 2.7, 50.0 % of 1,000 tokens right'
    """
    return (
        f"{evaluation.bits_per_byte:.4f} bits per byte of {counted(evaluation.bytes, 'byte')}; {evaluation.loss:.4f} "
        f"nats per token, perplexity {evaluation.perplexity:.1f}, {100 * evaluation.accuracy:.1f} % of "
        f"{counted(evaluation.total, 'token')} right"
    )


def chosen_step_text(folder: Any, best: int) -> str:
    """Describe which weights were tested, and how they were chosen.

    Args:
        folder: of the run.
        best: the epoch that was chosen.
    """
    row = next((row for row in folder.read_metrics() if row["epoch"] == best), None)
    if row is None or row["validation_bits_per_byte"] is None:
        return "the last weights, as there is no text to validate on"
    return (
        f"weights of step {row['step']:,}, the best on the validation text ({row['validation_bits_per_byte']:.4f} bits "
        f"per byte, loss {row['validation_loss']:.4f})"
    )
