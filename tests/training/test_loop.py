"""Whole runs on a ninth of the embedded digits, with networks small enough to take a part of a second."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import skipway as sw
from skipway.checkpoint import store
from skipway.checkpoint.files import read_tensors, write_tensors
from skipway.checkpoint.store import Checkpoints
from skipway.data.preprocessing import Preprocessing
from skipway.errors import CheckpointError, DataError, DivergedError, MissingExtraError, SkipwayError
from skipway.recipe import Recipe, read_recipe
from skipway.training import loop, records
from skipway.training.loop import train
from skipway.training.reporter import SilentReporter
from skipway.training.run import Outcome

pytestmark = pytest.mark.usefixtures("few_digits")
TINY = Recipe(depth=8, width=4, epochs=2, batch_size=28, device="cpu", precision="float32")


def changed(recipe: Recipe, **fields) -> Recipe:
    from dataclasses import replace

    return replace(recipe, **fields)


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    return read_tensors(outcome.folder.last)[0]


def assert_same(first: Outcome, second: Outcome) -> None:
    """Equal weights, bit for bit, and equal metrics but for the time."""
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    timing = {"seconds", "images_per_second", "tokens_per_second"}
    rows = [
        [{k: v for k, v in row.items() if k not in timing} for row in outcome.folder.read_metrics()]
        for outcome in (first, second)
    ]
    assert rows[0] == rows[1]


class StopAfter:
    """Says stop from the given number of questions on."""

    def __init__(self, questions: int) -> None:
        self.questions = questions

    def __call__(self) -> bool:
        self.questions -= 1
        return self.questions < 0


def pictures(root: Path, parts: tuple[str, ...] = ("train", "test"), each: int = 8) -> Path:
    """Two classes that differ in brightness."""
    noise = np.random.default_rng(0)
    for part in parts:
        for label, name in enumerate(("dark", "light")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(each):
                pixels = noise.integers(0, 100, (8, 8, 3), dtype=np.uint8) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def test_it_learns(tmp_path, monkeypatch):
    """Nine in ten digits after a few seconds; guessing gives one in ten."""
    monkeypatch.undo()  # from all digits
    outcome = train(Recipe(depth=8, epochs=6, batch_size=64, device="cpu"), tmp_path / "run")
    assert outcome.finished
    assert outcome.evaluation is not None
    assert outcome.evaluation.accuracy > 0.9


def test_the_run_folder_is_complete_and_holds_no_pickle(tmp_path):
    outcome = train(TINY, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("config.json", "environment.json", "split.json", "metrics.jsonl", "steps.jsonl", "summary.json"),
        *("checkpoints", "best.safetensors", "last.safetensors", "report.html", "findings.csv"),
    }
    rows = outcome.folder.read_metrics()
    assert [row["epoch"] for row in rows] == [1, 2]
    summary = json.loads(outcome.folder.summary.read_text())
    assert summary["best_validation_accuracy"] == max(row["validation_accuracy"] for row in rows)
    assert np.array(summary["confusion"]).sum() == summary["test_images"]
    split = json.loads(outcome.folder.split.read_text())
    assert [len(split[name]) for name in ("train", "validation", "test")] == [142, 17, 41]


def test_the_weights_can_be_used_elsewhere(tmp_path):
    outcome = train(TINY, tmp_path / "run")
    _, metadata = read_tensors(outcome.folder.best)
    model = sw.build(**metadata["model"])
    sw.load(model, outcome.folder.last)
    assert all(torch.equal(value, weights(outcome)[name]) for name, value in model.state_dict().items())
    assert metadata["preprocessing"]["classes"] == [str(digit) for digit in range(10)]
    assert metadata["preprocessing"].keys() == {field.name for field in dataclasses.fields(Preprocessing)}


def test_training_again_gives_the_same_and_another_seed_does_not(tmp_path):
    first = train(TINY, tmp_path / "1")
    torch.manual_seed(123)
    random = torch.random.get_rng_state()
    assert_same(first, train(TINY, tmp_path / "2"))
    assert torch.equal(random, torch.random.get_rng_state()), "the caller's random state is his"
    assert_same(first, train(read_recipe(first.folder.config), tmp_path / "3"))
    other = train(changed(TINY, seed=1), tmp_path / "4")
    assert not torch.equal(weights(first)["stem.conv.weight"], weights(other)["stem.conv.weight"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_that_continues_ends_in_the_same_weights(tmp_path, optimizer):
    """Stopped in mid-epoch, during a test, and between epochs; with random depth, so that random draws count."""
    recipe = changed(TINY, optimizer=optimizer, scheme="skipinit + stochasticdepth(0.5)", epochs=3)
    whole = train(recipe, tmp_path / "whole")
    # 5 steps and 2 test batches in an epoch: a question after each, and one more behind the last step
    for number, questions in enumerate((3, 6, 7)):
        out = tmp_path / f"stopped{number}"
        stopped = train(recipe, out, stop=StopAfter(questions))
        assert not stopped.finished
        assert stopped.evaluation is None
        again = train(None, out, resume=True, stop=StopAfter(4))
        assert not again.finished
        assert_same(whole, train(None, out, resume=True))


def test_a_crash_between_metrics_and_checkpoint_repeats_the_epoch(tmp_path):
    class Crash(SilentReporter):
        def epoch(self, row, epochs):
            if row["epoch"] == 2:
                raise RuntimeError("power cut")

    recipe = changed(TINY, epochs=3)
    with pytest.raises(RuntimeError, match="power cut"):
        train(recipe, tmp_path / "crashed", reporter=Crash())
    assert_same(train(recipe, tmp_path / "whole"), train(None, tmp_path / "crashed", resume=True))


def test_a_finished_run_can_be_made_longer_and_nothing_else(tmp_path):
    train(TINY, tmp_path / "run")
    with pytest.raises(SkipwayError, match=r"cannot change lr from 0.0218\d* to 0.5"):
        train(changed(TINY, lr=0.5), tmp_path / "run", resume=True)
    same = train(TINY, tmp_path / "run", resume=True)
    assert (same.finished, same.epoch) == (True, 2)
    assert same.evaluation is not None
    longer = train(changed(TINY, epochs=3), tmp_path / "run", resume=True)
    assert [row["epoch"] for row in longer.folder.read_metrics()] == [1, 2, 3]
    assert read_recipe(longer.folder.config).epochs == 3


@pytest.mark.parametrize("length", [{"epochs": 4}, {"steps": 20}])
def test_a_run_that_is_made_longer_stays_so_and_loses_its_result(tmp_path, length):
    """The power fails before the next checkpoint; whoever resumes the run does not say the length again."""

    class Crash(SilentReporter):
        def step(self, report):
            raise RuntimeError("power cut")

    folder = train(TINY, tmp_path / "run").folder
    assert folder.findings.exists()
    with pytest.raises(RuntimeError, match="power cut"):
        train(changed(TINY, **length), tmp_path / "run", resume=True, reporter=Crash())
    assert not any(path.exists() for path in (folder.summary, folder.report, folder.findings))
    assert train(None, tmp_path / "run", resume=True).finished
    assert folder.read_metrics()[-1]["step"] == 20
    assert folder.summary.exists()


@pytest.mark.parametrize("length", [{"epochs": 4}, {"steps": 20}, {"time": "1h"}])
@pytest.mark.parametrize("background", [False, True])
def test_a_longer_plan_outlives_a_checkpoint_that_is_not_written(tmp_path, monkeypatch, length, background):
    """The disk is full when the run is made longer, and it is killed: it resumes from the plan of the shorter one."""

    class Crash(SilentReporter):
        warnings = 0

        def message(self, label, text):
            self.warnings += label == "warning" and "was not written" in text

        def step(self, report):
            raise RuntimeError("power cut")

    folder = train(TINY, tmp_path / "run").folder
    newest, begun, crash = Checkpoints(folder.checkpoints).steps()[-1], loop.build_run, Crash()

    def build(*given, **options):
        run = begun(*given, **options)
        run.checkpoints.background = background
        return run

    def full(*given):
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "build_run", build)
        patch.setattr(store, "check_space", full)
        with pytest.raises(RuntimeError, match="power cut"):
            train(changed(TINY, **length), tmp_path / "run", resume=True, reporter=crash)
    assert (crash.warnings, Checkpoints(folder.checkpoints).steps()[-1]) == (1, newest)
    stopped = train(None, tmp_path / "run", resume=True, stop=StopAfter(3))
    assert not stopped.finished
    assert stopped.step > 0


def test_a_longer_plan_outlives_a_damaged_checkpoint(tmp_path):
    """The one before it is of the shorter run."""

    class Crash(SilentReporter):
        def step(self, report):
            raise RuntimeError("power cut")

    folder = train(TINY, tmp_path / "run").folder
    with pytest.raises(RuntimeError, match="power cut"):
        train(changed(TINY, epochs=4), tmp_path / "run", resume=True, reporter=Crash())
    newest = max(folder.checkpoints.glob("step-*"))
    (newest / "model.safetensors").write_bytes(b"")
    assert train(None, tmp_path / "run", resume=True).epoch == 4


def test_a_run_that_is_stopped_in_its_test_is_not_finished(tmp_path, monkeypatch):
    """All epochs are done; resumed, it is tested."""
    testing, real = [], loop.Trainer.test
    monkeypatch.setattr(loop.Trainer, "test", lambda trainer: testing.append(1) or real(trainer))
    stopped = train(TINY, tmp_path / "run", stop=lambda: bool(testing))
    assert (stopped.finished, stopped.epoch, stopped.evaluation) == (False, 2, None)
    assert not stopped.folder.summary.exists()
    resumed = train(TINY, tmp_path / "run", resume=True)
    assert (resumed.finished, resumed.epoch) == (True, 2)
    assert resumed.evaluation is not None


def test_health_behind_the_checkpoint_is_dropped(tmp_path):
    """Also a row that a full disk cut short, behind which nothing would be read."""
    folder = train(changed(TINY, health=0.0), tmp_path / "run", stop=StopAfter(2)).folder
    folder.append_health({"step": 1, "connections": {}})
    folder.append_health({"step": 999, "connections": {}})
    with folder.health.open("a") as file:
        file.write('{"step": 1000, "conn')
    train(None, tmp_path / "run", resume=True)
    folder.append_health({"step": 10, "connections": {}})
    assert [row["step"] for row in folder.read_health()] == [1, 10]


def test_tensorboard_is_given_every_step_that_is_recorded(tmp_path, monkeypatch):
    """Also those before a checkpoint within an epoch; what is there already is hidden where a session begins."""
    written: list[int] = []
    hidden: list[int] = []

    def noted(folder, steps, epoch=None, *, again=False):
        written.extend(row["step"] for row in steps)
        hidden.extend(row["step"] for row in steps[:1] if again)

    monkeypatch.setattr(records, "write_tensorboard", noted)
    monkeypatch.setattr(loop, "summary_writer", lambda: None)  # installed or not
    recipe = changed(TINY, tensorboard=True, save_every=2)
    train(recipe, tmp_path / "run", stop=StopAfter(2))
    outcome = train(None, tmp_path / "run", resume=True)
    assert written == [row["step"] for row in outcome.folder.read_steps()] == list(range(1, 11))
    assert hidden == [1, 4]


def test_a_package_that_is_missing_is_named_before_the_data_are_read(tmp_path, monkeypatch):
    """It is needed at the first checkpoint, before which a run would end again and again."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(loop, "load_data", lambda *given, **options: pytest.fail("the data were read"))
    with pytest.raises(MissingExtraError, match=r"tensorboard=True needs tensorboard, .*skipway\[tensorboard\]"):
        train(changed(TINY, tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_data_folder_moved_continues(tmp_path):
    data = pictures(tmp_path / "data")
    recipe = changed(TINY, data=data)
    whole = train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "run", stop=StopAfter(1))
    moved = data.rename(tmp_path / "elsewhere")
    assert_same(whole, train(changed(recipe, data=moved, batch_size=28), tmp_path / "run", resume=True))


def test_a_folder_that_is_taken_is_refused(tmp_path):
    train(changed(TINY, epochs=1), tmp_path / "run")
    before = (tmp_path / "run/last.safetensors").read_bytes()
    with pytest.raises(SkipwayError, match="the folder holds a run; continue it with --resume"):
        train(TINY, tmp_path / "run")
    # a bad recipe costs nothing, even with overwrite
    with pytest.raises(SkipwayError, match="did you mean 'fixup'"):
        train(changed(TINY, scheme="fixupp"), tmp_path / "run", overwrite=True)
    assert (tmp_path / "run/last.safetensors").read_bytes() == before
    assert train(changed(TINY, epochs=1, seed=1), tmp_path / "run", overwrite=True).finished
    assert (tmp_path / "run/last.safetensors").read_bytes() != before


def test_a_folder_of_something_else_is_refused_even_to_overwrite(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SkipwayError, match="holds something other than a run"):
        train(TINY, tmp_path, overwrite=True)
    with pytest.raises(SkipwayError, match="a file has that name"):
        train(TINY, tmp_path / "thesis.tex")
    with pytest.raises(CheckpointError, match="holds no run to continue"):
        train(None, tmp_path / "nowhere", resume=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_data_folder_is_never_written_to(tmp_path):
    recipe = changed(TINY, data=pictures(tmp_path / "data"), epochs=1)
    with pytest.raises(SkipwayError, match="inside the data folder"):
        train(recipe, tmp_path / "data/runs/1")
    train(recipe, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["test", "train"]


def test_a_folder_smaller_than_a_batch(tmp_path):
    outcome = train(changed(TINY, data=pictures(tmp_path / "data"), epochs=3), tmp_path / "run")
    assert outcome.recipe.batch_size == 14
    assert outcome.recipe.lr == pytest.approx(0.1 * 14 / 128)
    assert json.loads(outcome.folder.split.read_text())["split_off"] == {"validation": 0.1}


def test_a_source_with_all_splits_needs_no_file_list(tmp_path):
    outcome = train(changed(TINY, data=pictures(tmp_path / "data", ("Train", "Valid", "Testing"))), tmp_path / "run")
    assert outcome.recipe.batch_size == 16
    assert not outcome.folder.split.exists()


def test_large_images_are_trained_from_their_files(tmp_path):
    recipe = changed(TINY, data=pictures(tmp_path / "data", parts=("",)), crop="resized", workers=0, size=16)
    whole = train(recipe, tmp_path / "whole")
    assert len(json.loads(whole.folder.split.read_text())["test"]) == 4
    train(recipe, tmp_path / "stopped", stop=StopAfter(1))
    assert_same(whole, train(None, tmp_path / "stopped", resume=True))


def test_a_model_that_has_to_know_the_image_size_is_told(tmp_path):
    outcome = train(changed(TINY, model="vit-tiny-16", depth=1, width=None, size=16, epochs=1), tmp_path / "run")
    _, metadata = read_tensors(outcome.folder.last)
    assert metadata["model"]["image"] == 16
    sw.load(sw.build(**metadata["model"]), outcome.folder.last)


def test_data_that_changed_is_noticed(tmp_path):
    data = pictures(tmp_path / "data")
    train(changed(TINY, data=data), tmp_path / "run", stop=StopAfter(1))
    shutil.copy(data / "train/dark/0.png", data / "train/dark/extra.png")
    with pytest.raises(DataError, match=r"since the run began: 32 images then, 33 now; new 'train/dark/extra.png'"):
        train(None, tmp_path / "run", resume=True)
    shutil.copytree(data / "train/dark", data / "train/new")
    with pytest.raises(CheckpointError, match=r"gone \[\], new \['new'\]"):
        train(None, tmp_path / "run", resume=True)


def test_starting_from_weights(tmp_path):
    first = train(TINY, tmp_path / "first")
    again = train(changed(TINY, start=first.folder.last, lr=1e-12), tmp_path / "again")
    trained, start = weights(again)["stem.conv.weight"], weights(first)["stem.conv.weight"]
    assert torch.allclose(trained, start, atol=1e-6)
    with pytest.raises(CheckpointError, match="do not fit"):
        train(changed(TINY, start=first.folder.last, width=8), tmp_path / "wider")
    assert not (tmp_path / "wider").exists()
    with pytest.raises(CheckpointError):
        train(changed(TINY, start=tmp_path / "none.safetensors"), tmp_path / "none")


def test_divergence_says_where_and_keeps_the_last_good_state(tmp_path):
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) in epoch 1, step \d of 5.*Try a lower --lr"):
        train(changed(TINY, lr=1e30, warmup=0.0), tmp_path / "run")
    snapshot, damaged = Checkpoints(tmp_path / "run/checkpoints").newest()
    assert snapshot.state["progress"]["epoch"] == 0
    assert not damaged
    tensors = [tensor for part in snapshot.tensors.values() for tensor in part.values()]
    assert all(torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    model = sw.build("resnet20", depth=8, width=4, classes=10, channels=1)
    with torch.no_grad():
        model.stem.conv.weight[0, 0, 0, 0] = torch.nan
    write_tensors(tmp_path / "nan.safetensors", model.state_dict(), {})
    with pytest.raises(DivergedError, match="a weight is not finite"):
        train(changed(TINY, start=tmp_path / "nan.safetensors"), tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists()


def test_every_role_of_parameter_gets_its_own_rate():
    """Fixup's scalars train at a tenth of the rate (Zhang 2019, the authors' scripts)."""
    model = sw.build("resnet20", scheme="fixup")
    rates = {group["name"].split("×")[0]: group["lr"] for group in sw.param_groups(model, lr=0.1, weight_decay=5e-4)}
    assert rates["gain"] == pytest.approx(0.01)
    assert rates["weight"] == pytest.approx(0.1)


def test_what_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.undo()  # of all digits

    class Heard(SilentReporter):
        quiet = False

        def __init__(self):
            self.lines: list[tuple[str, str]] = []

        def message(self, label, text):
            self.lines.append((label, text))

    reporter = Heard()
    train(changed(TINY, epochs=1, batch_size=256), tmp_path / "run", reporter=reporter)
    labels = [label for label, _ in reporter.lines if label]
    assert labels == [
        "run",
        "data",
        "split",
        "model",
        "recipe",
        "device",
        "memory",
        "options",
        "note",
        "note",
        "signal",
        "verdict",
        "images",
    ]
    text = dict(reporter.lines)
    assert text["data"].startswith("digits: 1,797 images, 10 classes, input 8x8 grey; smallest class '8'")
    assert "3 residual connections" in text["model"]
    assert "float32 (as requested)" in text["device"]
    assert text["verdict"]
