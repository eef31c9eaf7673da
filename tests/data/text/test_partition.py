"""Splits of text: by document, deterministic by seed and content, copies together, no text in two splits."""

from __future__ import annotations

import itertools
import random

import pytest

from skipway.data.text import load_text
from skipway.data.text.overlap import SentenceSample, near_copies
from skipway.errors import DataError

WORDS = "able bird cold door east farm gold hand idea jump kind lake mind nose open park quiet rain".split()  # noqa: SIM905


def tale(seed, sentences=12):
    """A text that has no sentence in common with that of another seed."""
    draw = random.Random(seed)
    return "\n".join(f"{seed}: " + " ".join(draw.choices(WORDS, k=12)) for _ in range(sentences)) + "\n"


@pytest.fixture
def shelf(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(tale(number))
    return tmp_path


def documents(data):
    """The texts of each split."""
    found = {}
    for split in ("train", "validation", "test"):
        part = getattr(data, split)
        ends = part.documents.tolist()
        found[split] = [data.tokenizer.decode(part.tokens[a:b]).lstrip("\n") for a, b in itertools.pairwise(ends)]
    return found


def test_every_document_is_in_one_split(shelf):
    found = documents(load_text(shelf, context=8))
    assert sorted(text for texts in found.values() for text in texts) == sorted(tale(number) for number in range(40))
    assert 4 <= len(found["test"]) <= 5
    assert 4 <= len(found["validation"]) <= 5


def test_the_split_depends_on_seed_and_content_alone(shelf, tmp_path_factory):
    data = load_text(shelf, context=8)
    elsewhere = tmp_path_factory.mktemp("other")
    for number in range(40):
        (elsewhere / f"{(7 * number) % 40:02}.txt").write_text(tale(number))
    moved = load_text(elsewhere, context=16)
    for split, texts in documents(data).items():
        assert sorted(documents(moved)[split]) == sorted(texts)
    assert documents(load_text(shelf, context=8, seed=1))["test"] != documents(data)["test"]


def test_a_document_more_moves_few(shelf):
    before = documents(load_text(shelf, context=8))
    (shelf / "new.txt").write_text(tale("new"))
    after = documents(load_text(shelf, context=8))
    assert len(set(before["test"]) ^ set(after["test"])) <= 2


def test_copies_and_near_copies_stay_together(shelf):
    """Here every fifth document is another one with a line more, or the same."""
    for number in range(0, 40, 5):
        (shelf / f"{number}-copy.txt").write_text(tale(number))
        (shelf / f"{number}-near.txt").write_text(tale(number) + "And one more line at the end of the tale.\n")
    for seed in range(5):
        data = load_text(shelf, context=8, seed=seed, holdout=0.2, validation=0.2)
        for texts in documents(data).values():
            numbers = [text.partition(":")[0] for text in texts]
            assert all(numbers.count(str(n)) in (0, 3) for n in range(0, 40, 5))
        assert not any("of the sentences" in remark or "training text, too" in remark for remark in data.remarks)
        assert any(remark.startswith("8 documents more than once") for remark in data.remarks)


def test_leaks_between_splits_of_the_source_are_remarked_upon(tmp_path):
    for split, numbers in (("train", range(10)), ("test", range(8, 12))):
        (tmp_path / split).mkdir()
        for number in numbers:
            (tmp_path / split / f"{number}.txt").write_text(tale(number))
    (tmp_path / "test/near.txt").write_text(tale(3, 8) + "Another end.\n")
    remarks = load_text(tmp_path, context=8, validation=0).remarks
    assert "2 documents of the test text are training text, too: 'test/8.txt', 'test/9.txt'" in remarks
    assert any("3 near copies of training text in the test text" in remark for remark in remarks)
    assert any("% of the sentences of the test text occur in the training text" in remark for remark in remarks)


def test_one_document_is_cut_as_nanogpt_cuts_it(tmp_path):
    """Its data.py: train is the text up to int(n * 0.9), validation the rest."""
    text = tale(0, 97)
    (tmp_path / "a.txt").write_text(text)
    data = load_text(tmp_path / "a.txt", context=8, holdout=0, validation=0.1)
    cut = int(len(text) * 0.9)
    assert data.tokenizer.decode(data.train.tokens) == text[:cut]
    assert data.tokenizer.decode(data.validation.tokens) == text[cut:]
    assert len(data.test) == 0
    assert list(data.evaluation_batches("test", 4)) == []
    assert "the document is cut: at its end are 10 % validation text" in data.remarks


def test_documents_are_cut_where_whole_ones_cannot_give_the_shares(tmp_path):
    (tmp_path / "long.txt").write_text(tale(0, 300))
    (tmp_path / "short.txt").write_text(tale(1, 4))
    data = load_text(tmp_path, context=8)
    assert "each document is cut: at its end are 9 % validation text and 10 % test text" in data.remarks
    assert any(remark.startswith("'long.txt' is 98.") for remark in data.remarks)
    assert [len(part.documents) - 1 for part in (data.train, data.validation, data.test)] == [2, 2, 2]
    with pytest.raises(DataError, match="split_by='documents': 2 documents of such sizes cannot give a test split"):
        load_text(tmp_path, context=8, split_by="documents")


def test_shares_follow_the_bytes(shelf):
    for number in range(40):
        (shelf / f"{number:02}.txt").write_text(tale(number, 2 + number))
    data = load_text(shelf, context=8, holdout=0.25, validation=0.25)
    total = data.train.bytes + data.validation.bytes + data.test.bytes
    assert data.test.bytes == pytest.approx(0.25 * total, rel=0.5)
    assert data.validation.bytes == pytest.approx(0.25 * 0.75 * total, rel=0.5)


def test_a_sample_of_sentences_does_not_hide_copies(monkeypatch):
    monkeypatch.setattr("skipway.data.text.overlap.MOST_SENTENCES", 500)
    sample = SentenceSample()
    for number in range(30):
        sample.add(tale(number % 20, 60))
    assert sample.rate > 1
    assert sample.count <= 500
    assert near_copies(sample.documents) == [number % 20 for number in range(30)]
