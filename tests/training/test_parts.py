"""The parts of training, each against theory or a named reference: schedule, interval, metrics, storage, recipe."""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from skipway.checkpoint.files import read_tensors, write_json, write_tensors
from skipway.data import Batch
from skipway.errors import CheckpointError, SkipwayError
from skipway.hardware.device import choose_device, choose_precision, seed_torch
from skipway.inference.evaluation import evaluate, wilson_interval
from skipway.optim.schedules import SCHEDULES, lr_factor, set_lr
from skipway.recipe import Recipe, ResolvedRecipe, read_recipe
from skipway.training.preflight import schedule_remarks
from skipway.training.run_folder import RunFolder


def batch(inputs: torch.Tensor, labels: torch.Tensor) -> Batch:
    return Batch(inputs, labels, labels, torch.arange(len(labels)))


TINY = {"depth": 8, "width": 4, "channels": 1}
SMALL = {"depth": 8, "channels": 1}


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine():
    factors = [lr_factor(step, 1000, 0.1) for step in range(1000)]
    assert factors[:100] == pytest.approx([(step + 1) / 100 for step in range(100)])
    assert factors[100] == 1.0
    assert factors[550] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-5
    assert all(later < earlier for earlier, later in pairwise(factors[100:]))


def test_the_rate_agrees_with_torchs_cosine():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    ours = torch.optim.SGD([parameter], lr=0.3)
    for step in range(50):
        set_lr(ours, lr_factor(step, 50, 0.0))
        assert ours.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_rates_of_groups_keep_their_proportion():
    parts = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.01)]
    optimizer = torch.optim.SGD(parts)
    for factor in (0.5, 1.0, 0.25):
        set_lr(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * factor, 0.01 * factor])


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (1, 7), (350, 360), (360, 360), (5000, 10_000)])
def test_the_interval_is_wilsons(correct, total):
    from scipy.stats import binomtest

    reference = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, total) == pytest.approx((reference.low, reference.high), abs=1e-9)


def test_evaluation_agrees_with_scikit_learn_and_with_the_whole_set_at_once():
    from sklearn.metrics import accuracy_score, confusion_matrix

    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4))
    inputs, labels = torch.randn(50, 8), torch.randint(0, 4, (50,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [batch(*pair) for pair in zip(inputs.split(7), labels.split(7), strict=True)]
    result = evaluate(model, batches, classes=4, autocast=torch.no_grad)
    assert result is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    logits = model.eval()(inputs).detach()
    predicted = logits.argmax(1)
    assert result.confusion.tolist() == confusion_matrix(labels, predicted, labels=range(4)).tolist()
    assert result.accuracy == accuracy_score(labels, predicted)
    assert result.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_worst_class_and_top_confusion():
    from skipway.inference.evaluation import Evaluation

    result = Evaluation(0.0, torch.tensor([[9, 1, 0], [4, 6, 0], [0, 0, 0]]))
    assert result.worst_class() == (1, pytest.approx(0.6), 10)
    assert result.top_confusion() == (1, 0, 4)
    assert Evaluation(0.0, torch.eye(2, dtype=torch.int64)).top_confusion() is None


def test_an_evaluation_that_is_stopped_has_no_result():
    batches = [batch(torch.randn(2, 3), torch.zeros(2, dtype=torch.int64))] * 2
    model = nn.Linear(3, 2)
    assert evaluate(model, batches, classes=2, autocast=torch.no_grad, stop=lambda: True) is None


@pytest.mark.parametrize("count", [0, 1, 3])
def test_ranks_run_a_network_equally_often_whatever_their_share(count):
    """Three rounds, of two passes each with the mirror images; the fillers count for nothing."""
    passes, images = [], torch.randn(5, 1, 2, 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model.register_forward_hook(lambda *_: passes.append(1))
    batches = [batch(images, torch.zeros(5, dtype=torch.int64))] * count
    choices = {"classes": 2, "autocast": torch.no_grad, "flip": True, "rounds": 3, "filler": images[:2]}
    result = evaluate(model, batches, **choices)
    assert len(passes) == 6
    assert result is not None
    assert result.total == 5 * count


WRONG = [
    ({"lr": 0.0}, "lr=0.0: the rule is lr > 0"),
    ({"lr": math.nan}, "lr=nan"),
    ({"epochs": 0}, "epochs=0: the rule is epochs >= 1"),
    ({"batch_size": -3}, "batch_size=-3"),
    ({"depth": 0}, "depth=0"),
    ({"width": 0}, "width=0"),
    ({"holdout": 1.0}, "0 < holdout < 1"),
    ({"warmup": 1.0}, "0 <= warmup < 1"),
    ({"optimizer": "sgd(momentum=-0.1)"}, "0 <= momentum < 1"),
    ({"optimizer": "sdg"}, "unknown optimizer 'sdg'; did you mean 'sgd'"),
    ({"schedule": "cosine(floor=2)"}, "0 <= floor < 1"),
    ({"clip": "norm(0)"}, "most > 0"),
    ({"augment": "mixup+mixup"}, "mixup is given twice"),
    ({"time": "soon"}, "hours, minutes, seconds"),
    ({"ema": 1.0}, "0 < ema < 1"),
    ({"layer_decay": 0.0}, "0 < layer_decay <= 1"),
    ({"accumulate": 3, "batch_size": 128}, "accumulate=3: the rule is a divisor of batch_size, which is 128"),
    ({"weight_decay": -1.0}, "weight_decay >= 0"),
    ({"workers": -1}, "workers >= 0"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_impossible_recipes_name_the_rule(fields, message):
    with pytest.raises(SkipwayError, match=message):
        Recipe(**fields)


@pytest.mark.parametrize("name", SCHEDULES.entries)
@pytest.mark.parametrize("given", [{}, {"warmup": 0.2}])
def test_the_rate_rises_once(name, given):
    """Up to its peak and then never again, whatever the schedule; a warm-up that is given is what is done, with a
    remark where the rate then rises twice.
    """
    recipe = ResolvedRecipe.of(Recipe(schedule=name, **given))
    assert recipe.warmup == given.get("warmup", 0.0 if name == "onecycle" else 0.05)
    remarks = list(schedule_remarks(recipe))
    if given and name == "onecycle":
        assert "rises once more" in remarks[0]
        return
    assert not remarks
    factors = [lr_factor(step, 100, recipe.warmup, recipe.schedule_shape) for step in range(100)]
    top = factors.index(max(factors))
    assert max(factors) == pytest.approx(1.0, abs=0.02)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


def test_a_recipe_survives_json(tmp_path):
    recipe = Recipe(data=Path("a/b"), lr=0.03, scheme="layerscale(init=1e-5)", flip=False, start="w.safetensors")
    write_json(tmp_path / "config.json", {"recipe": recipe.to_json()})
    assert read_recipe(tmp_path / "config.json") == recipe


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"weights": "w.safetensors"}, Recipe(start="w.safetensors")),
        ({"weights": None}, Recipe(start=None)),
        ({"freeze": 0, "linear_probe": "none"}, Recipe(freeze="none")),
        ({"freeze": 2}, Recipe(freeze="2")),
        ({"freeze": 2}, Recipe(freeze=2)),
        ({"freeze": 0, "linear_probe": "only"}, Recipe(freeze="all")),
        ({"linear_probe": "first"}, Recipe(freeze="first")),
    ],
)
def test_recipes_with_earlier_names_are_read(stored, expected):
    assert Recipe.from_json(stored, "config.json") == expected


def test_recipes_of_texts_from_before_a_choice_was_left_open():
    stored = {"grey16": "range", "fit": "crop"}
    Recipe.from_json(stored, "config.json").check_kind("text", "book.txt")
    with pytest.raises(SkipwayError, match="grey16='minmax': an option for images"):
        Recipe.from_json({**stored, "grey16": "minmax"}, "config.json").check_kind("text", "book.txt")


@pytest.mark.parametrize("freeze", ["some", "0", -1, "blocks", "blocks(0)", "all(views=-1)", "blocks(1.5)"])
def test_what_cannot_be_frozen_is_refused(freeze):
    with pytest.raises(SkipwayError, match="freeze|blocks|views"):
        Recipe(freeze=freeze)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "has no recipe"), ('{"recipe": {"epoch": 3}}', "did you mean 'epochs'")],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_recipe(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_recipe(tmp_path / "none.json")


def test_tensors_come_back_as_they_were(tmp_path):
    tied = torch.randn(3)
    tensors = {
        "image": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor(7),
        "one": tied,
        "other": tied,
    }
    write_tensors(tmp_path / "t.safetensors", tensors, {"state": {"epoch": 3, "name": "Ærø"}})
    found, metadata = read_tensors(tmp_path / "t.safetensors")
    assert metadata == {"state": {"epoch": 3, "name": "Ærø"}}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.zeros(2)}, {})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="the disk is full: free some space"):
        write_tensors(path, {"a": torch.ones(2)}, {})
    assert read_tensors(path)[0]["a"].tolist() == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


def test_files_have_the_rights_that_the_user_gives_new_files(tmp_path):
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(2)}, {})
    assert (tmp_path / "t.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_damaged_tensor_files_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.zeros(100)}, {})
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:-1], b"\xff" * 300, b"{}" * 30):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            read_tensors(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_tensors(tmp_path / "none.safetensors")


def test_devices_and_precision():
    cpu = choose_device("cpu")
    assert choose_precision("bfloat16", cpu) == ("bfloat16", "as requested")
    setting, reason = choose_precision("auto", cpu)
    assert (setting == "bfloat16") == reason.startswith("native")
    for name in ("gpuu", "cuda:99"):
        with pytest.raises(SkipwayError, match=f"device '{name}' cannot be used"):
            choose_device(name)


def test_bfloat16_is_used_only_where_the_cpu_has_it(monkeypatch):
    for native in (False, True):
        monkeypatch.setattr("skipway.hardware.device.cpu_has_bfloat16", lambda native=native: native)
        assert choose_precision("auto", torch.device("cpu"))[0] == ("bfloat16" if native else "float32")


def test_metrics_behind_the_checkpoint_are_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    for epoch in (1, 2, 3):
        folder.append_metrics({"epoch": epoch})
    with folder.metrics.open("a") as file:
        file.write('{"epoch": 4, "tr')
    folder.keep_metrics(2)
    assert [json.loads(line)["epoch"] for line in folder.metrics.read_text().splitlines()] == [1, 2]


def test_seeding_in_a_loop_keeps_nothing():
    """`torch.manual_seed` keeps a call and a stack trace for every kind of device that is not there."""
    torch.manual_seed(3)
    expected, kept = torch.rand(4), len(torch.cuda._queued_calls)
    seed_torch(3)
    assert torch.equal(torch.rand(4), expected)
    assert torch.accelerator.is_available() or len(torch.cuda._queued_calls) == kept
