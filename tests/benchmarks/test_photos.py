"""`benchmarks.photos`: its folders, and how accuracies are read and timed. Nothing here asserts on a time."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace

import pytest
import torch
from PIL import Image

from benchmarks.photos.contestants import Contestant, read_accuracy
from benchmarks.photos.folders import PHOTO_SIZE, write_photos, write_subsets
from benchmarks.photos.race import Row, add_rows, read_rows, run
from benchmarks.photos.summary import results_of, table_lines, verdict_line
from skipway.cli.progress import epoch_line
from skipway.inference.evaluation import Evaluation
from skipway.report.summary import accuracy_text

ROW = Row(200, "skipway", "--time 1m", 0, "test", 50.0, 90.0, 0.8)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "images.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for part, label, number in ((p, c, n) for p in ("train", "test") for c in ("cat", "dog") for n in range(6)):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (40 * number, 99, len(part))).save(file, "JPEG")
            member = tarfile.TarInfo(f"{part}/{label}/{number}.jpg")
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)
    return path


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))


def test_subsets_are_stratified_and_share_their_test_images(archive, tmp_path):
    write_subsets(archive, tmp_path, sizes=(4, 7), test=4, seed=0)
    assert [len(names(tmp_path / size / "train" / label)) for size in "47" for label in ("cat", "dog")] == [2, 2, 4, 3]
    assert names(tmp_path / "4" / "test") == names(tmp_path / "7" / "test")
    write_subsets(archive, tmp_path / "other", sizes=(4,), test=4, seed=1)
    assert names(tmp_path / "other" / "4") != names(tmp_path / "4")


def test_photos_have_the_size_of_photos(archive, tmp_path):
    write_photos(archive, tmp_path, count=3)
    assert len(names(tmp_path)) == 3
    for name in names(tmp_path):
        with Image.open(tmp_path / name) as image:
            assert image.size == PHOTO_SIZE
            assert image.format == "JPEG"


def test_what_skipway_prints_is_read():
    row = {
        "epoch": 2,
        "train_loss": 0.5,
        "train_accuracy": 0.9,
        "validation_loss": 0.7,
        "validation_accuracy": 0.825,
        "images_per_second": 100.0,
        "seconds": 3.0,
    }
    assert read_accuracy(epoch_line(row, 12)) == ("validation", 0.825)
    evaluation = Evaluation(loss=0.5, confusion=torch.tensor([[700, 100], [100, 100]]))
    assert read_accuracy("accuracy  " + accuracy_text(evaluation)) == ("test", 0.8)
    assert read_accuracy("note      nothing of that kind") is None


def test_a_run_is_timed_and_a_failed_one_refused(tmp_path):
    lines = """print('hello'); print('{"validation": 0.5}'); print('{"test": 0.75}')"""
    rows = run(Contestant("name", "setting", ("-c", lines)), 200, 0, {}, tmp_path / "log")
    assert [(row.part, row.accuracy) for row in rows] == [("validation", 0.5), ("test", 0.75)]
    assert 0 < rows[0].wall <= rows[1].wall
    assert rows[1].processor > 0
    add_rows(tmp_path / "table.csv", rows[:1])
    add_rows(tmp_path / "table.csv", rows[1:])
    assert read_rows(tmp_path / "table.csv") == rows
    for failing in ("print('{\"validation\": 0.5}')", lines + "; raise SystemExit(3)"):
        with pytest.raises(SystemExit, match="name, setting: failed"):
            run(Contestant("name", "setting", ("-c", failing)), 200, 0, {}, tmp_path / "log")


def test_the_verdict_compares_with_the_most_accurate_peer():
    peers = [
        replace(ROW, name="timm", setting="3 epochs", wall=100.0, accuracy=0.75),
        replace(ROW, name="fastai", setting="1 epochs", wall=60.0, accuracy=0.7),
    ]
    [results] = results_of([ROW, replace(ROW, setting="--time 30s", wall=30.0, accuracy=0.74), *peers]).values()
    assert verdict_line(results) == (
        "The best peer, timm with 3 epochs, has 75.0 % after 100 s; ours has 80.0 % after 50 s (--time 1m): 0.50 of "
        "the time."
    )
    [slower] = results_of([replace(ROW, accuracy=0.74), *peers]).values()
    assert "does not reach that: 74.0 % after 50 s" in verdict_line(slower)
    assert len(table_lines(results)) == 2 + 4
