"""The cache of tokens: made once, mapped, never wrong; and tokenizers in files, whose content travels."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from skipway.data.text import FileTokenizer, load_text, loader, token_store, tokenizer_from_json
from skipway.data.text.documents import FileSource
from skipway.errors import DataError, MissingExtraError

STORY = "Once upon a time there was a king, and he said so.\n" * 20


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(STORY)
    return path


def same(one, two):
    assert one.fingerprint == two.fingerprint
    for split in ("train", "validation", "test"):
        a, b = getattr(one, split), getattr(two, split)
        assert np.array_equal(a.tokens, b.tokens)
        assert np.array_equal(a.documents, b.documents)
        assert (a.bytes, a.scored_bytes, a.unknown, a.unknown_tokens) == (
            *(b.bytes, b.scored_bytes),
            *(b.unknown, b.unknown_tokens),
        )


def folders(cache):
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
def test_tokens_are_made_once_and_mapped(book, tmp_path, tokenizer, monkeypatch):
    cache = tmp_path / "cache"
    plain = load_text(book, context=8, cache=False, tokenizer=tokenizer)
    same(load_text(book, context=8, cache=cache, tokenizer=tokenizer), plain)
    monkeypatch.setattr(token_store.TokenFolder, "write", lambda *given: pytest.fail("written again"))
    again = load_text(book, context=16, cache=cache, tokenizer=tokenizer)
    same(again, plain)
    assert isinstance(again.train.tokens, np.memmap)
    assert not again.train.tokens.flags.writeable


def test_another_text_or_split_has_another_entry(book, tmp_path):
    cache = tmp_path / "cache"
    names = set()
    for content, choices in ((STORY, {}), (STORY + "The end.", {}), (STORY, {"holdout": 0.2})):
        book.write_text(content)
        data = load_text(book, context=8, cache=cache, **choices)
        same(data, load_text(book, context=8, cache=False, **choices))
        names.update(folders(cache))
        assert len(folders(cache)) == 1  # that of the source before is removed
    assert len(names) == 3


@pytest.mark.parametrize("name", ["train.tokens", "test.documents", "index.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_entry_is_written_again(book, tmp_path, name, damage):
    cache = tmp_path / "cache"
    plain = load_text(book, context=8, cache=cache)
    path = next(cache.glob(f"*/{name}"))
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flip":
        content[len(content) // 2] ^= 1
    if damage != "remove":
        path.write_bytes(content[:-3] if damage == "cut" else content)
    same(load_text(book, context=8, cache=cache), plain)


@pytest.mark.parametrize("after", ["encode_corpus", "checksum", "fsync_path", "fault_point"])
def test_a_killed_process_leaves_no_entry(book, tmp_path, monkeypatch, after):
    """Wherever it ends: without its `finally`, as by SIGKILL, what is left is never read and is removed later."""
    cache = tmp_path / "cache"

    def kill(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_store.shutil, "rmtree", lambda *given, **more: None)
        patch.setattr(token_store, after, kill)
        with pytest.raises(KeyboardInterrupt):
            load_text(book, context=8, cache=cache)
    assert all(name.startswith(".") for name in folders(cache))
    left = folders(cache)
    assert len(left) == 1
    same(load_text(book, context=8, cache=cache), load_text(book, context=8, cache=False))
    assert not set(left) & set(folders(cache))


def test_a_cache_that_cannot_be_written_to_is_done_without(book, tmp_path):
    (tmp_path / "cache").write_text("a file")
    data = load_text(book, context=8, cache=tmp_path / "cache")
    assert any(remark.startswith("tokens are not cached: ") for remark in data.remarks)
    same(data, load_text(book, context=8, cache=False))


def test_a_text_beyond_memory_is_read_again(book, tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"{number} {STORY[number:]}")
    plain = load_text(folder, context=8, tokenizer="chars")
    monkeypatch.setattr("skipway.data.text.corpus.MEMORY_BYTES", 3000)
    same(load_text(folder, context=8, tokenizer="chars"), plain)

    assert len(plain.train.documents) > 9

    def change(*given, original=loader.partition, **choices):
        (folder / "7.txt").write_text("another text")
        return original(*given, **choices)

    monkeypatch.setattr(loader, "partition", change)
    with pytest.raises(DataError, match="texts has changed while it was read"):
        load_text(folder, context=8)


def test_a_source_that_has_not_changed_is_not_read_again(book, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    before = load_text(book, context=8, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "documents", lambda *given: pytest.fail("read again"))
        again = load_text(book, context=8, cache=cache)
        same(again, before)
        assert again.remarks == before.remarks
    # what was not asked before needs the text: another tokenizer, another split
    for choices in ({"tokenizer": "chars"}, {"holdout": 0.2}):
        same(load_text(book, context=8, cache=cache, **choices), load_text(book, context=8, cache=False, **choices))
    book.write_text(STORY + "The end.")
    same(load_text(book, context=8, cache=cache), load_text(book, context=8, cache=False))
    assert len(list(cache.glob("survey-*"))) == 1


def test_a_text_that_changed_without_a_trace_is_refused(book, tmp_path):
    """Of the same size and time: what was found out about it is not what is read."""
    cache = tmp_path / "cache"
    load_text(book, context=8, cache=cache)
    times = book.stat()
    book.write_text(STORY.replace("king", "ping"))
    os.utime(book, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match="book has changed while it was read"):
        load_text(book, context=8, cache=cache, tokenizer="chars")
    same(load_text(book, context=8, cache=cache, tokenizer="chars"), load_text(book, context=8, tokenizer="chars"))


@pytest.mark.parametrize("damage", [lambda given: given[:-3], lambda given: b"x" + given[1:], lambda given: b""])
def test_a_damaged_survey_is_made_again(book, tmp_path, damage):
    cache = tmp_path / "cache"
    plain = load_text(book, context=8, cache=cache)
    (path,) = cache.glob("survey-*")
    content = path.read_bytes()
    path.write_bytes(damage(content))
    same(load_text(book, context=8, cache=cache), plain)
    assert len(path.read_bytes()) == len(content)


# Tokenizers in files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A byte-level BPE with a separator, in a folder as transformers writes it."""
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([STORY], trainer)
    # settings that would cut texts off and fill them up
    made.enable_truncation(4)
    made.enable_padding(length=64)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


def as_words(library, folder, **model):
    words = {"[UNK]": 0, "once": 1, "upon": 2, "a": 3, "time": 4, "[SEP]": 5, "king": 9}
    made = library.Tokenizer(library.models.WordLevel(words, unk_token="[UNK]"))
    made.normalizer = library.normalizers.Lowercase()
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.save(str(folder / "words.json"))
    return folder / "words.json"


def test_a_tokenizer_in_a_file(book, bpe):
    data = load_text(book, tokenizer=bpe, context=8, holdout=0, validation=0)
    tokenizer = data.tokenizer
    assert isinstance(tokenizer, FileTokenizer)
    assert tokenizer.decode(data.train.tokens) == STORY
    assert len(data.train) < len(STORY) / 2
    assert int(data.train.tokens.max()) < tokenizer.size
    assert tokenizer.separator == 0
    again = tokenizer_from_json(tokenizer.to_json())
    assert again == tokenizer
    assert again.encode(STORY).tolist() == tokenizer.encode(STORY).tolist() == data.train.tokens.tolist()
    reused = load_text(book, tokenizer=again, context=8, holdout=0, validation=0)
    assert reused.fingerprint == data.fingerprint
    odd = "naïve 🙂\n\n  tabs\t"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd


def test_separators_within_documents_are_counted(tmp_path, bpe):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"{number} {STORY}<|endoftext|>{STORY}")
    data = load_text(tmp_path, tokenizer=bpe, context=8, holdout=0, validation=0)
    assert int((data.train.tokens == 0).sum()) == 6
    assert "3 separators of the tokenizer stand within documents of the train text" in data.remarks


def test_unknown_tokens_are_counted_and_not_scored(tmp_path, bpe):
    library = pytest.importorskip("tokenizers")
    path = as_words(library, tmp_path)
    (tmp_path / "a.txt").write_text("once upon a time Zoë once upon a time " * 10)
    data = load_text(tmp_path / "a.txt", tokenizer=path, context=8, holdout=0, validation=0)
    assert data.tokenizer.size == 10  # the greatest id, and not the number of words, bounds them
    assert data.train.unknown_tokens == 10
    assert data.train.scored_bytes == data.train.bytes - 10 * len("Zoë".encode()) - len("once")
    _, targets = data.train_batch(0, 0, 1)
    assert 0 not in targets
    assert any(remark.startswith("10 tokens (11 %) of the train text are unknown") for remark in data.remarks)
    with pytest.raises(DataError, match="cannot represent 1 token of the text 'Zoë'"):
        data.tokenizer.encode("Zoë")
    (tmp_path / "a.txt").write_text("nothing here is known once " * 10)
    with pytest.raises(DataError, match="80 % of the train text of a is unknown to the tokenizer"):
        load_text(tmp_path / "a.txt", tokenizer=path, context=8, holdout=0, validation=0)


def test_a_tokenizer_that_changes_the_text_is_remarked_upon(tmp_path):
    library = pytest.importorskip("tokenizers")
    path = as_words(library, tmp_path)
    (tmp_path / "a.txt").write_text("Once upon a time " * 10)
    (tmp_path / "b.txt").write_text("a king " * 20)
    data = load_text(tmp_path, tokenizer=path, context=4, holdout=0, validation=0)
    assert any("2 of 2 documents of a sample do not come back" in remark for remark in data.remarks)
    assert any("the tokenizer has no separator: 2 documents follow" in remark for remark in data.remarks)
    assert not any("separators of the tokenizer" in remark for remark in data.remarks)
    named = load_text(tmp_path, tokenizer=path, separator="[SEP]", context=4, holdout=0, validation=0)
    assert named.train.tokens[0] == 5
    with pytest.raises(DataError, match="separator='</s>': .*words.json has no such token"):
        load_text(tmp_path, tokenizer=path, separator="</s>")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{", "is no tokenizer of the library tokenizers"),
        ("tokenizer.json", "{}", "no tokenizer of the library tokenizers"),
        ("tokenizer.json", "[1]", "is no tokenizer of the library tokenizers"),
        ("tokenizer.model", "x", "is a SentencePiece model; AutoTokenizer"),
    ],
)
def test_files_that_are_no_tokenizer(book, tmp_path, name, content, words):
    pytest.importorskip("tokenizers")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        load_text(book, tokenizer=tmp_path / name, context=8)


def test_a_missing_library_has_a_line_to_type(book, bpe, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'skipway\[tokenizers\]'"):
        load_text(book, tokenizer=bpe, context=8)


def test_characters_that_training_text_lacks_are_one_token(tmp_path):
    (tmp_path / "a.txt").write_text("abcd" * 45 + "abÿc" * 5)
    data = load_text(tmp_path / "a.txt", tokenizer="chars", context=8, holdout=0, validation=0.1)
    assert (data.tokenizer.size, data.validation.unknown, data.validation.unknown_tokens) == (5, 4, 5)
    assert data.validation.scored_bytes == data.validation.bytes - 5 * 2 - 1
    ((ids, targets),) = data.evaluation_batches("validation", 3)
    assert 4 in ids
    assert 4 not in targets
    assert any(remark.startswith("5 tokens (25 %) of the validation text are unknown") for remark in data.remarks)
