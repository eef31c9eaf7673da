"""The options of `load_text`."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from skipway.data.text.partition import SplitBy
from skipway.data.text.samplers import SAMPLERS
from skipway.data.text.tokenizer import Tokenizer
from skipway.errors import DataError, spell
from skipway.validation import is_real, is_whole

__all__ = ["TextChoices"]


def is_encoding(name: Any) -> bool:
    """Whether Python knows an encoding of text by this name."""
    try:
        return isinstance(name, str) and codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):
        return False


# field: (predicate, the rule in words)
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "source": (
        lambda value: value is None or isinstance(value, Path) or (isinstance(value, str) and value.strip() != ""),
        "a path, hf:NAME or None",
    ),
    "tokenizer": (
        lambda value: isinstance(value, str | Path | Tokenizer),
        "'bytes', 'chars', or the path of a tokenizer.json",
    ),
    "context": (lambda value: is_whole(value, 1), "a whole number of at least 1"),
    "holdout": (lambda value: is_real(value, 0) and value < 1, "from 0 to below 1"),
    "validation": (lambda value: is_real(value, 0) and value < 1, "from 0 to below 1"),
    "seed": (is_whole, "a whole number"),
    "split_by": (lambda value: value in ("auto", "documents", "parts"), "auto, documents or parts"),
    "sampling": (lambda value: value in SAMPLERS, " or ".join(SAMPLERS)),
    "column": (lambda value: value is None or (isinstance(value, str) and value != ""), "a name, or None"),
    "separator": (lambda value: value is None or (isinstance(value, str) and value != ""), "a token, or None"),
    "cache": (lambda value: value is None or isinstance(value, bool | Path), "True, False, a path or None"),
    "divider": (lambda value: value is None or (isinstance(value, str) and value != ""), "a text, or None"),
    "encoding": (lambda value: value is None or is_encoding(value), "the name of an encoding such as latin-1, or None"),
    "outside": (lambda value: isinstance(value, bool), "True or False"),
}


@dataclass(frozen=True, kw_only=True)
class TextChoices:
    """The source of the text, and how it is tokenised, split and sampled.

    Args:
        source: a text file, also compressed; a table in JSON lines, CSV, TSV or Parquet; a folder of such files, also
            with `train`, `val` and `test` in it; a folder that `datasets` saved, or "hf:NAME" to fetch; None: the
            standard library of this Python.
        tokenizer: "bytes"; "chars", the characters of the training text; the path of a `tokenizer.json`; or a
            `Tokenizer`, such as the one that trained weights came with.
        context: tokens that a model sees at once.
        holdout: share of the text to hold out as the test split where the source has none; 0: no test split.
        validation: share of the rest to hold out as the validation split where the source has none; 0: none.
        seed: chooses the documents that are held out, and the windows of every step.
        split_by: hold out whole documents ("documents") or the end of each ("parts"); see `partition`.
        sampling: "packed": every target once an epoch; "random": windows anywhere, as nanoGPT.
        column: of a table, that holds the text; None: the one with a usual name, else with the longest texts.
        separator: the token between documents of a tokenizer in a file; None: a special token with a usual name.
        cache: True: keep the tokens in the user cache folder of the platform or `$SKIPWAY_CACHE`, and map them; a path:
            in that folder. None: from 64 MB of text on, or 2 MB with a tokenizer in a file. False: in memory.
        divider: the text between two documents of a file, such as "<|endoftext|>"; None: a file is one document.
        encoding: of the files; None: by content.
        outside: follow links that lead out of the source's folder.

    Raises:
        DataError: a value outside its rule.

    >>> TextChoices(context=0)
    Traceback (most recent call last):
    skipway.errors.DataError: context=0: the rule is a whole number of at least 1
    """

    source: Path | str | None = None
    tokenizer: Path | str | Tokenizer = "bytes"
    context: int = 256
    holdout: float = 0.1
    validation: float = 0.1
    seed: int = 0
    split_by: SplitBy = "auto"
    sampling: Literal["packed", "random"] = "packed"
    column: str | None = None
    separator: str | None = None
    cache: bool | Path | None = None
    divider: str | None = None
    encoding: str | None = None
    outside: bool = False

    def __post_init__(self) -> None:
        for name, (allowed, rule) in RULES.items():
            if not allowed(getattr(self, name)):
                raise DataError(f"{spell(name, getattr(self, name))}: the rule is {rule}")
