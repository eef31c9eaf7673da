"""Cross-validation: every image is tested once, finished folds are not repeated, and the results come together."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
from tests.training.test_validation import pictures

from skipway.cli import main
from skipway.errors import DataError, SkipwayError
from skipway.inference.evaluation import wilson_interval
from skipway.recipe import Recipe
from skipway.training import cross_validate
from skipway.training.cross_validation import is_done
from skipway.training.defaults import TrainingCase
from skipway.training.loop import train
from skipway.training.reporter import SilentReporter
from skipway.training.run_folder import RunFolder

TINY = Recipe(depth=8, width=4, epochs=1, batch_size=256, device="cpu", precision="float32", health=0.0)


def test_every_image_is_tested_once_and_the_results_come_together(tmp_path):
    found = cross_validate(TINY, tmp_path / "cv", folds=3)
    splits = [json.loads((tmp_path / f"cv/fold-{number}/split.json").read_text()) for number in (1, 2, 3)]
    tested = [name for split in splits for name in split["test"]]
    assert len(tested) == len(set(tested)) == 1797
    for split in splits:
        assert set(split["train"]).isdisjoint(split["test"] + split["validation"])
        assert set(split["validation"]).isdisjoint(split["test"])
        assert split["validation"]
        # stratified: 174 to 183 images of each digit
        assert all(58 <= sum(name[0] == digit for name in split["test"]) <= 61 for digit in "0123456789")
    summaries = [json.loads((tmp_path / f"cv/fold-{number}/summary.json").read_text()) for number in (1, 2, 3)]
    accuracies = [summary["test_accuracy"] for summary in summaries]
    assert found.mean == pytest.approx(statistics.fmean(accuracies))
    assert found.deviation == pytest.approx(statistics.stdev(accuracies))
    correct = sum(summary["test_correct"] for summary in summaries)
    assert (found.correct, found.images, found.accuracy) == (correct, 1797, correct / 1797)
    together = json.loads((tmp_path / "cv/summary.json").read_text())
    assert together["test_interval"] == list(wilson_interval(correct, 1797))
    assert "3 of 3 folds" in str(found)


def test_the_first_fold_chooses_for_all(tmp_path, monkeypatch):
    """Choices may depend on the speed of the machine, or on what a hub answers."""
    decays = iter((0.5, 0.6, 0.7))
    monkeypatch.setattr(TrainingCase, "defaults", lambda case: {"layer_decay": next(decays)})
    cross_validate(dataclasses.replace(TINY, data=pictures(tmp_path / "data", each=9)), tmp_path / "cv", folds=2)
    recipes = [json.loads((tmp_path / f"cv/fold-{number}/config.json").read_text())["recipe"] for number in (1, 2)]
    assert [recipe["layer_decay"] for recipe in recipes] == [0.5, 0.5]


def test_finished_folds_are_not_repeated(tmp_path, monkeypatch):
    from skipway.training import cross_validation

    trained: list[str] = []

    def counted(recipe, out, **options):
        trained.append(recipe.fold)
        return train(recipe, out, **options)

    monkeypatch.setattr(cross_validation, "train", counted)
    recipe = dataclasses.replace(TINY, data=pictures(tmp_path / "data", each=9))
    steps = iter(range(1000))
    stopped = cross_validate(recipe, tmp_path / "cv", folds=3, stop=lambda: next(steps) >= 5)
    assert not stopped.finished
    assert 0 < len(stopped.results) < 3
    done = len(stopped.results)
    with pytest.raises(SkipwayError, match="holds a run; continue it with --resume"):
        cross_validate(recipe, tmp_path / "cv", folds=3)
    with pytest.raises(SkipwayError, match="folds=5: the cross-validation in .* has 3"):
        cross_validate(recipe, tmp_path / "cv", folds=5, resume=True)
    with pytest.raises(SkipwayError, match="cannot change width"):
        cross_validate(dataclasses.replace(recipe, width=8), tmp_path / "cv", resume=True)
    trained.clear()
    whole = cross_validate(recipe, tmp_path / "cv", folds=3, resume=True)
    assert whole.finished
    assert whole.results[:done] == stopped.results
    assert trained == [f"{number}/3" for number in range(done + 1, 4)]
    assert cross_validate(None, tmp_path / "cv", resume=True) == whole
    assert whole.results == cross_validate(recipe, tmp_path / "again", folds=3).results
    # longer: every fold continues
    trained.clear()
    assert cross_validate(dataclasses.replace(recipe, epochs=2), tmp_path / "cv", resume=True).finished
    assert trained == ["1/3", "2/3", "3/3"]


def test_folds_that_are_made_longer_are_not_done_when_that_is_interrupted(tmp_path):
    class Crash(SilentReporter):
        def step(self, report):
            raise RuntimeError("power cut")

    recipe = dataclasses.replace(TINY, data=pictures(tmp_path / "data", each=9))
    cross_validate(recipe, tmp_path / "cv", folds=2)
    with pytest.raises(RuntimeError, match="power cut"):
        cross_validate(dataclasses.replace(recipe, epochs=2), tmp_path / "cv", resume=True, reporter=Crash())
    assert not (tmp_path / "cv/summary.json").exists(), "it would be that of the shorter folds"
    cross_validate(None, tmp_path / "cv", resume=True)
    summaries = [json.loads((tmp_path / f"cv/fold-{number}/summary.json").read_text()) for number in (1, 2)]
    assert [summary["epochs"] for summary in summaries] == [2, 2]


@pytest.mark.parametrize("length", [{"epochs": 3}, {"steps": 9}, {"time": "1m"}, {"patience": 2}])
def test_a_fold_of_another_length_is_not_done(tmp_path, length):
    folder = RunFolder(tmp_path)
    folder.summary.write_text("{}")
    folder.config.write_text(json.dumps({"recipe": TINY.to_json()}))
    assert is_done(folder, TINY)
    assert not is_done(folder, dataclasses.replace(TINY, **length))


def test_the_test_split_of_the_source_is_left_alone(tmp_path):
    recipe = dataclasses.replace(TINY, data=pictures(tmp_path / "data", each=6))
    found = cross_validate(recipe, tmp_path / "cv", folds=2)
    assert found.images == 12
    listed = json.loads((tmp_path / "cv/fold-1/split.json").read_text())
    assert all(name.startswith("val/") for name in listed["validation"])
    assert all(name.startswith("train/") for name in listed["train"] + listed["test"])


def test_more_folds_than_images_are_refused(tmp_path):
    recipe = dataclasses.replace(TINY, data=pictures(tmp_path / "data", each=4))
    with pytest.raises(DataError, match=r"folds=5: class 'dark' has 4 different images.*take at most 4 folds"):
        cross_validate(recipe, tmp_path / "cv", folds=5)
    assert not (tmp_path / "cv").exists()
    for folds, fold, message in ((1, None, "the rule is folds >= 2"), (3, "1/3", "one fold is a single run")):
        with pytest.raises(SkipwayError, match=message):
            cross_validate(dataclasses.replace(recipe, fold=fold), tmp_path / "cv", folds=folds)
    with pytest.raises(SkipwayError, match="fold='6/5': the rule is NUMBER/COUNT"):
        Recipe(fold="6/5")


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "data", each=6)
    command = ["train", "data", "--depth", "8", "--width", "4", "--epochs", "1", "--device", "cpu", "--out", "cv"]
    assert main([*command, "--folds", "2"]) == 0
    first = capsys.readouterr().out
    assert "fold      2 of 2: " in first
    assert "12 images, each tested in one fold (95 % interval" in first
    assert "standard deviation" in first
    assert main([*command, "--folds", "2", "--resume"]) == 0
    assert first.splitlines()[-3:] == capsys.readouterr().out.splitlines()[-3:]
    assert main(["train", "--out", "cv", "--resume", "--quiet"]) == 0
    assert capsys.readouterr().out.endswith("cv\n")
    with pytest.raises(SkipwayError, match="holds a cross-validation; cross_validate resumes it"):
        train(None, Path("cv"), resume=True)
