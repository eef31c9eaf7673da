"""`load_text`: read a source of text, split and tokenise it, and return a `TextData` that is ready for training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from skipway.data.sources.splits import SPLITS, Split
from skipway.data.text.charset import Notes
from skipway.data.text.choices import TextChoices
from skipway.data.text.documents import TextSource
from skipway.data.text.partition import DocumentInfo, Partition, partition
from skipway.data.text.sources import text_source
from skipway.data.text.text_data import TextData
from skipway.data.text.token_split import TokenSplit
from skipway.data.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from skipway.errors import DataError, counted, printable, spell

__all__ = ["load_text"]

# share of the text from which one document is said to be nearly all of it
MOST_OF_IT = 0.9


def load_text(source: Path | str | TextChoices | None = None, **choices: Any) -> TextData:
    """Read the text of `source`, or the standard library of this Python for None; split it and encode it.

    Args:
        source: see `TextChoices`; or a `TextChoices`.
        choices: fields of `TextChoices`.

    Raises:
        DataError: the source cannot be trained on; the message names the file.
        MissingExtraError: the source or the tokenizer needs a library that is not installed.

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
    if isinstance(source, TextChoices):
        chosen = replace(source, **choices) if choices else source
    else:
        chosen = TextChoices(source=source, **choices)
    found = text_source(chosen.source, divider=chosen.divider, encoding=chosen.encoding, outside=chosen.outside)
    notes = Notes()
    reader = Reader(found, *survey(found, notes))
    plan = partition(
        reader.infos, holdout=chosen.holdout, validation=chosen.validation, seed=chosen.seed, by=chosen.split_by
    )
    tokenizer = choose_tokenizer(chosen.tokenizer, reader, plan)
    parts = {split: part.finish(tokenizer) for split, part in encode_parts(reader, plan, tokenizer).items()}
    check_lengths(parts, chosen.context, found.name)
    remarks = [*found.remarks, *notes.sentences(), *split_remarks(reader, plan, chosen), *part_remarks(parts, chosen)]
    return TextData(
        name=found.name,
        tokenizer=tokenizer,
        context=chosen.context,
        **parts,
        seed=chosen.seed,
        sampling=chosen.sampling,
        fingerprint=fingerprint(reader, plan, tokenizer),
        origin={
            "split_by": "parts" if plan.cuts else "documents",
            "holdout": chosen.holdout,
            "validation": chosen.validation,
            "divider": chosen.divider,
        },
        remarks=tuple(remarks),
    )


@dataclass(frozen=True)
class Reader:
    """A source that was read once: what is known of its documents, and their texts, where memory holds them."""

    source: TextSource
    infos: list[DocumentInfo]
    texts: list[str] = field(repr=False)

    @property
    def separates(self) -> bool:
        """Whether there are several documents."""
        return len(self.infos) > 1

    def parts(self, plan: Partition) -> Iterator[tuple[Split, str]]:
        """The text of each split, piece by piece in the order of the documents."""
        for number, text in enumerate(self.texts):
            yield from plan.parts(number, text)


def survey(source: TextSource, notes: Notes) -> tuple[list[DocumentInfo], list[str]]:
    """Read a source once.

    Raises:
        DataError: it holds no text.
    """
    infos, texts = [], []
    for name, text, split in source.documents(notes):
        content = text.encode("utf-8", "surrogatepass")
        infos.append(DocumentInfo(name, hashlib.sha256(content).hexdigest()[:32], len(content), split))
        texts.append(text)
    if not infos:
        raise DataError("; ".join([f"there is no text in {printable(source.name)}", *notes.sentences()]))
    return infos, texts


def choose_tokenizer(choice: Path | str | Tokenizer, reader: Reader, plan: Partition) -> Tokenizer:
    """The tokenizer that was chosen; that of characters has those of the training text.

    It has an id for other characters where other splits need one.
    """
    if isinstance(choice, Tokenizer):
        return choice
    if choice == "bytes":
        return ByteTokenizer()
    if choice == "chars":
        letters: dict[Split, set[str]] = {split: set() for split in SPLITS}
        for split, text in reader.parts(plan):
            letters[split].update(text)
        others = letters["validation"] | letters["test"]
        return CharTokenizer("".join(sorted(letters["train"])), reader.separates, not others <= letters["train"])
    raise DataError(f"{spell('tokenizer', choice)}: the rule is 'bytes' or 'chars'")


@dataclass
class PartBuilder:
    """The tokens of a split as they grow."""

    pieces: list[np.ndarray] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    length: int = 0
    bytes: int = 0
    unknown_tokens: int = 0
    unknown_bytes: int = 0

    def add(self, text: str, tokenizer: Tokenizer, separates: bool) -> None:
        """Append a document."""
        ids = tokenizer.encode_known(text).astype(tokenizer.dtype, copy=False)
        self.starts.append(self.length)
        if separates and tokenizer.separator is not None:
            ids = np.concatenate([np.array([tokenizer.separator], ids.dtype), ids])
        self.bytes += len(text.encode())
        if tokenizer.unknown is not None and (lost := int((ids == tokenizer.unknown).sum())):
            self.unknown_tokens += lost
            self.unknown_bytes += tokenizer.unknown_bytes(text)
        self.pieces.append(ids)
        self.length += len(ids)

    def finish(self, tokenizer: Tokenizer) -> TokenSplit:
        """The split."""
        tokens = np.concatenate([np.empty(0, tokenizer.dtype), *self.pieces])
        first = 0
        if len(tokens) and tokens[0] not in (tokenizer.separator, tokenizer.unknown):
            first = tokenizer.first_bytes(tokens)
        return TokenSplit(
            tokens=tokens,
            documents=np.array([*self.starts, self.length], np.int64),
            bytes=self.bytes,
            unknown=tokenizer.unknown,
            unknown_tokens=self.unknown_tokens,
            scored_bytes=max(0, self.bytes - self.unknown_bytes - first),
        )


def encode_parts(reader: Reader, plan: Partition, tokenizer: Tokenizer) -> dict[Split, PartBuilder]:
    """The tokens of each split."""
    builders = {split: PartBuilder() for split in SPLITS}
    for split, text in reader.parts(plan):
        builders[split].add(text, tokenizer, reader.separates)
    return builders


def check_lengths(parts: dict[Split, TokenSplit], context: int, name: str) -> None:
    """Check that the training text fills a window.

    Raises:
        DataError: it does not.
    """
    train = parts["train"]
    if train.targets < context:
        least = f"take a context of at most {train.targets}" if train.targets > 1 else "give more text"
        raise DataError(
            f"{spell('context', context)}: the training text of {printable(name)} has {counted(len(train), 'token')}, "
            f"and a window needs {context + 1}; {least}"
        )


def split_remarks(reader: Reader, plan: Partition, choices: TextChoices) -> Iterator[str]:
    """Remarks about how the text was split, and about one document that is nearly all of it."""
    total = sum(each.bytes for each in reader.infos)
    largest = max(reader.infos, key=lambda each: each.bytes)
    if reader.separates and largest.bytes > MOST_OF_IT * total:
        yield f"{printable(largest.name)!r} holds {100 * largest.bytes / total:.1f} % of the text"
    if plan.cuts:
        shares = {"validation": (1 - plan.holdout) * plan.validation, "test": plan.holdout}
        held = " and ".join(f"{100 * share:.3g} % {split} text" for split, share in shares.items() if share)
        what = f"each of {len(reader.infos):,} documents" if reader.separates else "the document"
        why = (
            ""
            if choices.split_by == "parts"
            else (", since whole documents cannot give such shares" if reader.separates else ", since there is one")
        )
        yield f"the end of {what} is {held}{why}"


def part_remarks(parts: dict[Split, TokenSplit], choices: TextChoices) -> Iterator[str]:
    """Remarks about splits that are short or hold unknown tokens."""
    for split, part in parts.items():
        if part.unknown_tokens:
            share = 100 * part.unknown_tokens / len(part)
            yield (
                f"{counted(part.unknown_tokens, 'token')} ({share:.2g} %) of the {split} text cannot be represented by "
                f"the tokenizer: they are read as one unknown token, and not scored"
            )
        if split != "train" and 0 < part.targets < choices.context:
            yield (
                f"the {split} text has {counted(len(part), 'token')}, less than a window of "
                f"{choices.context + 1}: it is scored with less context than the model is trained on"
            )


def fingerprint(reader: Reader, plan: Partition, tokenizer: Tokenizer) -> str:
    """16 hexadecimal digits of the documents of each split, how they are cut, and the tokenizer."""
    digest = hashlib.blake2b(tokenizer.to_json().encode(), digest_size=8)
    digest.update(ascii((plan.holdout, plan.validation)).encode())
    for info, split in zip(reader.infos, plan.splits, strict=True):
        digest.update(f"{info.digest}{split}\n".encode())
    return digest.hexdigest()
