"""Validation chooses and the test split measures: each on images that nothing else has seen."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from skipway.checkpoint.files import read_tensors, write_tensors
from skipway.data.dataset import Data
from skipway.data.image_dataset import MemoryDataset
from skipway.errors import SkipwayError
from skipway.inference.evaluation import Evaluation
from skipway.inference.publish import write_hub_folder
from skipway.inference.run_evaluation import evaluate_run
from skipway.recipe import Recipe
from skipway.training.image_task import ImageClassification
from skipway.training.loop import Trainer, train
from skipway.training.reporter import SilentReporter
from skipway.training.run import Progress

TINY = Recipe(depth=8, width=4, epochs=6, batch_size=16, device="cpu", precision="float32", health=0.0)


def pictures(root: Path, each: int = 24, swapped: tuple[str, ...] = (), contrast: int = 150) -> Path:
    """Dark and light images in train, val and test; in `swapped` splits the light ones are called dark."""
    noise = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label, name in enumerate(("dark", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            light = label != (split in swapped)
            for number in range(each):
                pixels = noise.integers(0, 100, (8, 8, 3), dtype=np.uint8) + np.uint8(contrast * light)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def misled(tmp_path_factory):
    """A run whose validation images carry the wrong labels, so that learning looks like getting worse."""
    root = tmp_path_factory.mktemp("misled")
    data = pictures(root / "data", swapped=("val",), contrast=12)
    return train(dataclasses.replace(TINY, data=data, warmup=0.5, lr=0.05, crop="none"), root / "run")


def test_the_best_epoch_follows_validation_and_not_the_test_split(misled):
    rows = misled.folder.read_metrics()
    accuracies = [row["validation_accuracy"] for row in rows]
    assert accuracies[-1] < max(accuracies), "the network learns, and validation punishes it"
    assert misled.best_epoch == 1 + accuracies.index(max(accuracies))
    assert misled.best_accuracy == max(accuracies)
    tensors, about = read_tensors(misled.folder.best)
    assert about["epoch"] == misled.best_epoch
    best, last = (
        evaluate_run(misled.folder.path / name).evaluation for name in ("best.safetensors", "last.safetensors")
    )
    assert misled.evaluation.accuracy == best.accuracy < last.accuracy
    assert not torch.equal(tensors["stem.conv.weight"], read_tensors(misled.folder.last)[0]["stem.conv.weight"])


def test_at_equal_accuracy_the_lower_loss_is_better():
    """Nine validation images tell few epochs apart; a loss that is not a number is never better."""
    progress = Progress()
    confusion = torch.tensor([[3, 0], [1, 2]])
    results = [Evaluation(loss=loss, confusion=confusion) for loss in (1.2, 0.9, 1.0, math.nan)]
    kept = []
    for epoch, result in enumerate(results, start=1):
        if ImageClassification().is_better(result, progress):
            progress.best_accuracy, progress.best_loss = result.accuracy, result.loss
            kept.append(epoch)
    assert kept == [1, 2]
    assert not ImageClassification().is_better(Evaluation(loss=0.1, confusion=torch.tensor([[2, 1], [1, 2]])), progress)


def test_the_same_result_everywhere(misled, tmp_path):
    """Summary, header of the weights, report, hub card and `skipway evaluate` speak of the same weights."""
    summary = json.loads(misled.folder.summary.read_text())
    assert summary["tested"] == "best.safetensors"
    assert summary["test_correct"] == misled.evaluation.correct
    low, high = summary["test_interval"]
    assert low < summary["test_accuracy"] < high
    result = read_tensors(misled.folder.best)[1]["result"]
    assert {name: result[name] for name in ("test_correct", "test_images")} == {
        name: summary[name] for name in ("test_correct", "test_images")
    }
    assert "result" not in read_tensors(misled.folder.last)[1]
    assert evaluate_run(misled.folder.path).evaluation.correct == summary["test_correct"]
    told = f"{100 * summary['test_accuracy']:.1f} %"
    assert told in misled.folder.report.read_text()
    write_hub_folder(misled.folder.path, tmp_path / "hub")
    assert f"{told} of 48 test images" in (tmp_path / "hub/README.md").read_text()
    write_hub_folder(misled.folder.last, tmp_path / "other")
    assert "Not measured here" in (tmp_path / "other/README.md").read_text()


def test_patience_counts_by_validation(tmp_path):
    data = pictures(tmp_path / "data", swapped=("val",))
    outcome = train(dataclasses.replace(TINY, data=data, epochs=30, patience=3), tmp_path / "run")
    assert outcome.epoch == outcome.best_epoch + 3 < 30


def test_more_patience_continues_a_run_that_stopped_early(tmp_path):
    recipe = dataclasses.replace(TINY, data=pictures(tmp_path / "data", swapped=("val",)), epochs=30, patience=2)
    first = train(recipe, tmp_path / "run")
    more = train(dataclasses.replace(recipe, patience=4), tmp_path / "run", resume=True)
    assert first.epoch == first.best_epoch + 2
    assert first.epoch < more.epoch == more.best_epoch + 4 < 30


def test_the_test_split_passes_the_network_once(tmp_path, monkeypatch):
    """Report included, in a run that was stopped and continued on the way; nothing reads an image of it before."""
    reads: dict[int, int] = {}
    passes: list[str] = []
    fetch, batches = MemoryDataset.fetch, Data.evaluation_batches

    def counted(part, indices, device, draws):
        reads[len(part)] = reads.get(len(part), 0) + 1
        return fetch(part, indices, device, draws)

    def noted(data, split, **choices):
        passes.append(split)
        return batches(data, split, **choices)

    monkeypatch.setattr(MemoryDataset, "fetch", counted)
    monkeypatch.setattr(Data, "evaluation_batches", noted)
    recipe = dataclasses.replace(TINY, epochs=3, batch_size=256)
    steps = iter(range(100))
    train(recipe, tmp_path / "run", stop=lambda: next(steps) == 7)
    assert 359 not in reads
    assert train(None, tmp_path / "run", resume=True).finished
    assert (tmp_path / "run/report.html").exists()
    assert passes.count("test") == 1


def test_every_end_at_which_the_test_split_was_looked_at_is_told(tmp_path):
    """Also where the power fails right after the run was made longer. The same weights again are no further look."""

    class Crash(SilentReporter):
        def step(self, report):
            raise RuntimeError("power cut")

    recipe = dataclasses.replace(TINY, data=pictures(tmp_path / "data", each=8), epochs=1)
    train(recipe, tmp_path / "run")
    folder = train(None, tmp_path / "run", resume=True).folder
    assert json.loads(folder.summary.read_text())["tested_after"] == [1]
    assert "The test images were looked at once, at the end." in folder.report.read_text()
    with pytest.raises(RuntimeError, match="power cut"):
        train(dataclasses.replace(recipe, epochs=2), folder.path, resume=True, reporter=Crash())
    assert train(None, folder.path, resume=True).tested_after == (1, 2)
    assert json.loads(folder.summary.read_text())["tested_after"] == [1, 2]
    write_hub_folder(folder.path, tmp_path / "hub")
    for page in (folder.report, tmp_path / "hub/README.md"):
        assert "The test images were looked at 2 times, the last time a" in page.read_text()


def test_a_result_from_before_tests_were_counted_is_one(tmp_path):
    recipe = dataclasses.replace(TINY, data=pictures(tmp_path / "data", each=8), epochs=1)
    folder = train(recipe, tmp_path / "run").folder
    tensors, about = read_tensors(folder.best)
    del about["result"]["tested_after"]
    write_tensors(folder.best, tensors, about)
    assert train(dataclasses.replace(recipe, epochs=2), folder.path, resume=True).tested_after == (1, 2)


@pytest.mark.usefixtures("few_digits")
def test_without_validation_images_the_last_epoch_is_the_best(tmp_path):
    class Heard(SilentReporter):
        quiet = False

        def message(self, label, text):
            lines[label] = text

    lines: dict[str, str] = {}
    outcome = train(dataclasses.replace(TINY, epochs=2, validation=0.0), tmp_path / "run", reporter=Heard())
    assert outcome.best_epoch == outcome.epoch == 2
    assert "none to validate on, so the last epoch counts as the best (--validation)" in lines["split"]
    best, last = (read_tensors(path)[0] for path in (outcome.folder.best, outcome.folder.last))
    assert all(torch.equal(best[name], last[name]) for name in last)
    assert [row["validation_accuracy"] for row in outcome.folder.read_metrics()] == [None, None]
    assert json.loads(outcome.folder.summary.read_text())["best_validation_accuracy"] is None
    with pytest.raises(SkipwayError, match="patience needs a validation split"):
        train(dataclasses.replace(TINY, validation=0.0, patience=2), tmp_path / "other")


def test_a_run_continues_with_its_own_file_list(tmp_path, monkeypatch):
    """Also where the rule by which images are split has changed since."""
    recipe = dataclasses.replace(TINY, epochs=2, batch_size=256)
    steps = iter(range(100))
    train(recipe, tmp_path / "run", stop=lambda: next(steps) == 2)
    listed = json.loads((tmp_path / "run/split.json").read_text())
    monkeypatch.setattr("skipway.data.split.draw_key", lambda *purpose: hash(purpose[-1]))
    outcome = train(None, tmp_path / "run", resume=True)
    assert outcome.finished
    assert evaluate_run(tmp_path / "run").evaluation.correct == outcome.evaluation.correct
    assert json.loads((tmp_path / "run/split.json").read_text()) == listed


@pytest.mark.usefixtures("few_digits")
def test_ties_of_accuracy_go_to_the_lower_loss_and_patience_counts_alike(tmp_path, monkeypatch):
    """Also in a run that was stopped between the epochs and resumed."""
    losses, checks = [3.0, 2.0, 2.0, 1.0, 1.5, float("nan"), 0.5], iter(range(1000))
    confusion = torch.tensor([[3, 1], [1, 3]])

    def constructed(trainer):
        return Evaluation(losses[trainer.run.progress.epoch], confusion)

    monkeypatch.setattr(Trainer, "validate", constructed)
    recipe = dataclasses.replace(TINY, epochs=7, batch_size=28, patience=2)
    whole = train(recipe, tmp_path / "whole")
    assert (whole.best_epoch, whole.epoch) == (4, 6)
    assert read_tensors(whole.folder.best)[1]["epoch"] == 4
    steps = whole.folder.read_metrics()[0]["step"]
    first = train(recipe, tmp_path / "parts", stop=lambda: next(checks) == 4 * steps)
    assert (first.finished, first.best_epoch) == (False, 4)
    parts = train(None, tmp_path / "parts", resume=True)
    assert (parts.best_epoch, parts.epoch) == (4, 6)


def test_few_images_and_few_steps_are_noted_before_training(tmp_path):
    class Heard(SilentReporter):
        quiet = False

        def message(self, label, text):
            lines.append((label, text))

    lines: list[tuple[str, str]] = []
    recipe = dataclasses.replace(TINY, epochs=1, batch_size=1000, validation=0.01, lr=0.0123456)
    train(recipe, tmp_path / "run", reporter=Heard())
    texts = [text for _, text in lines]
    assert ("run", str(tmp_path / "run")) in lines
    assert any(text.startswith("only ") and "to validate on" in text and "--folds 5" in text for text in texts)
    assert "only 1 step in all: a smaller --batch-size or more --epochs gives more" in texts
    assert any("learning rate 0.0123," in text and "1 epoch of 1 step," in text for text in texts)
    assert any("to test on (20 %, --holdout), " in text and text.endswith(" to train on") for text in texts)
