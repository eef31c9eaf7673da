"""Folders of images: layouts, splits, and every folder that cannot be trained on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from skipway.data.split import hold_out, list_splits, printable
from skipway.errors import DataError


def touch(root: Path, *files: str) -> Path:
    """Empty files: splits opens none of them."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def many(folder: str, count: int) -> list[str]:
    return [f"{folder}/{number:03d}.png" for number in range(count)]


@pytest.mark.parametrize("train_name", ["train", "Training", "TRAIN_SET", "train2017"])
@pytest.mark.parametrize("test_name", ["test", "Testing", "test-images", "TestData"])
def test_train_and_test_folders(tmp_path, train_name, test_name):
    touch(
        tmp_path,
        *many(f"{train_name}/dog", 3),
        *many(f"{train_name}/cat", 2),
        *many(f"{test_name}/cat", 1),
        *many(f"{test_name}/dog", 1),
    )
    splits = list_splits(tmp_path)
    assert splits.classes == ("cat", "dog")
    assert splits.split_off == {"validation": 0.1}
    assert sorted(sample.label for sample in splits.train + splits.validation) == [0, 0, 1, 1, 1]
    assert [sample.file for sample in splits.test] == [f"{test_name}/cat/000.png", f"{test_name}/dog/000.png"]


def test_class_folders_are_split_class_by_class(tmp_path):
    touch(tmp_path, *many("cat", 10), *many("dog", 25), *many("emu", 2))
    splits = list_splits(tmp_path, holdout=0.2)
    counts = [sum(sample.label == label for sample in splits.test) for label in range(3)]
    assert counts == [2, 5, 1]
    counts = [sum(sample.label == label for sample in splits.validation) for label in range(3)]
    assert counts == [1, 2, 0]
    assert len({sample.file for sample in splits.samples}) == len(splits.samples) == 37


def test_a_train_folder_alone_is_split(tmp_path):
    touch(tmp_path, *many("train/cat", 10), *many("train/dog", 10))
    assert len(list_splits(tmp_path, holdout=0.3).test) == 6


def test_the_split_is_a_function_of_the_seed(tmp_path):
    touch(tmp_path, *many("cat", 50), *many("dog", 50))
    first, again, other = (list_splits(tmp_path, seed=seed) for seed in (1, 1, 2))
    assert first.test == again.test
    assert first.fingerprint == again.fingerprint
    assert first.test != other.test


def test_an_added_file_moves_at_most_one_other():
    before = {"cat": [f"{number}" for number in range(50)], "dog": ["x", "y"]}
    _, test = hold_out(before, 0.2, seed=0)
    _, wider = hold_out({**before, "cat": [*before["cat"], "new"]}, 0.2, seed=0)
    assert len(set(test["cat"]) - set(wider["cat"])) <= 1
    assert wider["dog"] == test["dog"]


def test_images_below_subfolders_of_a_class_belong_to_it(tmp_path):
    touch(tmp_path, "cat/a/b/1.jpg", "cat/2.JPEG", "dog/1.webp", "dog/2.tif")
    splits = list_splits(tmp_path)
    assert len(splits.samples) == 4


def test_other_files_are_counted_and_hidden_ones_are_not(tmp_path):
    touch(tmp_path, *many("cat", 2), *many("dog", 2), "cat/notes.txt", "dog/photo.heic", "dog/LICENSE", "labels.csv")
    touch(tmp_path, "cat/.DS_Store", "cat/Thumbs.db", ".git/x.png", "__MACOSX/cat/._1.png")
    splits = list_splits(tmp_path)
    assert splits.classes == ("cat", "dog")
    assert dict(splits.ignored) == {".txt": 1, ".heic": 1, "no suffix": 1, ".csv outside the class folders": 1}


def test_linked_folders_are_not_entered(tmp_path):
    touch(tmp_path, *many("cat", 2), *many("dog", 2))
    (tmp_path / "cat" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(list_splits(tmp_path).samples) == 4


@pytest.mark.parametrize("name", ["Ærø", "two words", "new\nline", "\x1b[31mred", "日本"])
def test_class_names_of_any_kind(tmp_path, name):
    touch(tmp_path, *many(name, 2), *many("plain", 2))
    assert set(list_splits(tmp_path).classes) == {name, "plain"}
    assert printable(name).isprintable()


@pytest.mark.skipif(os.name == "nt", reason="file names are Unicode there")
def test_names_that_are_not_unicode(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        os.makedirs(folder)
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    for number in (b"1", b"2"):
        open(folder + b"/" + number + b".png", "w").close()
    touch(tmp_path, *many("dog", 2))
    splits = list_splits(tmp_path)
    assert len(splits.fingerprint) == 16
    assert printable(splits.classes[0]).isprintable()


def test_the_fingerprint_follows_the_files(tmp_path):
    touch(tmp_path, *many("cat", 4), *many("dog", 4))
    before = list_splits(tmp_path).fingerprint
    (tmp_path / "cat/000.png").rename(tmp_path / "cat/900.png")
    assert list_splits(tmp_path).fingerprint != before


BAD = {
    "empty": ([], "no images"),
    "files without classes": (["1.png", "2.png"], "no images"),
    "one class": (many("cat", 5), "only one class, 'cat'"),
    "an empty class": ([*many("cat", 5), "dog/readme.txt"], "class folder 'dog'"),
    "a class of one": ([*many("cat", 5), "dog/1.png"], "class 'dog' has a single image"),
    "a test class without training": (
        [*many("train/cat", 2), *many("train/dog", 2), *many("test/cow", 1)],
        "class 'cow' in .*test is not in the training split, which has 'cat', 'dog'",
    ),
    "an empty test folder": ([*many("train/cat", 2), *many("train/dog", 2), "test/cat/x.txt"], "no images in .*test"),
    "one training class": ([*many("train/cat", 2), *many("test/cat", 2)], "only one class"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_cannot_be_trained_on_is_named(tmp_path, name):
    files, message = BAD[name]
    touch(tmp_path, *files)
    with pytest.raises(DataError, match=message):
        list_splits(tmp_path)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        list_splits(tmp_path / "nowhere")
    (tmp_path / "photos.zip").touch()
    with pytest.raises(DataError, match="is a file; unpack it"):
        list_splits(tmp_path / "photos.zip")
