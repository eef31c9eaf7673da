"""Kind: links below a folder of images are followed within limits, or named with the option that follows them.

| trial | input | right value |
|---|---|---|
| B2 | class folders that are links out of the folder | refused with the links and the option; read with `outside` |
| B2 | single files that are links out of the folder | the same |
| | one class linked, one not | named; with `outside` both are read |
| | links within the folder, relative and absolute | read |
| | a root that is a link | read |
| | a linked folder within a class folder | read |
| | links to files that are gone, with an image suffix and without | damaged, with the reason; left out |
| | a link to itself, links to each other | damaged, with the reason |
| | a link to a folder that contains it | left out |
| | folders that all link to each other | ends; every file that is not reached is counted |
| | `predict`, `evaluate`, `diagnose --batch` on a folder of links | as `train` |
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.trials.pictures import write_images

from skipway.cli import main
from skipway.data import load
from skipway.data.sources.folders import index_folders
from skipway.data.sources.scan import MAX_LINKS
from skipway.errors import DataError
from skipway.inference.predict import image_files

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
CLASSES = {"cat": 5, "dog": 5}
OUT = "a link out of the folder, which outside=True follows"


def linked_folders(root: Path) -> Path:
    store = write_images(root / "store", CLASSES)
    (root / "d").mkdir()
    for name in CLASSES:
        (root / "d" / name).symlink_to(store / name)
    return root / "d"


def linked_files(root: Path) -> Path:
    store = write_images(root / "store", CLASSES)
    for name in CLASSES:
        (root / "d" / name).mkdir(parents=True)
        for file in (store / name).iterdir():
            (root / "d" / name / file.name).symlink_to(file)
    return root / "d"


def linked_without_suffix(root: Path) -> Path:
    """As content-addressed stores of git-annex and DVC have them."""
    store = write_images(root / "store", CLASSES, suffix="")
    for name in CLASSES:
        (root / "d" / name).mkdir(parents=True)
        for file in (store / name).iterdir():
            (root / "d" / name / f"{file.name}.png").symlink_to(os.path.relpath(file, root / "d" / name))
    return root / "d"


OUTSIDE = [linked_folders, linked_files, linked_without_suffix]


@pytest.mark.parametrize("make", OUTSIDE)
def test_links_out_of_the_folder_are_named_with_the_option_or_followed(tmp_path, make, capsys):
    folder = make(tmp_path)
    links = 2 if make is linked_folders else 10
    with pytest.raises(DataError, match=f"no images in .*; {links} files left out, {OUT}: 'cat"):
        load(folder)
    data = load(folder, outside=True)
    assert (data.classes, len(data.splits.samples)) == (("cat", "dog"), 10)
    assert main(["train", str(folder), "--out", str(tmp_path / "run")]) == 3
    assert "a link out of the folder, which --outside follows" in capsys.readouterr().err


def test_train_evaluate_and_predict_follow_links_by_an_option(tmp_path, capsys):
    folder, run = linked_folders(tmp_path), str(tmp_path / "run")
    small = ("--model", "resnet8", "--width", "4", "--epochs", "1", "--workers", "0")
    assert main(["train", str(folder), "--outside", "--out", run, "--quiet", "--device", "cpu", *small]) == 0
    assert main(["evaluate", run, "--device", "cpu"]) == 0
    assert main(["evaluate", run, str(folder), "--device", "cpu"]) == 3
    assert main(["evaluate", run, str(folder), "--outside", "--device", "cpu"]) == 0
    assert "d: 10 images" in capsys.readouterr().out
    assert main(["predict", run, str(folder)]) == 3
    assert "--outside follows" in capsys.readouterr().err
    assert main(["predict", run, str(folder), "--outside"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_one_linked_class_beside_others_is_named(tmp_path):
    store, folder = write_images(tmp_path / "store", {"emu": 5}), write_images(tmp_path / "d", CLASSES)
    (folder / "emu").symlink_to(store / "emu")
    assert any(OUT in remark and "'emu'" in remark for remark in load(folder).remarks)
    assert load(folder, outside=True).classes == ("cat", "dog", "emu")


def test_links_within_the_folder_are_read(tmp_path):
    folder = write_images(tmp_path / "d", {"train/cat": 4, "train/dog": 4, "store/1": 2, "store/2": 2})
    (folder / "test").mkdir()
    (folder / "test/cat").symlink_to("../store/1")
    (folder / "test/dog").symlink_to(folder / "store/2")
    (folder / "train/cat/more").symlink_to("../../store/1")
    (folder / "train/dog/009.png").symlink_to("000.png")
    index = index_folders(folder)
    assert index.test is not None
    assert {name: len(files) for name, files in index.test.items()} == {"cat": 2, "dog": 2}
    assert {name: len(files) for name, files in index.train.items()} == {"cat": 6, "dog": 5}


def test_a_root_that_is_a_link(tmp_path):
    (tmp_path / "link").symlink_to(write_images(tmp_path / "d", CLASSES))
    assert not index_folders(tmp_path / "link").left_out
    assert len(load(tmp_path / "link").splits.samples) == 10


def test_broken_links_and_circles_have_a_reason(tmp_path):
    folder = write_images(tmp_path / "d", CLASSES)
    (folder / "cat/gone.png").symlink_to(folder / "nowhere.png")
    (folder / "cat/itself.jpg").symlink_to("itself.jpg")
    (folder / "cat/left.png").symlink_to("right.png")
    (folder / "cat/right.png").symlink_to("left.png")
    (folder / "cat/gone").symlink_to("nowhere")
    data = load(folder, most_unreadable=0.5)
    assert dict(data.unreadable) == {
        "cat/gone.png": "no such file behind this link",
        **dict.fromkeys(("cat/itself.jpg", "cat/left.png", "cat/right.png"), "too many levels of symbolic links"),
    }
    assert data.splits.left_out.counts == {"a broken link": 1}


def test_a_link_to_a_folder_that_contains_it_is_left_out(tmp_path):
    folder = write_images(tmp_path / "d", {"cat/a": 3, "dog": 3})
    (folder / "cat/a/up").symlink_to("..")
    (folder / "dog/root").symlink_to(folder)
    (folder / "dog/self").symlink_to(".")
    index = index_folders(folder)
    assert index.left_out.counts == {"a link to a folder that contains it": 3}
    assert index.inventory.total == 9


def test_folders_that_all_link_to_each_other_end(tmp_path):
    count = 6
    folder = write_images(tmp_path / "d", {f"class{number}": 1 for number in range(count)})
    for a in range(count):
        for b in range(count):
            if a != b:
                (folder / f"class{a}" / f"to{b}").symlink_to(f"../class{b}")
    index = index_folders(folder)
    # a class reaches all others by one link, and by each of those all but itself by a second one
    assert MAX_LINKS == 2
    others = count - 1
    ways = 1 + others + others * (others - 1)
    assert {len(files) for files in index.train.values()} == {ways}
    # of a way's links, one comes back to each folder that it passed, and those of the last are not followed any more
    circles = others + 2 * others * (others - 1)
    assert index.left_out.counts == {
        "a link to a folder that contains it": count * circles,
        "a link to a folder behind 2 others": count * others * (others - 1) * (others - 2),
    }


def test_prediction_takes_files_behind_links(tmp_path):
    folder = write_images(tmp_path / "d", CLASSES)
    (folder / "more").symlink_to("cat")
    (folder / "out").symlink_to(write_images(tmp_path / "store", {"emu": 3}) / "emu")
    files, left_out = image_files([folder])
    assert (len(files), dict(left_out.counts)) == (15, {OUT: 1})
    assert len(image_files([folder], outside=True)[0]) == 18


def test_diagnosis_follows_links_by_the_same_option(tmp_path, capsys):
    folder = linked_folders(tmp_path)
    write_images(tmp_path / "store", {"cat": 20})
    (tmp_path / "store/cat/000.png").write_bytes(b"<html>")
    command = ["diagnose", "resnet20", "--input", "3,8,8", "--batch", str(folder), "--samples", "30", "--device", "cpu"]
    assert main(command) == 3
    assert "a link out of the folder, which --outside follows" in capsys.readouterr().err
    assert main([*command, "--outside"]) in (0, 1, 4)
    said = capsys.readouterr().out
    assert "with their labels" in said
    assert "cat/000.png cannot be read, not an image but HTML" in said or "20 images of" in said
