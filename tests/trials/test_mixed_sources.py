"""Kind: a folder that holds more than one kind of source is read as one of them, and the others are named.

| trial | input | right value |
|---|---|---|
| | class folders beside the tar file that they were unpacked from | class folders; the tar file is left out, named |
| | the same with the tar file in train/ | the same |
| | a folder of tar shards alone, beside a README | shards |
| | images in one folder beside a list with their labels | refused, with the list to give instead |
| | tar members known by content: .jfif, no suffix, upper case; texts and heic beside them | read; named |
| | `evaluate` on one class alone, on test/ alone | evaluates; names the folder |
| | `evaluate` on val/ and test/ alone | the test split, and it is said |
| | `evaluate` on a folder with several splits | says which split, and how many images it leaves |
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from tests.trials.pictures import encoded, write_images

from skipway.cli import main
from skipway.data import load
from skipway.data.sources.detect import index_source
from skipway.data.sources.readers import ShardStore
from skipway.errors import DataError


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


ANIMALS = {
    f"{name}/{number}.png": encoded(number + 9 * (name == "cat")) for name in ("emu", "gnu") for number in range(3)
}


@pytest.mark.parametrize("place", ["", "train/"])
def test_an_archive_beside_its_images_is_left_out(tmp_path, place):
    folder = write_images(tmp_path, {f"{place}cat": 4, f"{place}dog": 4})
    write_tar(folder / f"{place}original.tar", ANIMALS)
    data = load(folder)
    assert data.classes == ("cat", "dog")
    assert data.splits.left_out.counts == {"not an image but an archive": 1}


def test_shards_alone_are_shards(tmp_path):
    write_tar(tmp_path / "000.tar", ANIMALS)
    (tmp_path / "README.md").write_text("shards")
    (tmp_path / "preview.png").write_bytes(encoded(1))
    index = index_source(tmp_path)
    assert isinstance(index.store, ShardStore)
    assert index.classes == ("emu", "gnu")


@pytest.mark.parametrize("name", ["labels.csv", "train.tsv", "list.parquet"])
def test_a_list_beside_loose_images_is_suggested(tmp_path, name):
    write_images(tmp_path, {"images": 4})
    (tmp_path / name).write_text("image,label\nimages/000.png,cat\n")
    with pytest.raises(DataError, match=f"if '{name}' lists the images, give the list instead of the folder"):
        load(tmp_path)


def test_members_of_shards_are_known_by_their_content(tmp_path):
    members = {
        "cat/0.jfif": encoded(0, "JPEG"),
        "cat/1": encoded(1),
        "cat/2.PNG": encoded(2),
        "dog/0.JPG": encoded(3, "JPEG"),
        "dog/1.dat": encoded(4, "WEBP"),
        "dog/2.png": encoded(5),
        "dog/notes.txt": b"notes",
        "dog/x.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "dog/.hidden.png": encoded(6),
    }
    data = load(write_tar(tmp_path / "x.tar", members), most_unreadable=0.5)
    assert sorted(sample.file for sample in data.splits.samples) == [
        *(f"x.tar/cat/{name}" for name in ("0.jfif", "1", "2.PNG")),
        *(f"x.tar/dog/{name}" for name in ("0.JPG", "1.dat", "2.png")),
    ]
    assert data.inventory.total == len(members)
    said = " ".join(data.remarks)
    assert "not an image but text: 'x.tar/dog/notes.txt'" in said
    assert "a HEIC image" in said
    assert "hidden: 'x.tar/dog/.hidden.png'" in said


def test_evaluation_says_which_split_it_took(tmp_path, capsys):
    folder = write_images(
        tmp_path / "d", {f"{split}/{name}": 4 for split in ("train", "test") for name in ("cat", "dog")}
    )
    small = ("--epochs", "1", "--model", "resnet8", "--width", "4", "--workers", "0", "--device", "cpu")
    assert main(["train", str(folder), "--out", str(tmp_path / "run"), "--quiet", *small]) == 0
    assert main(["evaluate", str(tmp_path / "run"), str(folder), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "d, test split: 8 images" in said
    assert "the test split is evaluated, not the 8 images of other splits" in said


def test_evaluation_needs_no_training_images(tmp_path, capsys):
    folder = write_images(tmp_path / "d", {"cat": 4, "dog": 4})
    small = ("--epochs", "1", "--model", "resnet8", "--width", "4", "--workers", "0", "--device", "cpu")
    run = str(tmp_path / "run")
    assert main(["train", str(folder), "--out", run, "--quiet", *small]) == 0
    assert main(["evaluate", run, str(write_images(tmp_path / "one", {"dog": 3})), "--device", "cpu"]) == 0
    assert "no image of class 'cat'" in capsys.readouterr().out
    both = write_images(tmp_path / "both", {"test/cat": 2, "test/dog": 2})
    assert main(["evaluate", run, str(both), "--device", "cpu"]) == 0
    assert "the class folders are taken from 'test'" in capsys.readouterr().out
    write_images(both, {"val/cat": 2, "val/dog": 2})
    assert main(["evaluate", run, str(both), "--device", "cpu"]) == 0
    assert "the test split is evaluated, not the 4 images of other splits" in capsys.readouterr().out
