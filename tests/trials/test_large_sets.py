"""Kind: many classes or many images take memory and time in proportion to the images; what was read is not lost.

| trial | input | right value |
|---|---|---|
| | 3,000 class folders | indexed and split; every image counted |
| | an evaluation of 200,000 classes | the counts of the images; a dense matrix would take 320 GB |
| | the scores of many classes | those of the dense matrix |
| | thousands of classes with one image each | refused with how many, and the way out |
| | one class of one image among others | refused by name |
| | the inspection of many images, interrupted | what was inspected is kept, and is not read again |
| | the same with another limit of pixels | inspected again |
| | a sample of a large set | so many are inspected, said; of the others, the next of its class replaces a damaged one |
| | the reading of many images | shows how long it will take |
"""

from __future__ import annotations

import io
from itertools import chain

import pytest
import torch
from rich.console import Console
from tests.trials.pictures import write_images
from torch import nn

from skipway.cli.progress import LineReporter
from skipway.data import Batch, load
from skipway.data.decode import UnreadableImage
from skipway.data.inspection import InspectTask
from skipway.data.split import list_splits
from skipway.errors import DataError
from skipway.inference.evaluation import Evaluation, confusion_of, evaluate
from skipway.inference.metrics import class_scores, confused_pairs

LARGE = {"size": 32, "crop": "resized", "workers": 0}


def empty_files(root, classes: int, each: int):
    for number in range(classes):
        folder = root / f"{number:05d}"
        folder.mkdir()
        for image in range(each):
            (folder / f"{image}.png").touch()
    return root


def test_thousands_of_class_folders(tmp_path):
    splits = list_splits(empty_files(tmp_path, 3_000, 2))
    assert len(splits.classes) == len(splits.test) == len(splits.train) == 3_000


def test_an_evaluation_takes_memory_for_its_images():
    classes, images = 200_000, 64

    class Shifted(nn.Module):
        """Takes every image for the class after its own, the first eight for their own."""

        def forward(self, x):
            taken = x[:, 0].long() + (torch.arange(len(x)) >= 8)
            return torch.zeros(len(x), classes).scatter_(1, taken[:, None] % classes, 9.0)

    labels = torch.arange(images) * 3000
    batch = Batch(labels[:, None].double(), labels, labels, torch.arange(images))
    found = evaluate(Shifted(), [batch], classes=classes, autocast=torch.no_grad)
    assert found is not None
    assert found.confusion.is_sparse
    assert (found.total, found.correct, found.accuracy) == (64, 8, 8 / 64)
    assert found.worst_class() == (8 * 3000, 0.0, 1)
    assert found.top_confusion() == (8 * 3000, 8 * 3000 + 1, 1)
    assert len(confused_pairs(found.confusion, 1000)) == 56


def test_sparse_and_dense_matrices_have_the_same_scores(monkeypatch):
    labels, taken = torch.randint(0, 30, (500,)), torch.randint(0, 30, (500,))
    dense = confusion_of(labels * 40 + taken, 40)
    monkeypatch.setattr("skipway.inference.evaluation.MAX_DENSE_CLASSES", 10)
    sparse = confusion_of(labels * 40 + taken, 40)
    assert not dense.is_sparse
    assert torch.equal(sparse.to_dense(), dense)
    for one, other in zip(vars(class_scores(dense)).values(), vars(class_scores(sparse)).values(), strict=True):
        assert torch.equal(one, other)
    assert class_scores(dense).recall[:30].tolist() == pytest.approx((dense.diagonal() / dense.sum(1))[:30].tolist())
    assert confused_pairs(dense, 9) == confused_pairs(sparse, 9)
    assert Evaluation(0.0, dense).worst_class() == Evaluation(0.0, sparse).worst_class()


def test_classes_of_one_image_are_counted(tmp_path):
    message = "class '00000' has a single image, as 50 of 50 classes do, and two are needed.*in a folder named test"
    with pytest.raises(DataError, match=message):
        list_splits(empty_files(tmp_path, 50, 1))
    with pytest.raises(DataError, match="class 'dog' has a single image and two are needed"):
        load(write_images(tmp_path / "few", {"cat": 3, "dog": 1}))


def test_one_image_per_class_can_be_tested_on_others(tmp_path):
    data = load(write_images(tmp_path, {"train/cat": 1, "train/dog": 1, "test/cat": 2, "test/dog": 2}))
    assert (len(data.train), len(data.validation), len(data.test)) == (2, 0, 4)


class Inspections:
    """Counts the images that are inspected, and interrupts at one of them."""

    def __init__(self, monkeypatch, stop: int | None = None) -> None:
        self.count = 0
        own = InspectTask.__call__

        def call(task, index, row):
            self.count += 1
            if self.count == stop:
                raise KeyboardInterrupt
            return own(task, index, row)

        monkeypatch.setattr(InspectTask, "__call__", call)


def test_an_interrupted_inspection_goes_on(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "d", {"cat": 20, "dog": 20})
    options = {**LARGE, "cache": tmp_path / "cache"}
    monkeypatch.setattr("skipway.data.image_dataset.CHUNK", 8)
    with monkeypatch.context() as patch:
        Inspections(patch, stop=30)
        with pytest.raises(KeyboardInterrupt):
            load(folder, **options)
    with monkeypatch.context() as patch:
        rest = Inspections(patch)
        assert len(load(folder, **options).splits.samples) == 40
        assert rest.count == 40 - 24
    with monkeypatch.context() as patch:
        none = Inspections(patch)
        load(folder, **options)
        assert none.count == 0
        load(folder, **options, max_megapixels=10)
        assert none.count == 40


def test_a_killed_inspection_loses_little(tmp_path, monkeypatch):
    """Saved as it goes: what a `save` wrote before is there without the end of the reading."""
    folder = write_images(tmp_path / "d", {"cat": 20, "dog": 20})
    monkeypatch.setattr("skipway.data.image_dataset.CHUNK", 8)
    monkeypatch.setattr("skipway.data.source_reader.SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr("skipway.data.source_reader.SAVE_SHARE", 1e9)
    sizes = []

    def progress(done, total):
        files = list((tmp_path / "cache").glob("index-*.json"))
        sizes.append(files[0].stat().st_size if files else 0)

    load(folder, **LARGE, cache=tmp_path / "cache", progress=progress)
    assert sizes[-1] > sizes[0] > 0


def test_a_sample_is_inspected_and_the_rest_is_read_in_training(tmp_path, monkeypatch):
    folder = write_images(tmp_path, {"cat": 30, "dog": 30})
    (folder / "cat/004.png").write_bytes(b"<html>")
    counted = Inspections(monkeypatch)
    data = load(folder, **LARGE, inspect=12, cache=False)
    assert counted.count == 12
    assert data.unreadable == ()
    assert any(remark.startswith("12 of 60 images were inspected") for remark in data.remarks)
    assert len(data.splits.samples) == 60
    cpu = torch.device("cpu")
    parts = [data.evaluation_batches(split, batch_size=99, device=cpu) for split in ("test", "validation")]
    parts.append(data.train_batches(seed=0, epoch=0, batch_size=len(data.train), device=cpu))
    said = []
    data.train.pool.remark = said.append
    batches = list(chain(*parts))
    assert sum(len(batch.numbers) for batch in batches) == 60
    assert len(said) == 1
    assert "cat/004.png: not an image but HTML; cat/0" in said[0]
    split = next(each for each in (data.train, data.validation, data.test) if "cat/004.png" in each.names)
    place = list(split.names).index("cat/004.png")
    other = list(split.names).index(said[0].split("; ")[1].split(" takes")[0])
    (images,) = split.fetch([torch.tensor([place, other])], cpu, None)
    assert torch.equal(images[0], images[1])
    assert split.labels[place] == split.labels[other]
    for choices in ({"unreadable": "stop"}, {"most_unreadable": 0.0}):
        strict = load(folder, **LARGE, inspect=12, cache=False, **choices)
        parts = [strict.evaluation_batches(part, batch_size=99, device=cpu) for part in ("train", "test", "validation")]
        with pytest.raises(UnreadableImage, match=r"cat/004\.png: not inspected before training: not an image"):
            list(chain(*parts))
    (folder / "cat/000.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match="1 of 60 images|1 of 12 images"):
        load(folder, **LARGE, inspect=12, cache=False, most_unreadable=0.0)
    cached = load(folder, **LARGE, inspect=12, cache=tmp_path / "cached", most_unreadable=0.1)
    assert any("inspect=12 has no effect" in remark for remark in cached.remarks)
    assert [file for file, _ in cached.unreadable] == ["cat/000.png", "cat/004.png"]


def test_the_reading_shows_how_long_it_takes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("skipway.cli.progress.time.monotonic", lambda: now[0])
    out = io.StringIO()
    reporter = LineReporter(Console(file=out, width=200))
    reporter.activity("reading", 0, 10_000)
    for done in (1_000, 2_000, 4_000):
        now[0] += 31
        reporter.activity("reading", done, 10_000)
    first, second, third = out.getvalue().splitlines()
    assert first.endswith("1,000 of 10,000 images, 4 min 39 s left")
    assert second.endswith("2,000 of 10,000 images, 4 min 08 s left")
    assert third.endswith("4,000 of 10,000 images, 2 min 19 s left")
