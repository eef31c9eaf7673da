"""Linear probing: features once, the classifier to convergence; first of all, or only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.training.test_loop import StopAfter, assert_same

import skipway as sw
from skipway.data import load
from skipway.errors import SkipwayError
from skipway.training.linear_head import select_linear_head
from skipway.training.linear_probe import features_of
from skipway.training.reporter import SilentReporter

BASE = sw.Recipe(model="resnet", depth=8, width=8, epochs=2, batch_size=128, device="cpu", precision="float32")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIPWAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Counter(SilentReporter):
    def __init__(self) -> None:
        self.counts: list[tuple[int, int]] = []

    def images_read(self, done: int, total: int) -> None:
        self.counts.append((done, total))


def test_only_the_classifier_changes_and_is_the_regression_of_its_features(tmp_path):
    run = sw.train(replace(BASE, freeze="all"), tmp_path / "run")
    assert run.finished
    assert (run.epoch, run.best_epoch) == (0, 0)
    model, data = sw.from_pretrained(tmp_path / "run"), load()
    fresh = sw.from_pretrained(sw.train(replace(BASE, epochs=1, lr=1e-12), tmp_path / "other").folder.path)
    for name, parameter in fresh.named_parameters():
        if not name.startswith("head.classifier"):
            assert torch.allclose(parameter, dict(model.named_parameters())[name], atol=1e-6), name
    pairs = []
    for split in ("train", "validation"):
        (batch,) = data.evaluation_batches(split, batch_size=2000, device=torch.device("cpu"))
        with torch.no_grad():
            pairs.append((features_of(model, model.head.classifier, batch.inputs)[0], batch.labels))
    expected = select_linear_head(*pairs, 10)
    assert torch.allclose(model.head.classifier.weight, expected.weight, rtol=1e-2, atol=1e-2)
    assert run.best_accuracy == pytest.approx(expected.accuracy)
    assert "fitted to features of the frozen network; no step" in (run.folder.path / "report.html").read_text()


def test_features_are_computed_once(tmp_path, cache):
    recipe, first, second = replace(BASE, freeze="all"), Counter(), Counter()
    one = sw.train(recipe, tmp_path / "1", reporter=first)
    two = sw.train(recipe, tmp_path / "2", reporter=second)
    assert first.counts[-1] == (143, 143)
    assert second.counts == []
    assert_same(one, two)
    sw.train(replace(recipe, seed=1), tmp_path / "3", reporter=second)  # other weights
    assert second.counts


def test_an_interrupted_computation_goes_on_where_it_was(tmp_path):
    recipe, counter = replace(BASE, freeze="all"), Counter()
    whole = sw.train(replace(recipe, seed=0), tmp_path / "whole")
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    assert not sw.train(recipe, tmp_path / "stopped", stop=StopAfter(3)).finished
    resumed = sw.train(None, tmp_path / "stopped", resume=True, reporter=counter)
    assert resumed.finished
    assert counter.counts[0][0] > 128
    assert_same(whole, resumed)


def test_first_trains_everything_from_the_fitted_classifier(tmp_path):
    recipe = replace(BASE, freeze="first", lr=0.01, ema=0.5)
    only = sw.train(replace(recipe, freeze="all"), tmp_path / "only")
    whole = sw.train(recipe, tmp_path / "whole")
    assert whole.best_accuracy >= only.best_accuracy
    assert whole.epoch == 2
    assert not sw.train(recipe, tmp_path / "stopped", stop=StopAfter(20)).finished
    assert_same(whole, sw.train(None, tmp_path / "stopped", resume=True))


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SKIPWAY_CACHE", str(tmp_path / "file"))
    assert sw.train(replace(BASE, freeze="all"), tmp_path / "run").finished


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 0.0}, "validation images select"),
        ({"model": "timm:levit_128s", "depth": None, "width": None, "size": 224}, "one linear classifier"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, options, message):
    if "timm" in str(options.get("model")):
        pytest.importorskip("huggingface_hub")
        try:
            sw.zoo.import_library("timm")
        except SkipwayError:
            pytest.skip("timm is not installed")
    with pytest.raises(SkipwayError, match=message):
        sw.train(replace(BASE, freeze="all", **options), tmp_path / "run")
