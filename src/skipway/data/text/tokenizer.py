"""Tokenizers: text to token ids and back, as an object that travels with weights as JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, final

import numpy as np

from skipway.errors import DataError, counted, printable

__all__ = ["ByteTokenizer", "CharTokenizer", "Tokenizer"]

# ids below this are stored in two bytes
TWO_BYTES = 2**16
# letters that a message shows
SHOWN = 8


class Tokenizer(ABC):
    """Encodes text as ids from 0 to `size` - 1, and decodes them.

    `separator` is the id in front of every document where several are packed; None: the tokenizer has none.
    `unknown` is the id of what the tokenizer cannot represent; such tokens are counted, and neither trained on nor
    scored.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of ids, of which all are below it: the vocabulary of a model."""

    @property
    @abstractmethod
    def separator(self) -> int | None:
        """The id between packed documents."""

    @property
    @abstractmethod
    def unknown(self) -> int | None:
        """The id of what cannot be represented."""

    @abstractmethod
    def encode_known(self, text: str) -> np.ndarray:
        """Encode a text as ids (n,) of the smallest type; what cannot be represented becomes `unknown`, if there is
        such an id.

        Raises:
            DataError: there is none.
        """

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode several texts, as `encode_known` does one."""
        return [self.encode_known(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids: a list, an array or a tensor of one axis. A separator becomes a line end, or its own name.

        Raises:
            DataError: an id is not one of this tokenizer.
        """

    def first_bytes(self, tokens: np.ndarray) -> int:
        """The bytes of text that the first of the tokens stands for."""
        return len(self.decode(tokens[:1]).encode())

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What the tokenizer is made of, as JSON values."""

    def unknown_bytes(self, text: str) -> int:
        """The bytes in UTF-8 of what becomes `unknown` in a text."""
        return 0

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The type that ids are stored in."""
        return np.uint16 if self.size <= TWO_BYTES else np.uint32

    def encode(self, text: str) -> np.ndarray:
        """Encode a text as ids, int64 (n,).

        Raises:
            DataError: the tokenizer cannot represent the text.

        >>> ByteTokenizer().encode("né").tolist()
        [110, 195, 169]
        """
        ids = self.encode_known(text)
        if self.unknown is not None and (lost := int((ids == self.unknown).sum())):
            raise DataError(
                f"the tokenizer cannot represent {counted(lost, 'token')} of the text {printable(text[:40])!r}; "
                "tokenizer='bytes' represents any text"
            )
        return ids.astype(np.int64)

    def to_json(self) -> str:
        """The tokenizer as JSON, from which `tokenizer_from_json` makes an equal one."""
        return json.dumps({"kind": self.kind, **self.state()}, separators=(",", ":"))

    def checked(self, ids: Iterable[int]) -> np.ndarray:
        """Ids as an array int64 (n,), after checking that the tokenizer has them."""
        array = np.asarray(ids if hasattr(ids, "__array__") else list(ids), np.int64)
        if array.ndim != 1:
            raise DataError(f"ids have {array.ndim} axes: decode takes those of one text, so call it for each row")
        if array.size and not 0 <= array.min() <= array.max() < self.size:
            wrong = int(array[(array < 0) | (array >= self.size)][0])
            raise DataError(f"id {wrong} is none of this tokenizer, whose ids are 0 to {self.size - 1}")
        return array


def encode_unicode(text: str, encoding: str) -> bytes:
    """Encode a text in UTF-8 or UTF-32.

    Raises:
        DataError: it holds half of a surrogate pair.
    """
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        raise DataError(
            f"letter {error.start} of the text {printable(text[:40])!r} is half of a surrogate pair, which no "
            "encoding represents: remove it"
        ) from error


@final
@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8: it represents any text in 256 ids. Byte 255, which UTF-8 never uses, separates documents.

    >>> ByteTokenizer().decode(ByteTokenizer().encode("naïve"))
    'naïve'
    """

    kind = "bytes"
    size = 256
    separator = 255
    unknown = None

    def encode_known(self, text: str) -> np.ndarray:
        return np.frombuffer(encode_unicode(text, "utf-8"), np.uint8).astype(self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        content = self.checked(ids).astype(np.uint8).tobytes()
        return content.replace(b"\xff", b"\n").decode("utf-8", "replace")

    def first_bytes(self, tokens: np.ndarray) -> int:
        return 1

    def state(self) -> dict[str, Any]:
        return {}


@final
@dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """One id for each character of a vocabulary, in the order of their code points.

    Args:
        characters: the vocabulary, each character once, sorted.
        separates: the next id separates documents.
        marks_unknown: the last id stands for every other character.

    >>> CharTokenizer("abc").encode("cab").tolist()
    [2, 0, 1]
    >>> CharTokenizer("abc").encode("dab")
    Traceback (most recent call last):
    skipway.errors.DataError: 'd' is not one of the 3 characters of the tokenizer; tokenizer='bytes' represents any text
    """

    characters: str
    separates: bool = False
    marks_unknown: bool = False
    kind = "chars"

    def __post_init__(self) -> None:
        if not self.characters or sorted(set(self.characters)) != list(self.characters):
            raise DataError("the characters of a tokenizer are sorted, each occurs once, and there is at least one")

    @property
    def size(self) -> int:
        return len(self.characters) + self.separates + self.marks_unknown

    @property
    def separator(self) -> int | None:
        return len(self.characters) if self.separates else None

    @property
    def unknown(self) -> int | None:
        return self.size - 1 if self.marks_unknown else None

    @cached_property
    def codes(self) -> np.ndarray:
        """The code points of the vocabulary."""
        return code_points(self.characters)

    def encode_known(self, text: str) -> np.ndarray:
        codes = code_points(text)
        ids = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        lost = self.codes[ids] != codes
        if lost.any():
            if self.unknown is None:
                letters = sorted({chr(code) for code in codes[lost]})
                shown = ", ".join(repr(letter) for letter in letters[:SHOWN])
                more = f" and {len(letters) - SHOWN} more" if len(letters) > SHOWN else ""
                raise DataError(
                    f"{shown}{more} {'is' if len(letters) == 1 else 'are'} not one of the {len(self.codes)} "
                    "characters of the tokenizer; tokenizer='bytes' represents any text"
                )
            ids[lost] = self.unknown
        return ids.astype(self.dtype)

    def encode(self, text: str) -> np.ndarray:
        known = CharTokenizer(self.characters, self.separates) if self.marks_unknown else self
        return known.encode_known(text).astype(np.int64)

    def unknown_bytes(self, text: str) -> int:
        return sum(len(letter.encode()) for letter in text if letter not in self.characters)

    def decode(self, ids: Iterable[int]) -> str:
        letters = [*self.characters, *["\n"] * self.separates, *["\ufffd"] * self.marks_unknown]
        return "".join(letters[number] for number in self.checked(ids))

    def state(self) -> dict[str, Any]:
        return {
            "characters": self.characters,
            "separates": self.separates,
            "marks_unknown": self.marks_unknown,
        }


def code_points(text: str) -> np.ndarray:
    """The code points of a text, uint32 (n,)."""
    return np.frombuffer(encode_unicode(text, "utf-32-le"), "<u4")
