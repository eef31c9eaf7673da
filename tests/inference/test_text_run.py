"""Texts that language models write behind a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.data.text import ByteTokenizer
from skipway.data.text.tokenizer_file import FileTokenizer
from skipway.errors import CheckpointError, DataError, MissingExtraError, SkipwayError, spelling
from skipway.inference import decoder_folder, text_run
from skipway.inference.decoder_folder import write_transformers_folder
from skipway.inference.predict import Predictor
from skipway.inference.text_inputs import TextInputs
from skipway.inference.text_run import decode_continuation, generate_text
from skipway.recipe import Recipe
from skipway.training.loop import train


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


@pytest.fixture
def of_bytes(monkeypatch):
    """A decoder of bytes in the place of the weights of a run, with a recipe to be chosen."""

    def choose(**recipe):
        model = sw.build("gpt-nano", depth=1, dim=12, vocab=256, context=8).eval()
        monkeypatch.setattr(text_run, "load_text_model", lambda *_: (model, TextInputs(ByteTokenizer(), 8)))
        monkeypatch.setattr(text_run, "stored_recipe", lambda path: Recipe(**recipe) if recipe else None)

    return choose


@pytest.mark.parametrize(
    ("folders", "scored", "split", "left"),
    [
        (("train", "val", "test"), 60, "test", 380),
        (("train", "val"), 80, "validation", 300),
        (("a", "b"), 380, "train", 0),
    ],
)
def test_another_text_is_evaluated_on_its_test_split_else_its_validation_split(
    of_bytes, tmp_path, folders, scored, split, left
):
    of_bytes()
    for folder, count in zip(folders, (300, 80, 60), strict=False):
        (tmp_path / "text" / folder).mkdir(parents=True)
        (tmp_path / "text" / folder / "a.txt").write_text("ab" * (count // 2 - 1) + "!")
    found = text_run.evaluate_text_run(Path("run"), tmp_path / "text", device="cpu")
    assert found.evaluation.bytes == pytest.approx(scored, abs=4)
    assert found.name == ("text" if split == "train" else f"text, {split} split")
    said = [remark for remark in found.remarks if "is evaluated" in remark]
    assert len(said) == bool(left)
    assert all(remark.startswith(f"the {split} split is evaluated, not the 3") for remark in said)


def test_another_text_is_read_as_that_of_the_run(of_bytes, tmp_path):
    table, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    rows = [{"plot": f"Once upon {number} times.", "review": f"What a story {number}!"} for number in range(9)]
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    of_bytes()
    with spelling(column="columns"), pytest.raises(DataError, match="name one, with columns='plot'"):
        text_run.evaluate_text_run(Path("run"), table)
    named = text_run.evaluate_text_run(Path("run"), table, column="plot")
    of_bytes(columns="plot", encoding="utf-16", divider="=")
    found = text_run.evaluate_text_run(Path("run"), table)
    assert found.evaluation.bytes == named.evaluation.bytes == 162
    assert found.remarks[0] == "read as the text of the run was: column='plot'", "tables have no dividers"
    other.write_text('{"tale": "Once upon a time."}\n')
    with pytest.raises(DataError, match="has no column 'plot'; it has 'tale'; column='tale' names another"):
        text_run.evaluate_text_run(Path("run"), other)
    again = text_run.evaluate_text_run(Path("run"), other, column="tale")
    assert not any("the run was" in remark or "no effect" in remark for remark in again.remarks)
    book = tmp_path / "book.txt"
    book.write_text("Once upon a time = there was naïve text. = " * 9)
    found = text_run.evaluate_text_run(Path("run"), book)
    assert found.remarks[0] == "read as the text of the run was: divider='='"
    assert not any("column" in remark for remark in found.remarks)


def test_a_text_shorter_than_a_window_is_scored_and_said_to_be(of_bytes, tmp_path):
    """Every byte but the first, by hand; a folder whose training text is short is evaluated on its test text."""
    of_bytes()
    book = tmp_path / "note.txt"
    book.write_text("a note")
    found = text_run.evaluate_text_run(Path("run"), book, device="cpu")
    model, _ = text_run.load_text_model("run", "cpu")
    ids = torch.tensor(list(b"a note"))
    with torch.no_grad():
        expected = float(nn.functional.cross_entropy(model(ids[None, :-1])[0], ids[1:]))
    assert (found.evaluation.total, found.evaluation.bytes) == (5, 5)
    assert found.evaluation.loss == pytest.approx(expected, rel=1e-5)
    assert "the text has 6 tokens, less than a window of 9: it is scored with less context" in found.remarks[-1]
    for folder, text in (("train", "few"), ("test", "ab" * 30)):
        (tmp_path / "text" / folder).mkdir(parents=True)
        (tmp_path / "text" / folder / "a.txt").write_text(text)
    tested = text_run.evaluate_text_run(Path("run"), tmp_path / "text", device="cpu")
    assert tested.evaluation.total == 60  # of several documents each has a separator in front
    assert not any("context" in remark for remark in tested.remarks)
    book.write_text("a")
    with pytest.raises(DataError, match="note has 1 token, and the first token is not scored; the rule is 2 or more"):
        text_run.evaluate_text_run(Path("run"), book, device="cpu")


def test_a_run_without_a_test_text_is_said_to_be_evaluated_on_its_validation_text(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("once upon a time " * 60)
    sizes = {"model": "gpt-nano", "context": 8, "steps": 1, "precision": "float32", "health": 0.0}
    train(Recipe(data=book, holdout=0.0, validation=0.2, **sizes), tmp_path / "run")
    found = text_run.evaluate_text_run(tmp_path / "run")
    assert found.remarks == (text_run.UNTESTED,)


def test_a_decoder_without_a_tokenizer_is_no_classifier(tmp_path, monkeypatch):
    """What is missing is named: the file, or the library that reads it."""
    folder = tmp_path / "net"
    write_transformers_folder(sw.build("gpt-nano", depth=1, dim=12, vocab=256, context=8), folder)
    with pytest.raises(CheckpointError, match=r"is a language model without tokenizer\.json; AutoTokenizer"):
        generate_text(folder, "Once")
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(decoder_folder, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'skipway\[tokenizers\]'"):
        generate_text(folder, "Once")
    with pytest.raises(SkipwayError, match="a language model takes no images"):
        Predictor.load(folder)
