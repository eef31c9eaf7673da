"""Which tokenizer a text gets, and tokenizers from the JSON that travels with weights."""

from __future__ import annotations

import json
from pathlib import Path

from skipway.data.sources.splits import SPLITS, Split
from skipway.data.text.corpus import Corpus
from skipway.data.text.partition import Partition
from skipway.data.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from skipway.data.text.tokenizer_file import FileTokenizer, read_tokenizer
from skipway.errors import DataError, counted, printable, spell

__all__ = ["choose_tokenizer", "tokenizer_from_json", "tokenizer_remarks"]

KINDS: dict[str, type[Tokenizer]] = {each.kind: each for each in (ByteTokenizer, CharTokenizer, FileTokenizer)}
# documents, and the letters of each, that are encoded to see whether they come back
SAMPLED, SAMPLED_LETTERS = 20, 2000


def tokenizer_from_json(content: str) -> Tokenizer:
    """The tokenizer whose `to_json` gave this text.

    Raises:
        DataError: it is no such text.
        MissingExtraError: it needs a library that is not installed.

    >>> tokenizer_from_json(CharTokenizer("ab").to_json())
    CharTokenizer(characters='ab', separates=False, marks_unknown=False)
    """
    try:
        values = json.loads(content)
        return KINDS[values.pop("kind")](**values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"this is no tokenizer of Skipway: {printable(content[:60])!r}; the file is damaged or of another program"
        ) from error


def choose_tokenizer(
    choice: Path | str | Tokenizer, separator: str | None, corpus: Corpus, plan: Partition
) -> Tokenizer:
    """The tokenizer that was chosen.

    That of characters has those of the training text, an id for the separator where there are several documents, and
    one for other characters where other splits hold some.

    Args:
        choice: "bytes", "chars", a tokenizer, or the path of one.
        separator: the token between documents of a tokenizer in a file.
        corpus: the documents.
        plan: their splits.

    Raises:
        DataError: there is no such tokenizer, or a separator for one that has its own.
        MissingExtraError: it needs a library that is not installed.
    """
    if separator is not None and (isinstance(choice, Tokenizer) or choice in ("bytes", "chars")):
        raise DataError(f"{spell('separator', separator)}: the rule is a token of a tokenizer in a file")
    if isinstance(choice, Tokenizer):
        return choice
    if choice == "bytes":
        return ByteTokenizer()
    if choice == "chars":
        letters: dict[Split, set[str]] = {split: set() for split in SPLITS}
        for _, split, text in corpus.parts(plan):
            letters[split].update(text)
        unknown = not letters["validation"] | letters["test"] <= letters["train"]
        return CharTokenizer("".join(sorted(letters["train"])), corpus.separates, unknown)
    return read_tokenizer(Path(choice), separator)


def tokenizer_remarks(tokenizer: Tokenizer, corpus: Corpus) -> list[str]:
    """Remarks about documents without a separator, and about texts that do not come back from their tokens."""
    remarks = []
    if corpus.separates and tokenizer.separator is None:
        remarks.append(
            f"the tokenizer has no separator: {counted(len(corpus.infos), 'document')} follow each other without one"
        )
    changed = 0
    texts = [text[:SAMPLED_LETTERS] for text in corpus.sample(SAMPLED)]
    for text in texts:
        ids = tokenizer.encode_known(text)
        changed += (tokenizer.unknown is None or tokenizer.unknown not in ids) and tokenizer.decode(ids) != text
    if changed:
        remarks.append(
            f"{changed} of {counted(len(texts), 'document')} of a sample do not come back from their tokens: the "
            "tokenizer changes or drops letters, so its bits per byte are those of another text"
        )
    return remarks
