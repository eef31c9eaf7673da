"""The classifier fitted to features: once, to convergence; first of all, or only."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tests.training.test_loop import StopAfter, assert_same
from tests.training.test_nonfinite import spoil_once

import skipway as sw
from skipway.checkpoint.files import read_tensors, write_tensors
from skipway.cli.train import result_lines
from skipway.data import load
from skipway.errors import CheckpointError, SkipwayError
from skipway.inference.publish import write_hub_folder
from skipway.inference.run_evaluation import evaluate_run
from skipway.training import classifier_fit, features, mlp_head
from skipway.training.budget import RunCosts
from skipway.training.distributed import Ranks
from skipway.training.features import features_of
from skipway.training.head import select_head
from skipway.training.linear_head import linear_heads
from skipway.training.reporter import SilentReporter
from skipway.training.resume import change_plan
from skipway.training.run import Progress
from skipway.weights import hub

pytestmark = pytest.mark.usefixtures("few_digits")
BASE = sw.Recipe(model="resnet", depth=8, width=8, epochs=2, batch_size=14, device="cpu", precision="float32")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIPWAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(mlp_head, "ITERATIONS", 20)
    monkeypatch.setattr(classifier_fit, "mlp_heads", partial(mlp_head.mlp_heads, widths=(4, 8), penalties=(1e-3,)))


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def message(self, label: str, text: str) -> None:
        self.notes.append(text)


class Counter(SilentReporter):
    def __init__(self) -> None:
        self.counts: list[tuple[int, int]] = []

    def activity(self, label: str, done: int = 0, total: int = 0) -> None:
        if label == "features":
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
    expected = select_head(linear_heads(*pairs[0], 10), pairs[1])
    assert torch.allclose(model.head.classifier.weight, expected.weight, rtol=1e-2, atol=1e-2)
    assert run.best_accuracy == pytest.approx(expected.accuracy)
    assert "fitted to features of the frozen network; no step" in (run.folder.path / "report.html").read_text()


@pytest.mark.parametrize("longer", [{"epochs": 9}, {"steps": 30}, {"time": "9m"}, {"patience": 3}])
def test_a_longer_run_of_the_classifier_alone_stays_at_its_end(longer):
    recipe = sw.Recipe(freeze="all", epochs=2)
    before = {"epochs": recipe.epochs, "steps": None, "time": None, "patience": None}
    run = SimpleNamespace(recipe=replace(recipe, **longer), progress=Progress(head_fitted=True), reporter=Notes())
    run.length = {**before, **longer}
    change_plan(run, before)
    assert run.progress == Progress(head_fitted=True)
    (note,) = run.reporter.notes
    assert note.startswith(f"{next(iter(longer))}=")
    assert "has no effect" in note


def test_features_are_computed_once(tmp_path, cache):
    recipe, first, second = replace(BASE, freeze="all"), Counter(), Counter()
    one = sw.train(recipe, tmp_path / "1", reporter=first)
    two = sw.train(recipe, tmp_path / "2", reporter=second)
    assert first.counts[-1] == (17, 17)
    assert second.counts == []
    assert_same(one, two)
    sw.train(replace(recipe, seed=1), tmp_path / "3", reporter=second)  # other weights
    assert second.counts


def test_an_interrupted_computation_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MOST_IMAGES", 11)
    recipe, counter = replace(BASE, freeze="all(views=1)", augment="erasing"), Counter()
    whole = sw.train(replace(recipe, cache=False), tmp_path / "whole")
    for polls in (3, 11):  # 13 batches of images, 13 of their views
        assert not sw.train(recipe, tmp_path / "stopped", stop=StopAfter(polls), resume=True).finished
    resumed = sw.train(None, tmp_path / "stopped", resume=True, reporter=counter)
    assert resumed.finished
    assert counter.counts[0] == (142 + 44, 2 * 142)
    assert_same(whole, resumed)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("freeze", ["first", "first(head='mlp')"])
def test_a_run_killed_around_the_fit_again_and_again_ends_like_one_that_was_not(tmp_path, monkeypatch, small, freeze):
    recipe = replace(BASE, freeze=freeze, lr=0.01, ema=0.5, epochs=1)
    whole = sw.train(recipe, tmp_path / "whole")

    def kill(*_, **__):
        raise Killed

    for place in ("classifier_fit.select_head", "classifier_fit.write_weights", "loop.record_fit", "step.backward"):
        with monkeypatch.context() as patched:
            patched.setattr(f"skipway.training.{place}", kill)
            with pytest.raises(Killed):
                sw.train(recipe, tmp_path / "killed", resume=True)
    assert_same(whole, sw.train(None, tmp_path / "killed", resume=True))


NETWORK = """
from torch import nn

class Net(nn.Sequential):
    mask = None

    def forward(self, x):
        if self.mask is None:  # made when it is needed first, as networks of others do
            self.mask = x.new_ones(1, 8)
        return self[2](input=(FEATURES) * self.mask)

def make():
    return Net(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Linear(8, 10))
"""


OTHERS = """
from torch import nn

class Two(nn.ModuleList):
    def forward(self, x):
        return (self[0](x.flatten(1)) + self[1](x.flatten(1))) / 2

class Scaled(nn.ModuleList):
    def forward(self, x):
        return 3 * self[0](x.flatten(1))

def two():
    return Two([nn.Linear(64, 10), nn.Linear(64, 10)])

def scaled():
    return Scaled([nn.Linear(64, 10)])
"""


def test_features_of_changed_code_are_made_anew(tmp_path):
    """The cache knows weights and preprocessing; what `forward` does with them shows in the features alone."""
    notes, results = Notes(), []
    for constant in ("self[1](self[0](x)).flatten(1)[:, :8] * 0", "self[1](self[0](x)).mean((2, 3))"):
        (tmp_path / "nets.py").write_text(NETWORK.replace("FEATURES", constant))
        recipe = replace(BASE, model=f"{tmp_path}/nets.py:make", depth=None, width=None, channels=1, freeze="all")
        results.append(sw.train(recipe, tmp_path / f"run{len(results)}", reporter=notes).best_accuracy)
    assert results[0] < 0.2 < results[1] - 0.1
    assert sum("not what the network computes now" in note for note in notes.notes) == 2  # training and validation


def test_the_scheme_of_a_network_is_part_of_what_its_features_depend_on(tmp_path, cache):
    for scheme in ("plain", "preactivation"):
        sw.train(replace(BASE, freeze="all", scheme=scheme), tmp_path / scheme)
    assert len({path.stem for path in cache.glob("features-*.bin")}) == 4


def test_views_are_used_in_the_fit_and_nowhere_else(tmp_path, cache):
    recipe = replace(BASE, augment="erasing")
    plain, viewed = (sw.train(replace(recipe, freeze=freeze), tmp_path / freeze) for freeze in ("all", "all(views=2)"))
    sizes = sorted(path.stat().st_size for path in cache.glob("features-*.bin"))
    width = 4 * 32
    assert sizes == [17 * width, 3 * 142 * width]
    a, b = (sw.from_pretrained(run.folder.path).head.classifier.weight for run in (plain, viewed))
    assert not torch.allclose(a, b)
    counter = Counter()
    sw.train(replace(recipe, freeze="all(views=3)"), tmp_path / "more", reporter=counter)
    assert counter.counts[0][0] > 3 * 142  # those that are there already are taken


def test_first_trains_everything_from_the_fitted_classifier(tmp_path):
    recipe = replace(BASE, freeze="first", lr=0.01, ema=0.5)
    only = sw.train(replace(recipe, freeze="all"), tmp_path / "only")
    whole = sw.train(recipe, tmp_path / "whole")
    assert whole.best_accuracy >= only.best_accuracy
    assert whole.epoch == 2
    assert not sw.train(recipe, tmp_path / "stopped", stop=StopAfter(20)).finished
    assert_same(whole, sw.train(None, tmp_path / "stopped", resume=True))


def test_where_training_hurts_the_fitted_classifier_is_kept(tmp_path):
    recipe = replace(BASE, freeze="first", epochs=1, lr=30.0, warmup=0.0, ema=None, clip="norm(1.0)")
    run, only = sw.train(recipe, tmp_path / "run"), sw.train(replace(recipe, freeze="all"), tmp_path / "only")
    assert (run.best_epoch, run.epoch) == (0, 1)
    assert run.best_accuracy == only.best_accuracy
    best, fitted = (read_tensors(outcome.folder.best)[0] for outcome in (run, only))
    assert all(torch.equal(best[name], fitted[name]) for name in best)
    lines = dict(result_lines(run, 1.0))
    assert "none of 1 epoch was better" in lines["chosen"]
    assert "(classifier fitted to features, tested)" in lines["weights"]
    page = (run.folder.path / "report.html").read_text()
    assert "none of 1 epoch was better" in page
    assert "epoch 0" not in page
    summary = json.loads(run.folder.summary.read_text())
    assert (summary["best_epoch"], summary["epochs"]) == (0, 1)


def test_without_time_for_steps_the_run_ends_with_the_classifier(tmp_path):
    notes = Notes()
    run = sw.train(replace(BASE, freeze="first", time="1s", batch_size=1000), tmp_path / "run", reporter=notes)
    assert (run.finished, run.epoch, run.best_epoch) == (True, 0, 0)
    assert any("no time for 20 steps" in note and "time='1m'" in note for note in notes.notes)
    assert "--time" in dict(result_lines(run, 1.0))["longer"]


@pytest.mark.parametrize(("budget", "fits"), [(100.0, False), (102.0, True), (None, True)])
def test_steps_are_taken_where_twenty_fit(budget, fits):
    """10 s are spent, 30 images left at 1 s, and a step of one image takes 3 s: 10 + 30 + 60, and 1 % is kept."""
    data = SimpleNamespace(validation=range(10), test=range(20))
    recipe = SimpleNamespace(budget=budget, batch_size=1, time="x")
    run = SimpleNamespace(recipe=recipe, data=data, ranks=Ranks(), elapsed=10.0, steps_per_epoch=6, reporter=Notes())
    run.progress = SimpleNamespace(costs=RunCosts(image=1.0))
    assert classifier_fit.has_time_for_steps(run) == fits
    assert fits or "20 steps need about time='2m'" in run.reporter.notes[-1]


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SKIPWAY_CACHE", str(tmp_path / "file"))
    assert sw.train(replace(BASE, freeze="all"), tmp_path / "run").finished


def test_a_hidden_layer_becomes_a_part_of_the_network(tmp_path, small, cache):
    outcome = sw.train(replace(BASE, freeze="all(head='mlp')"), tmp_path / "run")
    model = sw.from_pretrained(tmp_path / "run")
    assert [type(module).__name__ for module in model.head.classifier] == ["Linear", "GELU", "Linear"]
    assert len(list(cache.glob("features-*.bin"))) == 2  # the report takes what the fit computed
    width = len(model.head.classifier[0].weight)
    assert json.loads(outcome.folder.config.read_text())["model"]["head"] == ["head.classifier", width]
    assert evaluate_run(tmp_path / "run").evaluation.accuracy == outcome.evaluation.accuracy
    batch = next(load().evaluation_batches("test", batch_size=8, device=torch.device("cpu")))
    write_hub_folder(tmp_path / "run", tmp_path / "hub")
    again = sw.from_pretrained(tmp_path / "hub")
    assert torch.equal(model(batch.inputs), again(batch.inputs))


def test_a_hidden_layer_that_is_not_in_the_file_is_refused(tmp_path, small):
    outcome = sw.train(replace(BASE, freeze="all(head='mlp')"), tmp_path / "run")
    tensors, about = read_tensors(outcome.folder.best)
    for head in (["head.classifier", 10**9], ["nothing", 4], [4], "head", ["head.classifier", "4"]):
        write_tensors(outcome.folder.best, tensors, {**about, "model": {**about["model"], "head": head}})
        with pytest.raises(CheckpointError, match="hidden layer|not an option"):
            sw.from_pretrained(outcome.folder.best)


def test_a_network_of_a_file_gets_a_hidden_layer_and_is_trained_on(tmp_path, small):
    (tmp_path / "nets.py").write_text(NETWORK.replace("FEATURES", "self[1](self[0](x)).mean((2, 3))"))
    recipe = replace(BASE, model=f"{tmp_path}/nets.py:make", depth=None, width=None, channels=1, epochs=1, lr=1e-3)
    run = sw.train(replace(recipe, freeze="first(head='mlp')", ema=0.9), tmp_path / "run")
    state = sw.from_pretrained(run.folder.last, trust_code=True).state_dict()
    assert {"2.0.weight", "2.2.weight"} <= set(state)


def test_a_run_with_a_hidden_layer_goes_back_to_its_checkpoint(tmp_path, monkeypatch, small):
    armed = spoil_once(monkeypatch, 3)
    recipe = replace(BASE, freeze="first(head='mlp')", lr=0.01, epochs=1, diverged="retry")
    assert sw.train(recipe, tmp_path / "run").epoch == 1
    assert armed[0].progress.retries == 1


@pytest.mark.parametrize("where", ["a file", "the hub"])
def test_a_start_with_a_hidden_layer_is_taken_with_it(tmp_path, small, monkeypatch, where):
    first = sw.train(replace(BASE, freeze="all(head='mlp')"), tmp_path / "first")
    write_hub_folder(first.folder.path, tmp_path / "hub")
    monkeypatch.setattr(hub, "download", lambda name, others=(): {"hf:me/net": tmp_path / "hub"}[name])
    start = str(first.folder.best) if where == "a file" else "hf:me/net"
    recipe = replace(BASE, start=start, epochs=1, lr=1e-12, freeze="none")
    second = sw.train(recipe, tmp_path / "second")
    one, two = (sw.from_pretrained(run.folder.last).head.classifier for run in (first, second))
    assert all(torch.allclose(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_where_memory_is_short_a_batch_is_computed_in_halves(tmp_path, monkeypatch):
    whole = sw.train(replace(BASE, freeze="all", cache=False), tmp_path / "whole")
    real, sizes = features.features_of, []

    def short(model, classifier, inputs):
        sizes.append(len(inputs))
        if len(inputs) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, classifier, inputs)

    monkeypatch.setattr(features, "features_of", short)
    halves = sw.train(replace(BASE, freeze="all", cache=False), tmp_path / "halves")
    assert halves.best_accuracy == whole.best_accuracy
    assert max(sizes) == 142
    monkeypatch.setattr(features, "features_of", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("all")))
    with pytest.raises(SkipwayError, match="out of memory: not even one image"):
        sw.train(replace(BASE, freeze="all", cache=False), tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 0.0}, "validation images select"),
        ({"freeze": "all(views=2)", "crop": "none"}, "nothing augments"),
        ({"model": "FILE:two"}, "one linear classifier"),
        ({"model": "FILE:scaled"}, "something follows 0"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, options, message):
    (tmp_path / "nets.py").write_text(OTHERS)
    if "FILE" in options.get("model", ""):
        model = options["model"].replace("FILE", f"{tmp_path}/nets.py")
        options = {"model": model, "depth": None, "width": None, "channels": 1}
    with pytest.raises(SkipwayError, match=message):
        sw.train(replace(BASE, **{"freeze": "all", **options}), tmp_path / "run")
