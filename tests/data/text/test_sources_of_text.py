"""Sources: what is read, as what, what is left out, and what is refused, in words."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import platform
import sys

import pytest

from skipway.data.text import load_text
from skipway.data.text.sources import split_files
from skipway.errors import CallError, DataError, MissingExtraError

STORY = "Once upon a time there was a naïve king — he said so.\n" * 8
SMALL = {"context": 8, "split_by": "parts"}


def text_of(data):
    """The training, validation and test text, one after the other."""
    return "".join(data.tokenizer.decode(getattr(data, split).tokens) for split in ("train", "validation", "test"))


def save(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("content", "remark"),
    [
        (STORY.encode(), ""),
        (gzip.compress(STORY.encode(), mtime=0), ""),
        (bz2.compress(STORY.encode()), ""),
        (lzma.compress(STORY.encode()), ""),
        (b"\xef\xbb\xbf" + STORY.encode(), "a byte order mark is left out"),
        (STORY.replace("\n", "\r\n").encode(), r"line ends with \r, read as \n"),
        (STORY.replace("\n", "\r").encode(), r"line ends with \r, read as \n"),
        (STORY.encode("utf-16"), "read as UTF-16"),
        (STORY.encode("utf-16-le"), "read as UTF-16"),
        (STORY.encode("utf-16-be"), "read as UTF-16"),
        (STORY.encode("utf-32"), "read as UTF-32"),
        (STORY.encode("cp1252"), "read as Windows-1252"),
        (lzma.compress(STORY.encode("utf-16")), "read as UTF-16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_encoding_gives_the_same_text(tmp_path, content, remark):
    data = load_text(save(tmp_path, "story.txt", content), **SMALL)
    assert text_of(data) == STORY
    assert [each for each in data.remarks if not each.startswith("the document is cut")] == (
        [next(each for each in data.remarks if each.startswith(remark))] if remark else []
    )
    assert data.name == "story"


@pytest.mark.parametrize(
    ("content", "remark"),
    [
        (STORY.encode()[:-40] + b"\xff" + STORY.encode()[-40:], "UTF-8 with damaged characters, read as U+FFFD"),
        (STORY.encode() + b"\0" + STORY.encode(), "NUL characters are kept"),
        ("<!doctype html><p>" + STORY, "the markup of HTML is read as text"),
        (r"{\rtf1 " + STORY, "the markup of RTF is read as text"),
        ('{"text": "once"}\n' * 40, "looks like JSON and is read as text"),
    ],
)
def test_a_doubtful_text_is_remarked_upon(tmp_path, content, remark):
    data = load_text(save(tmp_path, "story.txt", content), **SMALL)
    assert any(each.startswith(remark) for each in data.remarks)


def test_zstandard(tmp_path):
    """Two frames one after the other, as parallel compressors write them; a file that was cut off is refused."""
    pyarrow = pytest.importorskip("pyarrow")
    content = b"".join(pyarrow.compress(part.encode(), "zstd", asbytes=True) for part in (STORY[:99], STORY[99:]))
    assert text_of(load_text(save(tmp_path, "a.txt.zst", content), **SMALL)) == STORY
    with pytest.raises(DataError, match="is no text: it is a damaged Zstandard file"):
        load_text(save(tmp_path, "a.txt.zst", content[:-9]), **SMALL)


def test_an_encoding_can_be_named(tmp_path):
    story = "Жил-был король, и было у него три сына.\n" * 8
    path = save(tmp_path, "story.txt", story.encode("koi8-r"))
    assert text_of(load_text(path, encoding="koi8-r", **SMALL)) == story
    with pytest.raises(DataError, match="damaged, or not UTF-8"):
        load_text(path, encoding="utf-8", **SMALL)


PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", "there is no text in a; left out, since it is empty"),
        ("a.txt", " \n\t", "there is no text in a"),
        ("a.txt", "short", "context=8: the training text of a has 5 tokens, and a window needs 9; take .* at most 4"),
        ("a.txt", PNG, "is no text: it is a PNG image"),
        ("a.txt", bytes(range(256)) * 9, "is no text: it is a binary file"),
        ("a.pdf", "%PDF-1.7\n" + STORY, "is no text: it is a PDF document"),
        ("a.txt", b"PK\x03\x04" + STORY.encode(), "is no text: it is an archive"),
        ("a.txt", "version https://git-lfs.github.com/spec/v1\noid 0", "is no text: it is a pointer of Git LFS"),
        ("a.txt.gz", gzip.compress(STORY.encode(), mtime=0)[:-20], "is no text: it is a damaged gzip file"),
        ("a.txt.xz", lzma.compress(STORY.encode())[:-20], "is no text: it is a damaged xz file"),
        ("a.txt", b"\xff\xfe" + b"\0\xd8\0", "is no text: it is damaged, or not UTF-16"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl: line 2 is no JSON"),
        ("a.json", '{"text": "a"}', "is no text: it is JSON, and no list of documents"),
        ("a.csv", "n,m\n1,2\n", "several columns may hold the text: 'n', 'm'"),
        ("a.csv", "text\nOne, two\n", "a.csv: the row that ends in line 2 has more cells than the columns, 'text'"),
    ],
)
def test_refused_in_words(tmp_path, name, content, words):
    with pytest.raises(DataError, match=words):
        load_text(save(tmp_path, name, content), context=8, holdout=0, validation=0)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere.txt does not exist; without a source, the text is Python's"):
        load_text(tmp_path / "nowhere.txt")
    save(tmp_path, ".hidden", "text")
    with pytest.raises(DataError, match="holds no text files; 1 file left out, hidden"):
        load_text(tmp_path)
    save(tmp_path, "a.png", PNG)
    save(tmp_path, "b.png", PNG)
    with pytest.raises(DataError, match="there is no text in .*a PNG image: 'a.png' and 1 other document"):
        load_text(tmp_path)


TALES = [f"Tale {number}: {STORY}" for number in range(6)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": list(range(6)), "text": TALES}), path)
    return path


def as_csv(tmp_path, separator=","):
    cells = (f'{number}{separator}"{tale}"\n' for number, tale in enumerate(TALES))
    return save(tmp_path, "a.csv", f"id{separator}text\n" + "".join(cells))


def as_folder(folder):
    for number, tale in enumerate(TALES):
        save(folder, f"{number}.md", tale)
    return folder


TABLES = {
    "jsonl": lambda tmp_path: save(tmp_path, "a.jsonl", lines({"id": "x", "text": tale} for tale in TALES)),
    "jsonl.gz": lambda tmp_path: save(tmp_path, "a.jsonl.gz", gzip.compress(lines(TALES).encode())),
    "json": lambda tmp_path: save(tmp_path, "a.json", json.dumps([{"text": tale} for tale in TALES])),
    "csv": as_csv,
    "semicolons": lambda tmp_path: as_csv(tmp_path, ";"),
    "parquet": as_parquet,
    "divider": lambda tmp_path: save(tmp_path, "a.txt", "<|end|>".join([*TALES, "\n"])),
    "folder": lambda tmp_path: as_folder(tmp_path / "tales"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_every_source_gives_the_same_documents(tmp_path, kind):
    data = load_text(
        TABLES[kind](tmp_path), holdout=0, validation=0, divider="<|end|>" if kind == "divider" else None, context=8
    )
    tokens, starts = data.train.tokens, data.train.documents
    assert len(starts) == 7
    pieces = [tokens[start:end] for start, end in itertools.pairwise(starts)]
    assert [data.tokenizer.decode(piece[1:]) for piece in pieces] == TALES
    assert {int(piece[0]) for piece in pieces} == {data.tokenizer.separator}
    assert data.train.bytes == sum(len(tale.encode()) for tale in TALES)


def test_the_column_of_text(tmp_path):
    rows = [{"id": "a" * 5, "review": "b" * 50, "stars": 5}, {"id": "c" * 5, "review": "d" * 50}]
    path = save(tmp_path, "a.jsonl", lines(rows))
    given = {"holdout": 0, "validation": 0, "context": 4}
    data = load_text(path, **given)
    assert data.train.bytes == 100
    assert "the text is the column 'review'; not used: 'id', 'stars': 'a.jsonl'" in data.remarks
    assert load_text(path, column="id", **given).train.bytes == 10
    with pytest.raises(DataError, match="a.jsonl has no column 'body'; it has 'id', 'review', 'stars'"):
        load_text(path, column="body", **given)
    alike = save(tmp_path, "b.jsonl", lines([{"one": "a" * 50, "two": "b" * 50}]))
    with pytest.raises(DataError, match="several columns may hold the text: 'one', 'two'; name one, with column='one'"):
        load_text(alike, **given)


def test_a_first_row_that_may_be_no_header_is_named(tmp_path):
    data = load_text(
        save(tmp_path, "a.csv", "Once upon a time\nthere was a king\n"), holdout=0, validation=0, context=4
    )
    assert "the text is the column 'Once upon a time': 'a.csv'" in data.remarks


def test_the_encoding_of_a_table(tmp_path):
    path = save(tmp_path, "a.csv", 'text\n"Жил-был король"\n'.encode("koi8-r"))
    data = load_text(path, encoding="koi8-r", holdout=0, validation=0, context=4)
    assert data.tokenizer.decode(data.train.tokens) == "Жил-был король"


def test_halves_of_letters_in_json(tmp_path):
    path = save(tmp_path, "a.jsonl", '{"text": "half \\ud83d and whole \\ud83d\\ude00"}\n')
    data = load_text(path, holdout=0, validation=0, context=8)
    assert data.tokenizer.decode(data.train.tokens) == "half \ufffd and whole 😀"
    assert any("surrogate" in remark for remark in data.remarks)


def test_a_column_longer_than_the_csv_module_allows(tmp_path):
    data = load_text(save(tmp_path, "a.csv", "text\n" + "long " * 40_000), holdout=0, validation=0, context=8)
    assert data.train.bytes == 200_000


def test_folders_are_splits(tmp_path):
    for split in ("train", "val", "test"):
        save(tmp_path, f"{split}/deep/a.txt", f"{split}! " * 20)
    save(tmp_path, "README.md", "what this is")
    data = load_text(tmp_path, context=8)
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert data.tokenizer.decode(getattr(data, split).tokens[1:]) == f"{name}! " * 20
    assert "1 file left out, beside the folders of the splits: 'README.md'" in data.remarks
    assert data.describe()["split_by"] == "documents"


def test_files_are_splits_and_what_is_missing_is_split_off(tmp_path):
    save(tmp_path, "train-00000-of-00001.jsonl", lines(TALES))
    save(tmp_path, "test.jsonl", lines(["The test."]))
    data = load_text(tmp_path, context=8, validation=0.2)
    assert data.tokenizer.decode(data.test.tokens[1:]) == "The test."
    assert len(data.train.documents) + len(data.validation.documents) - 2 == 6
    assert len(data.validation.documents) - 1 == 1
    assert "validation" not in [remark for remark in data.remarks if "cut" in remark]


def test_a_folder_named_test_alone_is_no_split(tmp_path):
    save(tmp_path, "test/a.txt", STORY)
    save(tmp_path, "other/b.txt", "another " * 30)
    data = load_text(tmp_path, context=8)
    assert len(data.train.documents) - 1 == 2


def test_a_folder_leaves_out_what_is_no_text(tmp_path):
    for number, tale in enumerate(TALES):
        save(tmp_path, f"{number}.txt", tale)
    save(tmp_path, "cover.png", PNG)
    save(tmp_path, "meta.json", '{"title": "Tales"}')
    save(tmp_path, "numbers.csv", "a,b\n1,2\n")
    save(tmp_path, "empty.txt", "")
    data = load_text(tmp_path, context=8)
    for part in (
        "left out, since it is no text but a PNG image: 'cover.png'",
        "left out, since it is no text but JSON, and no list of documents: 'meta.json'",
        "left out, since it is empty: 'empty.txt'",
        "every file that is text is read: 7 .txt, 1 .png, 1 .json, 1 .csv",
    ):
        assert part in data.remarks


def test_the_standard_library():
    data = load_text(holdout=0.05, context=8)
    assert data.name == f"python-{platform.python_version()}"
    assert data.fingerprint == load_text(holdout=0.05, context=32).fingerprint
    assert data.train.bytes > 3_000_000
    # near copies, such as modules that were forked, are in one split
    assert not any("of the sentences" in remark for remark in data.remarks if "near cop" not in remark)


def test_a_data_set_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"id": list(range(6)), "text": TALES})
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "set"))
    data = load_text(tmp_path / "set", context=8, validation=0)
    assert data.train.bytes == sum(len(tale.encode()) for tale in TALES)
    assert any("1 document of the test text are training text, too" in remark for remark in data.remarks)


class StandIn:
    """A table of `datasets`: rows by slice."""

    def __init__(self, columns):
        self.columns = columns
        self.column_names = list(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows):
        return {name: values[rows] for name, values in self.columns.items()}

    def select_columns(self, names):
        return StandIn({name: self.columns[name] for name in names})


def test_a_column_of_a_table(monkeypatch):
    tables = {"train": StandIn({"id": [1] * 6, "text": TALES}), "unlabeled": StandIn({"text": ["x"]})}
    monkeypatch.setattr("skipway.data.text.hub_tables.load_tables", lambda source: (tables, None))
    data = load_text("hf:tales", context=8, holdout=0, validation=0)
    assert data.train.bytes == sum(len(tale.encode()) for tale in TALES)
    assert "the split 'unlabeled' is left alone: its name is none of train, val, test" in data.remarks
    with pytest.raises(DataError, match="has no column 'body'; it has id, text"):
        load_text("hf:tales", column="body")


@pytest.mark.parametrize(
    ("name", "content"), [("a.parquet", b"PAR1"), ("a.txt.zst", b"\x28\xb5\x2f\xfdxx")], ids=["parquet", "zst"]
)
def test_what_is_missing_has_a_line_to_type(tmp_path, monkeypatch, name, content):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'skipway\[parquet\]'"):
        load_text(save(tmp_path, name, content))


def test_choices_without_effect_are_named(tmp_path):
    data = load_text(save(tmp_path, "a.txt", STORY), column="text", **SMALL)
    assert "column='text' has no effect on a" in data.remarks


def test_a_choice_that_there_is_not_is_refused():
    with pytest.raises(CallError, match="load_text: unknown argument 'tokeniser'; did you mean 'tokenizer'"):
        load_text(tokeniser="chars")


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"context": 0}, "context=0"),
        ({"source": ""}, "source=''"),
        ({"holdout": 1.0}, "holdout=1.0"),
        ({"validation": -0.1}, "validation=-0.1"),
        ({"split_by": "lines"}, "split_by='lines'"),
        ({"sampling": "all"}, "sampling='all'"),
        ({"encoding": "klingon"}, "encoding='klingon'"),
        ({"encoding": "gzip"}, "encoding='gzip'"),
        ({"tokenizer": "byte"}, "did you mean 'bytes'"),
        ({"tokenizer": "no/such.json"}, "there is no file no/such.json"),
        ({"tokenizer": "bytes", "separator": "</s>"}, "separator='</s>': the rule is a token"),
        ({"cache": "yes"}, "cache='yes'"),
    ],
)
def test_choices_outside_their_rules(tmp_path, choices, words):
    with pytest.raises(DataError, match=words):
        load_text(**{"source": save(tmp_path, "a.txt", STORY), "context": 8, **choices})


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ("src/train.py src/model.py README.md", {}),
        ("train.py eval.py model.py README.md", {}),
        ("train.txt README.md", {}),
        ("train.txt test.txt README.md", {"train.txt": "train", "test.txt": "test"}),
        ("train.csv test.csv README.csv", {"train.csv": "train", "test.csv": "test"}),
        ("train.txt test.txt README.txt", {"train.txt": "train", "test.txt": "test"}),
        ("data/train-00000-of-00001.parquet README.parquet", {"data/train-00000-of-00001.parquet": "train"}),
        ("train.txt.gz valid.txt", {"train.txt.gz": "train", "valid.txt": "validation"}),
        ("data/train-00000-of-00002.parquet README.md", {"data/train-00000-of-00002.parquet": "train"}),
        ("train/model.py val/train.py train.py", {"train/model.py": "train", "val/train.py": "validation"}),
    ],
)
def test_names_that_are_splits(files, splits):
    found, remarks = split_files(files.split())
    given = {file.path: file.split for file in found}
    if not splits:
        assert given == dict.fromkeys(files.split())
    elif "train.py" in files:
        assert given == {**splits, "train.py": "train"}
    else:
        assert given == splits
        assert remarks == (
            [f"1 file left out, beside the files of the splits: {files.split()[-1]!r}"] if "README" in files else []
        )
