"""Tokenizers: every text comes back, JSON makes an equal one, and what cannot be represented is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipway.data.text import ByteTokenizer, CharTokenizer, tokenizer_from_json
from skipway.errors import DataError

TEXT = "To be, or\nnot to be — naïve 🙂"
CHARS = CharTokenizer("".join(sorted(set(TEXT))))


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CHARS], ids=["bytes", "chars"])
def test_a_text_comes_back(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int64
    assert 0 <= ids.min() <= ids.max() < tokenizer.size
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == tokenizer.decode(torch.tensor(ids)) == TEXT
    again = tokenizer_from_json(tokenizer.to_json())
    assert again == tokenizer
    assert np.array_equal(again.encode(TEXT), ids)
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.decode([]) == ""


@given(st.text())
@settings(max_examples=20, deadline=None)
def test_bytes_represent_any_text(text):
    """And none of them is the separator, which UTF-8 never uses."""
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.separator not in ids


def test_characters_are_numbered_as_in_nanogpt():
    """By their code points: `sorted(list(set(data)))`."""
    numbers = {letter: number for number, letter in enumerate(sorted(set(TEXT)))}
    assert CHARS.encode(TEXT).tolist() == [numbers[letter] for letter in TEXT]
    assert CHARS.size == len(numbers)


def test_special_ids_follow_the_characters():
    tokenizer = CharTokenizer("ab", separates=True, marks_unknown=True)
    assert (tokenizer.size, tokenizer.separator, tokenizer.unknown) == (4, 2, 3)
    assert tokenizer.encode_known("aÿb").tolist() == [0, 3, 1]
    assert tokenizer.unknown_bytes("aÿb") == 2
    assert tokenizer.decode([0, 2, 1, 3]) == "a\nb\ufffd"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: CHARS.encode("Hx"), "'H', 'x' are not one of the"),
        (lambda: CharTokenizer("ab", marks_unknown=True).encode("z"), "'z' is not one of the 2 characters"),
        (lambda: ByteTokenizer().encode("a\ud800"), "letter 1 .* half of a surrogate pair"),
        (lambda: CHARS.encode("\ud800"), "half of a surrogate pair"),
        (lambda: ByteTokenizer().decode([256]), "id 256 is none"),
        (lambda: CHARS.decode([-1]), "id -1 is none"),
        (lambda: ByteTokenizer().decode([[1]]), "2 axes"),
        (lambda: CharTokenizer("ba"), "sorted"),
        (lambda: CharTokenizer(""), "at least one"),
        (lambda: tokenizer_from_json("{}"), "no tokenizer"),
        (lambda: tokenizer_from_json('{"kind":"chars","characters":"ba"}'), "sorted"),
        (lambda: tokenizer_from_json("[1"), "no tokenizer"),
    ],
)
def test_refused_in_words(call, words):
    with pytest.raises(DataError, match=words):
        call()
