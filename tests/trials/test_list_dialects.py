"""Kind: a list is read in one dialect only, or rows of it vanish.

| trial | input | right value |
|---|---|---|
| B16 | semicolons, tabs in `.csv`, bars, spaces, `sep=;` | read, and said |
| B16 | UTF-8 with and without mark, UTF-16, UTF-32, Windows-1252, names of other bytes | read, and said |
| B16 | `Image,Label`, `id,breed`, `filename,class_name`, … in any order, without header | recognised by the cells |
| B16 | ids without suffix or folder, backslashes, paths of elsewhere | found, and said; unclear ones not guessed |
| B16 | `--columns id,breed` | two names are enough; missing ones named in the spelling of the place |
| | `train.csv` beside `train/` and `test/` with the same ids | those of `train/` |
| | a folder with such a list | refused, and names the list |
| | labels 1.0, 2.0; one-hot columns; a number and a name for each class | classes |
| | measurements, or a label for each image | refused: no classes |
| | `is_valid`, `fold`, `Usage` | a split where its cells are splits; else named and not used |
| | empty labels, splits, images, rows; too many cells; repeated rows | left out, counted by reason |
| | one image with two labels | refused |
| | comments, quotes, blank lines | read |
| | a spreadsheet, JSON, one column, binary content, nothing | refused with the way out |
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.trials.pictures import write_images

from skipway.cli import main
from skipway.data import load
from skipway.data.sources.detect import index_source
from skipway.errors import DataError

ROWS = [(f"{name}/{number:03d}.png", name) for name in ("cat", "dog") for number in range(6)]


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "d", {"cat": 6, "dog": 6})


def write(path: Path, rows, separator: str = ",", encoding: str = "utf-8", end: str = "\n") -> Path:
    path.write_bytes("".join(separator.join(map(str, row)) + end for row in rows).encode(encoding))
    return path


def pairs(index) -> set[tuple[str, str]]:
    parts = (index.train, index.validation or {}, index.test or {})
    return {(file, name) for part in parts for name, files in part.items() for file in files}


def check(path: Path, *words: str, expected=None, **options):
    """Read a list, compare all of its pairs, and look for words in its remarks."""
    index = index_source(path, **options)
    assert pairs(index) == set(ROWS if expected is None else expected)
    said = "\n".join((*index.remarks, *index.left_out.sentences()))
    for each in words:
        assert each in said, said
    return index


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", " ", ", ", "; "])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt"])
def test_separators(folder, separator, suffix):
    path = write(folder / f"list{suffix}", [("image", "label"), *ROWS], separator)
    usual = "\t" if suffix == ".tsv" else ","
    check(path, *([] if separator.strip(" ") == usual else ["has its columns between"]))


def test_a_separator_that_excel_states(folder):
    (folder / "l.csv").write_text("sep=;\r\nimage;label\r\n" + "".join(f"{a};{b}\r\n" for a, b in ROWS), newline="")
    check(folder / "l.csv")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_encodings(tmp_path, encoding, end):
    write_images(tmp_path, {"café": 3, "dog": 3})
    rows = [(f"{name}/{number:03d}.png", name) for name in ("café", "dog") for number in range(3)]
    path = write(tmp_path / "l.csv", [("image", "label"), *rows], ";", encoding, end)
    named = {"utf-16": "UTF-16", "utf-32": "UTF-32", "cp1252": "Windows-1252"}
    check(path, *(name for key, name in named.items() if encoding.startswith(key)), expected=rows)


def test_names_of_other_bytes_are_those_of_the_files(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_images(tmp_path, {name: 3, "dog": 3})
    rows = [(f"{each}/{number:03d}.png", each) for each in (name, "dog") for number in range(3)]
    content = "image,label\n" + "".join(f"{a},{b}\n" for a, b in rows)
    (tmp_path / "l.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    check(tmp_path / "l.csv", expected=rows)


@pytest.mark.parametrize(
    "header",
    [
        ("image", "label"),
        ("Image", "Label"),
        ("IMAGE", "CLASS"),
        ("id", "breed"),
        ("filename", "class_name"),
        ("file_path", "category"),
        ("Path", "Target"),
        ("image_id", "diagnosis"),
        ("photo", "what"),
        ("x", "y"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_columns_are_recognised_by_their_cells(folder, header, turned):
    rows = [header, *ROWS]
    path = write(folder / "l.csv", [row[::-1] for row in rows] if turned else rows)
    check(path, *([] if header == ("image", "label") else [f"images from column {header[0]!r}"]))


def test_a_column_that_holds_the_files_goes_before_one_that_is_called_image(folder):
    rows = [("image", "label", "path"), *((number, name, file) for number, (file, name) in enumerate(ROWS))]
    check(write(folder / "l.csv", rows), "images from column 'path', labels from 'label'; not used: 'image'")


@pytest.mark.parametrize("separator", [",", " ", "\t"])
@pytest.mark.parametrize("turned", [False, True])
def test_no_header(folder, separator, turned):
    path = write(folder / "l.txt", [row[::-1] for row in ROWS] if turned else ROWS, separator)
    check(path, "images from the column number")


def test_an_index_column_of_pandas(folder):
    rows = [("", "image", "label"), *((number, *row) for number, row in enumerate(ROWS))]
    check(write(folder / "l.csv", rows))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.replace("/", "\\"), ""),
        (lambda file: file.removesuffix(".png"), "with the suffix .png 12: 'cat/000' is 'cat/000.png'"),
        (lambda file: f"./{file}", ""),
        (lambda file: f"/home/me/d/{file}", "found in"),
        (lambda file: "C:\\data\\" + file.replace("/", "\\"), "found in"),
        (lambda file: f"images/all/{file}", "found in"),
        (lambda file: f"  {file} ", ""),
    ],
)
def test_files_by_other_names(folder, change, said):
    check(write(folder / "l.csv", [("image", "label"), *((change(file), name) for file, name in ROWS)]), said)


def test_ids_of_kaggle(tmp_path):
    """train.csv beside train/ and test/, which have images of the same ids."""
    write_images(tmp_path, {"train": 8, "test": 8})
    rows = [(f"{number:03d}", "cat" if number % 2 else "dog") for number in range(8)]
    write(tmp_path / "train.csv", [("id", "breed"), *rows])
    write(tmp_path / "sample_submission.csv", [("id", "cat", "dog"), ("000", 0.5, 0.5)])
    expected = [(f"train/{number}.png", name) for number, name in rows]
    check(tmp_path / "train.csv", "8 images of the list found in train/ 8, with the suffix .png 8", expected=expected)
    with pytest.raises(DataError, match=r"if 'sample_submission.csv', 'train.csv' lists the images"):
        load(tmp_path)


def test_an_unclear_name_is_not_guessed(tmp_path):
    write_images(tmp_path, {"a": 3, "b": 3})
    rows = [(f"{number:03d}.png", name) for number, name in enumerate(("cat", "dog", "cat"))]
    index = index_source(write(tmp_path / "l.csv", [("image", "label"), *rows]))
    assert pairs(index) == set(rows), "named as they are, and reported as missing"
    with pytest.raises(DataError, match="none of 3 images in .* can be read; the first: .*no such file"):
        load(tmp_path / "l.csv")


def test_a_missing_image_is_not_taken_from_another_class(folder):
    (folder / "dog/003.png").unlink()
    data = load(write(folder / "l.csv", [("image", "label"), *ROWS]), most_unreadable=0.1)
    assert data.unreadable == (("dog/003.png", "no such file"),)


@pytest.mark.parametrize("named", ["id,breed", "ID,Breed", "id,breed,split"])
def test_named_columns_on_the_command_line(folder, named, capsys):
    rows = [("note", "id", "breed"), *(("x", *row) for row in ROWS)]
    path = write(folder / "l.csv", rows)
    small = ("--model", "resnet8", "--width", "4", "--epochs", "1", "--workers", "0", "--device", "cpu")
    assert main(["train", str(path), "--columns", named, "--out", str(folder / "run"), *small]) == 0, (
        capsys.readouterr()
    )


def test_missing_columns_are_named_in_the_spelling_of_the_place(folder, capsys):
    path = write(folder / "l.csv", [("image", "label"), *ROWS])
    assert main(["train", str(path), "--columns", "file,kind", "--out", str(folder / "run")]) == 3
    message = capsys.readouterr().err
    assert "no column 'file', 'kind'; it has 'image', 'label'" in message
    assert "--columns image,label" in message
    with pytest.raises(DataError, match=r"columns=\('image', 'label'\)"):
        load(path, columns=("file", "kind"))
    with pytest.raises(DataError, match="columns=.*: the rule is two or three names"):
        load(path, columns=("image",))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (("1.0", "10.0"), ("1", "10")),
        (("2", "10"), ("2", "10")),
        (("0.5", "1.5"), ("0.5", "1.5")),
        (("01", "1"), ("01", "1")),
        (("yes", "no"), ("no", "yes")),
        (("True", "False"), ("False", "True")),
    ],
)
def test_labels(folder, labels, classes):
    rows = [(file, labels[name == "dog"]) for file, name in ROWS]
    assert set(index_source(write(folder / "l.csv", [("image", "label"), *rows])).classes) == set(classes)


def test_columns_of_marks_are_labels(folder):
    rows = [(file, int(name == "cat"), int(name == "dog")) for file, name in ROWS]
    check(write(folder / "l.csv", [("image", "cat", "dog"), *rows]), "labels from 'cat', 'dog'")


def test_a_name_goes_before_a_number_of_the_same_class(folder):
    rows = [(file, int(name == "dog"), name) for file, name in ROWS]
    check(write(folder / "l.csv", [("image", "label", "label_name"), *rows]), "not used: 'label'")


def test_measurements_are_no_classes(tmp_path):
    write_images(tmp_path, {"a": 30})
    rows = [(f"a/{number:03d}.png", f"{number / 7:.3f}") for number in range(30)]
    with pytest.raises(DataError, match="30 different numbers, which are no classes"):
        index_source(write(tmp_path / "l.csv", [("image", "label"), *rows]))
    rows = [(file, f"n{number}") for number, (file, _) in enumerate(rows)]
    with pytest.raises(DataError, match="each of 30 images has a label of its own"):
        index_source(write(tmp_path / "l.csv", [("image", "label"), *rows]))


@pytest.mark.parametrize(
    ("name", "cells", "held"),
    [
        ("split", ("train", "valid"), "validation"),
        ("Set", ("Training", "TEST"), "test"),
        ("subset", ("train", "dev"), "validation"),
        ("is_valid", ("False", "True"), "validation"),
        ("is_valid", ("0", "1"), "validation"),
        ("is_test", ("no", "yes"), "test"),
        ("fold", ("train", "test"), "test"),
        ("Usage", ("Training", "PublicTest"), ""),
        ("fold", ("0", "1"), ""),
    ],
)
def test_splits(folder, name, cells, held):
    rows = [(*row, cells[number % 3 == 0]) for number, row in enumerate(ROWS)]
    path = write(folder / "l.csv", [("image", "label", name), *rows])
    if name == "Usage":
        with pytest.raises(DataError, match="split 'PublicTest' is not known"):
            index_source(path)
        return
    index = check(path)
    third = {row for number, row in enumerate(ROWS) if number % 3 == 0}
    assert (index.validation is not None) == (held == "validation")
    assert (index.test is not None) == (held == "test")
    if held:
        assert {(f, c) for c, files in (getattr(index, held) or {}).items() for f in files} == third
    else:
        assert any("holds '0', '1' and no names of splits: it is not used" in each for each in index.remarks)


def test_rows_that_are_left_out_are_counted_by_reason(folder):
    rows = [
        ("image", "label", "split"),
        *((*row, "train") for row in ROWS[:5]),
        *((*row, "test") for row in ROWS[5:8]),
        *((*row, "train") for row in ROWS[8:10]),
        ("dog/004.png", "dog", ""),
        ("dog/005.png", "", "test"),
        ("", "dog", "train"),
        ("", "", ""),
        ("cat/000.png", "cat", "train"),
        ("cat/000.png", "cat", "train", "x"),
        ("cat/001.png", "cat", "train", ""),
    ]
    index = index_source(write(folder / "l.csv", rows))
    assert index.inventory.total == len(rows) - 1
    assert dict(index.left_out.counts) == {
        "with an empty 'split'": 1,
        "without a label": 1,
        "without an image": 1,
        "empty": 1,
        "listed more than once": 2,
        "with more cells than there are columns": 1,
    }
    data = load(folder / "l.csv")
    assert data.inventory.total == len(rows) - 1
    assert "1 row left out, without a label: 'dog/005.png'" in data.remarks


def test_an_image_with_two_labels_is_refused_whatever_its_spelling(folder):
    path = write(folder / "l.csv", [("image", "label"), *ROWS, ("cat\\000.png", "dog")])
    with pytest.raises(DataError, match="row 14: .* is 'dog' in train, and above 'cat'"):
        index_source(path)


def test_comments_quotes_and_blank_lines(folder):
    lines = [
        "# made by hand, 2024",
        '# it"s fine',
        "",
        '"image","label"',
        *(f'"{a}","{b}"' for a, b in ROWS),
        "",
        "# end",
    ]
    (folder / "l.csv").write_text("\n".join(lines))
    check(folder / "l.csv")
    (folder / "m.csv").write_text("# image,label\n" + "".join(f"{a},{b}\n" for a, b in ROWS))
    check(folder / "m.csv")


def test_names_with_separators_in_quotes(tmp_path):
    names = ["a, b", "c; d", "e\tf", 'g"h']
    write_images(tmp_path, dict.fromkeys(names, 2))
    rows = [(f"{name}/{number:03d}.png", name) for name in names for number in range(2)]
    quoted = [('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    check(write(tmp_path / "l.csv", [("image", "label"), *quoted]), expected=rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.xlsx", b"PK\x03\x04", "is a spreadsheet; save the sheet as CSV"),
        ("l.json", b"{}", "is no table; write a CSV file with the columns image and label"),
        ("l.csv", b"", "is empty"),
        ("l.csv", b"\n\n", "is empty"),
        ("l.csv", b"image\ncat/000.png\n", "has one column, 'image'"),
        ("l.csv", bytes(range(256)) * 8, "it is no text|not a list"),
        ("l.csv", b"\xff\xfei", "damaged UTF-16"),
        ("l.csv", b"a,b,c\n1,2,3\n4,5,6\n", "has no column 'image', and the cells of no other are images"),
        ("l.csv", b"image,b,c\ncat/000.png,2,3\ndog/000.png,5,6\n", "several columns may hold the labels; it has"),
    ],
)
def test_what_is_no_list_is_refused(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(folder / name)


def test_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table(
        {
            "breed": [name for _, name in ROWS],
            "file": [file.removesuffix(".png") for file, _ in ROWS],
            "is_valid": [number % 3 == 0 for number in range(12)],
            "embedding": [[1.0]] * 12,
        }
    )
    parquet.write_table(table, folder / "l.parquet")
    assert check(folder / "l.parquet", "splits from 'is_valid'").validation
