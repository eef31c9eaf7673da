"""Tokenizers in files of the library `tokenizers`, as every model of transformers brings one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, final

import numpy as np

from skipway.data.text.tokenizer import Tokenizer
from skipway.errors import DataError, MissingExtraError, first_line, printable, spell, suggest

__all__ = ["FileTokenizer", "read_tokenizer"]

FILE = "tokenizer.json"
# names of the token between documents, by preference
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<|im_end|>", "[SEP]", "<s>", "<bos>")
# files of other formats
OTHER_FILES = {".model": "a SentencePiece model", ".bpe": "a list of merges", ".tiktoken": "a list of ranks"}
WAY_OUT = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes a tokenizer.json"


@final
@dataclass(frozen=True)
class FileTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`. No special tokens are added, and nothing is cut off or filled up.

    Args:
        content: of the file.
        separates_by: the token between documents; None: there is none.
    """

    content: str
    separates_by: str | None = None
    kind = "tokenizers"

    @cached_property
    def library_tokenizer(self) -> Any:
        """The tokenizer of the library.

        Raises:
            DataError: the content is none.
            MissingExtraError: the library is not installed.
        """
        try:
            library: Any = import_module("tokenizers")
        except ImportError as error:
            raise MissingExtraError("tokenizers", "tokenizers", "a tokenizer from a file") from error
        try:
            found = library.Tokenizer.from_str(self.content)
        except Exception as error:  # the library raises no other class
            raise DataError(f"this is no tokenizer of the library tokenizers: {first_line(error, 100)}") from error
        found.no_truncation()
        found.no_padding()
        return found

    @cached_property
    def size(self) -> int:
        return max(self.library_tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def separator(self) -> int | None:
        return None if self.separates_by is None else self.library_tokenizer.token_to_id(self.separates_by)

    @cached_property
    def unknown(self) -> int | None:
        model = json.loads(self.content).get("model", {})
        name = model.get("unk_token")
        number = self.library_tokenizer.token_to_id(name) if isinstance(name, str) else model.get("unk_id")
        return number if number != self.separator else None

    def encode_known(self, text: str) -> np.ndarray:
        found = self.library_tokenizer.encode(text, add_special_tokens=False)
        return np.array(found.ids, self.dtype)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """On all cores, and without the positions of the tokens in the text."""
        found = self.library_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, self.dtype) for each in found]

    def unknown_bytes(self, text: str) -> int:
        found = self.library_tokenizer.encode(text, add_special_tokens=False)
        lost = (span for number, span in zip(found.ids, found.offsets, strict=True) if number == self.unknown)
        return sum(len(text[start:end].encode()) for start, end in lost)

    def decode(self, ids: Iterable[int]) -> str:
        return self.library_tokenizer.decode(self.checked(ids).tolist(), skip_special_tokens=False)

    def state(self) -> dict[str, Any]:
        return {"content": self.content, "separates_by": self.separates_by}


def read_tokenizer(path: Path, separator: str | None = None) -> FileTokenizer:
    """Read a tokenizer from its file, or from a folder that holds `tokenizer.json`.

    Args:
        path: of the file or the folder.
        separator: the token between documents; None: a special token that usually ends a text, if there is one.

    Raises:
        DataError: there is no such file, it is none, or it has no such token.
        MissingExtraError: the library `tokenizers` is not installed.
    """
    where = path / FILE if path.is_dir() else path
    if not where.is_file():
        if path.is_dir() or len(path.parts) > 1 or path.suffix:
            raise DataError(f"{spell('tokenizer', str(path))}: there is no file {printable(where)}")
        raise DataError(suggest("tokenizer", str(path), ["bytes", "chars"]) + ", or give the path of a tokenizer.json")
    if where.suffix.lower() in OTHER_FILES:
        raise DataError(f"{printable(where)} is {OTHER_FILES[where.suffix.lower()]}; {WAY_OUT}: give that")
    try:
        content = where.read_text(encoding="utf-8")
        special = {each["content"] for each in json.loads(content).get("added_tokens", [])}
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{printable(where)} is no tokenizer of the library tokenizers: {first_line(error, 100)}"
        ) from error
    found = FileTokenizer(content)
    if separator is None:
        separator = next((name for name in SEPARATORS if name in special), None)
    elif found.library_tokenizer.token_to_id(separator) is None:
        raise DataError(f"{spell('separator', separator)}: {printable(where)} has no such token: name one that it has")
    chosen = FileTokenizer(content, separator)
    if not chosen.size:
        raise DataError(f"{printable(where)} holds no token: give one that was trained")
    return chosen
