"""Folders of images: layouts, splits, and every folder that cannot be trained on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from skipway.data.sources.folders import index_folders
from skipway.data.sources.index import SourceIndex
from skipway.data.sources.readers import FileStore
from skipway.data.sources.splits import looks_like_split, split_in, split_of
from skipway.data.split import Fold, hold_out, list_splits, split_index, take_fold
from skipway.errors import DataError, printable


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


def test_other_files_are_counted(tmp_path):
    touch(tmp_path, *many("cat", 2), *many("dog", 2), "cat/notes.txt", "dog/photo.heic", "dog/LICENSE", "0.png")
    touch(tmp_path, "cat/.DS_Store", "cat/Thumbs.db", ".git/x.png", "__MACOSX/cat/._1.png")
    splits = list_splits(tmp_path)
    assert splits.classes == ("cat", "dog")
    assert splits.left_out.counts == {
        "an empty file": 4,
        "hidden": 1,
        "in hidden folders": 1,
        "in folders that a system made": 1,
        "outside the class folders": 1,
    }


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


WORDS = {
    "train": ("train", "Train", "TRAINING", "training_set", "TrainSet", "train-images", "train2017", "trainval"),
    "validation": ("val", "Val", "valid", "validation", "Validation Set", "val2017", "dev", "dev_set", "validset"),
    "test": (
        "test",
        "Testing",
        "test_set",
        "TestData",
        "testset",
        "test1",
        "eval",
        "Evaluation",
        "hold-out",
        "heldout",
    ),
    None: ("cat", "valley", "contest", "trains", "device", "tester", "protest", "train station", "invalid", "extra"),
}


@pytest.mark.parametrize("split", WORDS)
def test_the_vocabulary(split):
    assert {name: split_of(name) for name in WORDS[split]} == dict.fromkeys(WORDS[split], split)


def test_names_that_sound_like_a_split():
    unclear = ("extra", "unlabeled", "test_a", "train_val", "val-test", "test_dev", "minival")
    assert all(looks_like_split(name) for name in unclear)
    assert not any(looks_like_split(name) for name in ("cat", "train station", "extra virgin", "test", "a"))
    assert [split_in(path) for path in ("val/1.tar", "x-train-1.tar", "a/b.tar")] == ["validation", "train", None]


def test_three_folders(tmp_path):
    touch(tmp_path, *(path for name in ("cat", "dog") for path in many(f"Training/{name}", 4)))
    touch(tmp_path, *(f"{split}/{name}/1.png" for split in ("Valid", "Testing", "extra") for name in ("cat", "dog")))
    splits = list_splits(tmp_path)
    assert not splits.split_off
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [8, 2, 2]
    assert splits.unused == ("'extra': its name is none of train, val, test",)


def test_split_folders_beside_class_folders(tmp_path):
    """`cat/`, `dog/`, `test/cat/`, `test/dog/`: the classes are the training split, and test is no class."""
    touch(tmp_path, *many("cat", 4), *many("dog", 4), "test/cat/1.png", "test/dog/1.png")
    splits = list_splits(tmp_path)
    assert splits.classes == ("cat", "dog")
    assert [sample.file for sample in splits.test] == ["test/cat/1.png", "test/dog/1.png"]


def test_a_folder_in_a_folder_of_the_same_name(tmp_path):
    touch(tmp_path, *many("training_set/training_set/cat", 3), *many("training_set/training_set/dog", 3))
    touch(tmp_path, "test_set/test_set/cat/1.png", "test_set/test_set/dog/1.png")
    splits = list_splits(tmp_path)
    assert splits.classes == ("cat", "dog")
    assert len(splits.test) == 2


def test_trains_are_a_class(tmp_path):
    touch(tmp_path, *many("bus", 3), *many("car", 3), *many("train", 3))
    assert list_splits(tmp_path).classes == ("bus", "car", "train")


@pytest.mark.parametrize("files", [many("test", 5), many("test/test", 5), many("test/unknown", 5)])
@pytest.mark.parametrize("train", ["train/", ""])
def test_an_unlabelled_test_folder_is_named_and_left_alone(tmp_path, files, train):
    touch(tmp_path, *many(f"{train}cat", 5), *many(f"{train}dog", 5), *files)
    index = index_folders(tmp_path)
    (remark,) = index.remarks
    assert remark == (
        "'test' holds 5 images that are not in class folders: it is left alone, and test images are split off the "
        "training split"
    )
    splits = list_splits(tmp_path)
    assert splits.classes == ("cat", "dog")
    assert [sample.file.removeprefix(train)[:4] for sample in splits.test] == ["cat/", "dog/"]
    assert splits.left_out.counts == {"outside the class folders": 5}


def test_the_split_is_stratified_and_hardly_moves(tmp_path):
    """A file that is added to a class moves at most one other file of that class per split, and none of another."""
    files = {"cat": [f"cat/{number}" for number in range(200)], "dog": [f"dog/{number}" for number in range(50)]}

    def split(files):
        train, test = hold_out(files, 0.2, 0)
        train, validation = hold_out(train, 0.1, 0, purpose="validation", least=3)
        return {"train": train, "validation": validation, "test": test}

    before = split(files)
    assert {name: {c: len(f) for c, f in part.items()} for name, part in before.items()} == {
        "train": {"cat": 144, "dog": 36},
        "validation": {"cat": 16, "dog": 4},
        "test": {"cat": 40, "dog": 10},
    }
    after = split({**files, "cat": [*files["cat"], "cat/new"]})
    moved = [
        file for name in ("cat", "dog") for part in before for file in set(before[part][name]) - set(after[part][name])
    ]
    assert len(moved) <= 2
    assert all(file.startswith("cat") for file in moved)


@pytest.mark.parametrize(("images", "expected"), [(2, (1, 0, 1)), (3, (2, 0, 1)), (4, (2, 1, 1)), (10, (7, 1, 2))])
def test_tiny_classes(tmp_path, images, expected):
    """One image of each class is tested; validation gets one only where three or more are left."""
    touch(tmp_path, *many("cat", images), *many("dog", 40))
    splits = list_splits(tmp_path)
    counts = tuple(sum(s.label == 0 for s in part) for part in (splits.train, splits.validation, splits.test))
    assert counts == expected


def test_copies_are_on_one_side_of_every_split():
    files = {"cat": [f"c{number:02d}" for number in range(40)], "dog": [f"d{number:02d}" for number in range(40)]}
    copies = [files["cat"][start : start + 3] for start in range(0, 30, 3)] + [["c39", "d00", "d01"]]
    groups = {file: tuple(group) for group in copies for file in group}

    index = SourceIndex(store=FileStore(Path("x")), name="x", classes=("cat", "dog"), train=files)
    for seed in range(5):
        for fold in (None, Fold(2, 4)):
            splits = split_index(index, holdout=0.25, validation=0.2, seed=seed, fold=fold, groups=groups)
            side = {s.file: name for name in ("train", "validation", "test") for s in getattr(splits, name)}
            assert len(side) == 80
            assert all(len({side[file] for file in group}) == 1 for group in copies)
            assert {s.label for s in splits.validation} == {0, 1}
    # nor does a copy of an image of the source's own test split become a validation image
    index = SourceIndex(store=FileStore(Path("x")), name="x", classes=("cat", "dog"), train=files, test={"cat": ["t"]})
    for seed in range(5):
        twins = dict.fromkeys((*files["cat"][:20], "t"), (*files["cat"][:20], "t"))
        splits = split_index(index, holdout=0.2, validation=0.4, seed=seed, groups=twins)
        assert {sample.file for sample in splits.validation}.isdisjoint(files["cat"][:20])


def test_folds_say_that_a_test_split_is_left_alone():
    files = {name: [f"{name}/{number}" for number in range(6)] for name in ("cat", "dog")}
    index = SourceIndex(store=FileStore(Path("x")), name="x", classes=("cat", "dog"), train=files, test={"cat": ["t"]})
    choices = {"holdout": 0.25, "validation": 0.2, "seed": 0}
    words = "1 image of the test split: every fold tests on training images"
    assert split_index(index, **choices, fold=Fold(1, 3)).unused == (words,)
    assert split_index(index, **choices).unused == ()
    assert split_index(replace(index, test=None), **choices, fold=Fold(1, 3)).unused == ()


def test_folds_are_disjoint_even_and_hardly_move():
    files = {str(label): [f"{label}/{number}" for number in range(7 + label)] for label in range(20)}
    tests = [take_fold(files, Fold(number, 5), seed=3)[1] for number in range(1, 6)]
    together = sorted(file for test in tests for members in test.values() for file in members)
    assert together == sorted(file for members in files.values() for file in members)
    for name, members in files.items():
        assert all(len(members) // 5 <= len(test[name]) <= len(members) // 5 + 1 for test in tests)
    sizes = [sum(map(len, test.values())) for test in tests]
    assert max(sizes) < 1.2 * min(sizes)
    wider = {**files, "0": [*files["0"], "0/new"]}
    for number, before in enumerate(tests, 1):
        after = take_fold(wider, Fold(number, 5), seed=3)[1]
        assert len(set(before["0"]) - set(after["0"])) <= 1
        assert all(before[name] == after[name] for name in list(files)[1:])


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
    "extra beside classes": (
        [*many("cat", 5), *many("dog", 5), *many("extra/cat", 2)],
        "'extra' in .* sounds like a split, not like a class: name it train, val or test",
    ),
    "no training folder": ([*many("test/cat", 2), *many("val/cat", 2)], "has 'test', 'val'.* but no training folder"),
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
