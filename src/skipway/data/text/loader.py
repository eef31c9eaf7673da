"""`load_text`: read a source of text, split and tokenise it, and return a `TextData` that is ready for training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from skipway.data.sources.splits import Split
from skipway.data.text.choices import TextChoices
from skipway.data.text.corpus import ChangedText, Corpus
from skipway.data.text.partition import Partition, partition
from skipway.data.text.sources import text_source
from skipway.data.text.text_cache import TextCache
from skipway.data.text.text_data import TextData
from skipway.data.text.token_split import TokenSplit
from skipway.data.text.tokenizer import Tokenizer
from skipway.data.text.tokenizer_choice import choose_tokenizer
from skipway.data.text.tokenizer_file import FileTokenizer
from skipway.errors import CallError, DataError, counted, printable, spell, suggest

__all__ = ["load_text"]

# share of a split that may be unknown to the tokenizer
MOST_UNKNOWN = 0.5
# share of the ids of a tokenizer from which those that occur are worth no remark
FEW_USED = 0.5


def load_text(source: Path | str | TextChoices | None = None, *, trains: bool = True, **choices: Any) -> TextData:
    """Read the text of `source`, or the standard library of this Python for None; split it and encode it.

    Args:
        source: see `TextChoices`; or a `TextChoices`.
        trains: whether it is trained on, so that the training text has to fill a window; else any two tokens will do.
        choices: fields of `TextChoices`.

    Raises:
        DataError: the source cannot be trained on; the message names the file.
        MissingExtraError: the source or the tokenizer needs a library that is not installed.
        CallError: there is no such choice.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     book = Path(folder, "book.txt")
    ...     _ = book.write_text("ab" * 500)
    ...     data = load_text(book, tokenizer="chars", context=8)
    >>> data.tokenizer.size, len(data.train), len(data.validation), len(data.test)
    (2, 810, 90, 100)
    >>> ids, targets = data.train_batch(epoch=0, step=0, batch_size=4)
    >>> bool((ids[:, 1:] == targets[:, :-1])[targets[:, :-1] >= 0].all())
    True
    """
    known = [entry.name for entry in fields(TextChoices)]
    if unknown := [name for name in choices if name not in known]:
        raise CallError(f"load_text: {suggest('argument', unknown[0], known)}")
    if isinstance(source, TextChoices):
        chosen = replace(source, **choices) if choices else source
    else:
        chosen = TextChoices(source=source, **choices)
    return prepare(chosen, trains=trains)


def prepare(chosen: TextChoices, *, trains: bool) -> TextData:
    """Read, split and encode a text as was chosen."""
    found = text_source(chosen)
    cache = TextCache.of(found, chosen)
    corpus, notes = cache.read(found)
    plan = partition(
        corpus.infos, holdout=chosen.holdout, validation=chosen.validation, seed=chosen.seed, by=chosen.split_by
    )
    try:
        tokenizer = choose_tokenizer(chosen.tokenizer, chosen.separator, corpus, plan)
        key = content_key(corpus, plan, tokenizer)
        parts, remarks = cache.encode(corpus, plan, tokenizer, key)
    except ChangedText:
        cache.forget()
        raise
    check_parts(parts, tokenizer, chosen.context, found.name, trains=trains)
    return TextData(
        name=found.name,
        tokenizer=tokenizer,
        context=chosen.context,
        **parts,
        seed=chosen.seed,
        sampling=chosen.sampling,
        fingerprint=key[:16],
        origin={
            "split_by": "parts" if plan.cuts else "documents",
            **{name: getattr(chosen, name) for name in ("holdout", "validation", "column", "divider", "encoding")},
        },
        remarks=(
            *found.remarks,
            *notes.sentences(),
            *remarks,
            *cache.remarks,
            *part_remarks(parts, tokenizer, chosen.context, corpus.separates, trains=trains),
        ),
    )


def check_parts(
    parts: Mapping[Split, TokenSplit], tokenizer: Tokenizer, context: int, name: str, *, trains: bool
) -> None:
    """Check that the training text fills a window, where it trains, and that the tokenizer represents it.

    Raises:
        DataError: it does not.
    """
    train = parts["train"]
    if not trains and not any(part.targets for part in parts.values()):
        tokens = counted(sum(map(len, parts.values())), "token")
        raise DataError(
            f"{printable(name)} has {tokens}, and the first token is not scored; the rule is 2 or more; give more text"
        )
    if trains and train.targets < context:
        least = f"take a context of at most {train.targets}" if train.targets else "give more text"
        raise DataError(
            f"{spell('context', context)}: the training text of {printable(name)} has {counted(len(train), 'token')}, "
            f"and a window needs {context + 1}; {least}"
        )
    for split, part in parts.items():
        if part.unknown_tokens > MOST_UNKNOWN * len(part):
            raise DataError(
                f"{100 * part.unknown_tokens / len(part):.0f} % of the {split} text of {printable(name)} is unknown to "
                f"the tokenizer, {tokenizer.kind}: tokenizer='bytes' represents any text"
            )


def part_remarks(
    parts: Mapping[Split, TokenSplit], tokenizer: Tokenizer, context: int, separators: bool, *, trains: bool
) -> Iterator[str]:
    """Remarks about unknown tokens, separators within documents, splits that are short, and ids that do not occur."""
    for split, part in parts.items():
        if part.unknown_tokens:
            yield (
                f"{counted(part.unknown_tokens, 'token')} ({100 * part.unknown_tokens / len(part):.2g} %) of the "
                f"{split} text are unknown to the tokenizer: they are read as one, and neither trained on nor scored"
            )
        counts = part.id_counts(tokenizer.size)
        between = len(part.documents) - 1 if separators else 0
        if tokenizer.separator is not None and (inside := int(counts[tokenizer.separator]) - between):
            yield f"{counted(inside, 'separator')} of the tokenizer stand within documents of the {split} text"
        if trains and split != "train":
            yield from short_text_remarks(part, context, f"the {split} text")
        if (
            trains
            and split == "train"
            and isinstance(tokenizer, FileTokenizer)
            and counts.astype(bool).mean() < FEW_USED
        ):
            used = np.count_nonzero(counts)
            yield f"{used:,} of the {tokenizer.size:,} ids of the tokenizer occur in the training text"


def short_text_remarks(part: TokenSplit, context: int, name: str) -> Iterator[str]:
    """A remark where a text that is scored does not fill a window."""
    if 0 < part.targets < context:
        yield (
            f"{name} has {counted(len(part), 'token')}, less than a window of {context + 1}: it is scored with less "
            "context than the model is trained on"
        )


def content_key(corpus: Corpus, plan: Partition, tokenizer: Tokenizer) -> str:
    """32 hexadecimal digits of the documents of each split, how they are cut, and the tokenizer."""
    digest = hashlib.blake2b(tokenizer.to_json().encode("utf-8", "surrogatepass"), digest_size=16)
    digest.update(ascii((plan.holdout, plan.validation)).encode())
    for info, split in zip(corpus.infos, plan.splits, strict=True):
        digest.update(f"{info.digest}{split}\n".encode())
    return digest.hexdigest()
