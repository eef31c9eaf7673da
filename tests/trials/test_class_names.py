"""Kind: names that are the same to people are the same class, and names that hardly differ are named.

| trial | input | right value |
|---|---|---|
| | a class folder in NFC in train/ and in NFD in test/ (a Mac made one) | one class |
| | the same folder in both forms in one split | one class, said |
| | a network trained on one form, evaluated on a folder of the other | the same class |
| | 'Cat' beside 'cat', 'cat ' beside 'cat' | two classes, and a remark |
| | names that are not Unicode, of 200 letters, of spaces, of emoji | classes |
| | subfolders of class folders | merged, with counts in a remark; or classes by `subfolders` |
| | fold1/cat, fold1/dog, fold2/cat, fold2/dog | a remark that the subfolders may be the classes |
| | images in a class folder and in its subfolders, with `subfolders="classes"` | both are classes |
| | nested classes, trained and evaluated by the command line | the names are paths, and `evaluate` reads them so |
"""

from __future__ import annotations

import os
import unicodedata

import pytest
from tests.trials.pictures import write_images

from skipway.cli import main
from skipway.data import load
from skipway.data.sources.folders import index_folders

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
SMALL = ("--epochs", "1", "--model", "resnet8", "--width", "4", "--workers", "0", "--device", "cpu")


@pytest.mark.parametrize(("train", "test"), [(NFC, NFD), (NFD, NFC), (NFD, NFD)])
@pytest.mark.parametrize("word", ["café", "Ångström", "日本", "한국", "München"])
def test_unicode_forms_are_one_class(tmp_path, word, train, test):
    train, test = (unicodedata.normalize("NFC" if form == NFC else "NFD", word) for form in (train, test))
    write_images(tmp_path, {f"train/{train}": 3, "train/dog": 3, f"test/{test}": 2, "test/dog": 1})
    index = index_folders(tmp_path)
    assert index.test is not None
    assert len(index.test[unicodedata.normalize("NFC", word)]) == 2
    assert set(index.classes) == {unicodedata.normalize("NFC", word), "dog"}


def test_two_forms_in_one_split_are_one_class_and_said(tmp_path):
    write_images(tmp_path, {NFC: 3, NFD: 2, "dog": 3})
    if len(os.listdir(tmp_path)) == 2:
        pytest.skip("this file system knows one form only")
    index = index_folders(tmp_path)
    assert {name: len(files) for name, files in index.train.items()} == {NFC: 5, "dog": 3}
    assert index.remarks == ("folders whose names are equal but for their Unicode form are one class: 'café'",)


def test_evaluation_knows_a_class_in_either_form(tmp_path, capsys):
    write_images(tmp_path / "a", {NFC: 4, "dog": 4})
    write_images(tmp_path / "b", {NFD: 4, "dog": 4})
    assert main(["train", str(tmp_path / "a"), "--out", str(tmp_path / "run"), "--quiet", *SMALL]) == 0
    assert main(["evaluate", str(tmp_path / "run"), str(tmp_path / "b"), "--device", "cpu"]) == 0
    assert "8 images" in capsys.readouterr().out


@pytest.mark.parametrize(("one", "other"), [("cat", "Cat"), ("cat", "cat "), ("big cat", "bigcat"), ("CAT", "cat")])
def test_names_that_hardly_differ_are_named(tmp_path, one, other):
    write_images(tmp_path, {one: 3, other: 3, "dog": 3})
    if len(os.listdir(tmp_path)) == 2:
        pytest.skip("names are one here")
    (remark,) = [remark for remark in load(tmp_path).remarks if "differ by case or spaces only" in remark]
    assert repr(one) in remark
    assert repr(other) in remark


@pytest.mark.parametrize("name", ["x" * 200, "  ", "😀", "a\tb", "-", "None", "0", "caf\udce9", "con", "a'b\"c"])
def test_names_of_any_kind(tmp_path, name):
    write_images(tmp_path, {name: 4, "dog": 4})
    assert set(load(tmp_path).classes) == {name, "dog"}


def nested(root):
    return write_images(root, {"pet/cat": 4, "pet/dog": 3, "farm/cow": 4, "farm/old/goat": 3, "farm": 2})


def test_merged_subfolders_are_said_with_counts(tmp_path):
    index = index_folders(nested(tmp_path))
    assert {name: len(files) for name, files in index.train.items()} == {"farm": 9, "pet": 7}
    assert index.remarks == (
        "subfolders are merged in 2 classes, the first 'farm': 'farm' 2, 'farm/cow' 4, 'farm/old/goat' 3; "
        "subfolders='classes' makes each of them a class",
    )


def test_subfolders_that_are_the_same_everywhere_may_be_the_classes(tmp_path):
    write_images(tmp_path, {f"fold{fold}/{name}": 3 for fold in (1, 2, 3) for name in ("cat", "dog")})
    merged, same = index_folders(tmp_path).remarks
    assert merged.startswith("subfolders are merged in 3 classes, the first 'fold1': 'fold1/cat' 3, 'fold1/dog' 3")
    assert same.startswith("every class has the same subfolders: if they are the classes")


def test_subfolders_are_classes_by_choice(tmp_path):
    index = index_folders(nested(tmp_path), subfolders="classes")
    counts = {"farm": 2, "farm/cow": 4, "farm/old/goat": 3, "pet/cat": 4, "pet/dog": 3}
    assert {name: len(files) for name, files in index.train.items()} == counts
    assert index.remarks == ()


def test_one_subfolder_in_each_class_needs_no_remark(tmp_path):
    write_images(tmp_path, {"cat/images": 3, "dog/images": 3})
    assert index_folders(tmp_path).remarks == ()


def test_nested_classes_are_evaluated_as_they_were_trained(tmp_path, capsys):
    folder, run = nested(tmp_path / "d"), str(tmp_path / "run")
    assert main(["train", str(folder), "--out", run, *SMALL]) == 0
    assert "--subfolders classes makes each of them a class" in capsys.readouterr().out
    assert main(["train", str(folder), "--out", run, "--overwrite", "--quiet", "--subfolders", "classes", *SMALL]) == 0
    assert main(["evaluate", run, str(folder), "--device", "cpu"]) == 0
    assert main(["evaluate", run, "--device", "cpu"]) == 0
    assert "farm/old/goat" in capsys.readouterr().out
