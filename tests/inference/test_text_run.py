"""Texts that language models write behind a prompt."""

from __future__ import annotations

import pytest

import skipway as sw
from skipway.data.text import ByteTokenizer
from skipway.data.text.tokenizer_file import FileTokenizer
from skipway.inference import text_run
from skipway.inference.text_inputs import TextInputs
from skipway.inference.text_run import decode_continuation, generate_text


@pytest.fixture
def tokenizer() -> FileTokenizer:
    """As that of Llama 2: a token holds the space before it, and the decoder drops the first one."""
    library = pytest.importorskip("tokenizers")
    words = ["▁once", "▁upon", "▁a", "▁time", "<s>"]
    made = library.Tokenizer(library.models.WordLevel({word: number for number, word in enumerate(words)}))
    made.pre_tokenizer = library.pre_tokenizers.Metaspace()
    made.decoder = library.decoders.Metaspace()
    made.add_special_tokens(["<s>"])
    return FileTokenizer(made.to_str(), "<s>")


def test_words_behind_a_prompt_keep_the_space_before_them(tokenizer, monkeypatch):
    model = sw.build("gpt-nano", depth=1, dim=12, vocab=tokenizer.size, context=8).eval()
    monkeypatch.setattr(text_run, "load_text_model", lambda *_: (model, TextInputs(tokenizer, 8)))
    text = generate_text("run", "once upon", 3, temperature=0)
    assert text
    assert set(f"once upon{text}".split()) <= {"once", "upon", "a", "time", "<s>"}
    assert decode_continuation(tokenizer, [0, 1], [2, 3]) == " a time"
    assert decode_continuation(tokenizer, [], [2, 3]) == "a time"


def test_a_letter_divided_by_the_end_of_the_prompt_takes_nothing_else_along():
    ids = list("né!".encode())
    assert decode_continuation(ByteTokenizer(), ids[:2], ids[2:]).endswith("!")
