"""Kind: the folders of splits are found by any usual name and case, or refused; no part is dropped without a word.

| trial | input | right value |
|---|---|---|
| B1 | Training/Testing, Train/Test, TRAIN/VAL, training/validation | the splits |
| B1 | train/Val, train/testing, train/eval | the splits; nothing is split off for a split that is there |
| | dev, devel, holdout, Hold-Out, held_out, evaluation, val2017, test_images | the splits |
| | the splits nested: data/train, train/train, train/images/<class> | the splits, and the folder is named |
| B5 | test/ without class folders beside valid/ | valid is the validation split, test is named and left alone |
| B5 | test/unknown, test/Unlabelled, test/images | the same |
| B5 | test/ without class folders, testing/ with them | testing is the test split, test is named |
| | an empty test/ beside testing/ with class folders | testing is the test split |
| | a folder beside train/ that names no split | named and left alone |
| | splits within each class, cat/train, cat/test | refused with the way out |
| | a class of the test split that differs by case or spaces | refused with both names |
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.trials.pictures import write_images

from skipway.data import load
from skipway.data.sources.folders import index_folders
from skipway.errors import DataError

# (folder of the training, the validation and the test split); "" is none
LAYOUTS = [
    *(("Training", "", "Testing"), ("Train", "", "Test"), ("TRAIN", "VAL", ""), ("training", "validation", "")),
    *(("train", "Val", ""), ("train", "", "testing"), ("train", "", "eval"), ("train", "dev", "test")),
    *(("Train", "", "holdout"), ("train", "", "Hold-Out"), ("train", "", "held_out"), ("TRAIN", "DEV", "Evaluation")),
    *(("train2017", "val2017", "test2017"), ("training_set", "validation_set", "test_set"), ("trn", "valid", "tst")),
    *(("train-images", "valid-images", "test-images"), ("TrainData", "ValidData", "TestData"), ("train", "devel", "")),
    *(("", "val", "test"), ("", "", "Test"), ("", "valid", "")),
]


def sizes(root: Path) -> dict[str, int]:
    index = index_folders(root)
    return {
        split: sum(map(len, files.values()))
        for split in ("train", "validation", "test")
        if (files := getattr(index, split)) is not None
    }


def split_folders(root: Path, *parts: str) -> Path:
    for part, count in zip(parts, (5, 2, 3), strict=True):
        if part or count == 5:
            write_images(root / part, {"cat": count, "dog": count})
    return root


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_splits_by_any_usual_name(tmp_path, layout):
    split_folders(tmp_path, *layout)
    expected = {"train": 10, "validation": 4, "test": 6}
    assert sizes(tmp_path) == {
        split: size for (split, size), name in zip(expected.items(), layout, strict=True) if name or split == "train"
    }
    index = index_folders(tmp_path)
    assert (index.classes, index.unused, index.remarks) == (("cat", "dog"), (), ())


@pytest.mark.parametrize("top", ["data", "My Data", "archive/dataset"])
@pytest.mark.parametrize("inner", [("train", "val", "test"), ("train/train", "val/val", "test/test")])
def test_splits_in_a_folder_of_their_own_are_found_and_the_folder_is_named(tmp_path, top, inner):
    split_folders(tmp_path, *(f"{top}/{part}" for part in inner))
    assert sizes(tmp_path) == {"train": 10, "validation": 4, "test": 6}
    assert index_folders(tmp_path).remarks == (
        f"the class folders are taken from {top!r}, the only folder in the source",
    )


@pytest.mark.parametrize("layout", [("train/images", "val/images", "test/images"), ("images", "", "")])
def test_class_folders_in_a_folder_of_images(tmp_path, layout):
    split_folders(tmp_path, *layout)
    assert sizes(tmp_path)["train"] == 10
    assert index_folders(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize("test", ["test", "test/unknown", "Test/Unlabelled", "test/images", "TEST/all", "test_images"])
@pytest.mark.parametrize("validation", ["valid", ""])
def test_an_unlabelled_test_split_is_named_and_left_alone(tmp_path, test, validation):
    split_folders(tmp_path, "train", validation, "")
    write_images(tmp_path, {test: 6})
    assert sizes(tmp_path) == {"train": 10, **({"validation": 4} if validation else {})}
    data = load(tmp_path)
    assert any("holds 6 images that are not in class folders: it is left alone" in remark for remark in data.remarks)
    assert data.inventory.left_out == {"outside the class folders": 6}
    assert data.inventory.total == sum(1 for path in tmp_path.rglob("*") if path.is_file())


def test_of_two_test_splits_the_one_with_class_folders_is_taken(tmp_path):
    split_folders(tmp_path, "train", "", "testing")
    write_images(tmp_path, {"test": 6})
    index = index_folders(tmp_path)
    assert sizes(tmp_path) == {"train": 10, "test": 6}
    assert index.unused == ("'test': its 6 images are not in class folders",)
    assert index.inventory.left_out == {"in a folder that is not used": 6}


def test_an_empty_test_folder_gives_way_to_another(tmp_path):
    split_folders(tmp_path, "train", "", "Testing")
    (tmp_path / "test/cat").mkdir(parents=True)
    assert sizes(tmp_path) == {"train": 10, "test": 6}
    assert index_folders(tmp_path).unused == ("'test': 'Testing' is the test split",)


@pytest.mark.parametrize("name", ["extra", "labels", "Annotations", "unlabeled", "train_val"])
def test_a_folder_that_names_no_split_is_named(tmp_path, name):
    split_folders(tmp_path, "train", "", "test")
    write_images(tmp_path, {f"{name}/cat": 2})
    index = index_folders(tmp_path)
    assert index.unused == (f"{name!r}: its name is none of train, val, test",)
    assert (index.inventory.total, index.inventory.left_out) == (18, {"in a folder that is not used": 2})


def test_splits_within_classes_are_refused(tmp_path):
    write_images(tmp_path, {"cat/train": 3, "cat/test": 2, "dog/train": 3, "dog/test": 2})
    with pytest.raises(
        DataError, match="'cat', 'dog' in .* each hold a train and a test folder: put the splits outside"
    ):
        index_folders(tmp_path)


@pytest.mark.parametrize("name", ["Cat", "cat ", "CAT"])
def test_a_class_that_differs_by_case_is_named_with_its_twin(tmp_path, name):
    write_images(tmp_path, {"train/cat": 3, "train/dog": 3, f"test/{name}": 2})
    with pytest.raises(DataError, match=f"{name!r} differs from 'cat' by case or spaces only: name both alike"):
        index_folders(tmp_path)


def test_an_unknown_class_has_a_way_out(tmp_path):
    write_images(tmp_path, {"train/cat": 3, "train/dog": 3, "test/cow": 2})
    with pytest.raises(DataError, match="'cow' .*not in the training split.*into a folder named unlabeled"):
        index_folders(tmp_path)
