"""A run that continues ends in the bits of one that nobody stopped: families x schemes, every option with a state."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.training.test_loop import StopAfter, assert_same

from skipway.errors import SkipwayError
from skipway.recipe import Recipe
from skipway.training.loop import train
from skipway.training.reporter import SilentReporter

BASE = Recipe(epochs=2, batch_size=256, device="cpu", precision="float32", ema=0.9, accumulate=2)
FAMILIES = {
    "resnet": {"model": "resnet20", "depth": 8, "width": 4},
    "vit": {"model": "vit-tiny-16", "depth": 1, "size": 16, "optimizer": "adamw"},
    "convnext": {"model": "convnext-atto", "depth": 4, "width": 4, "size": 32, "optimizer": "adamw"},
    "swin": {"model": "swin-tiny", "depth": 8, "width": 12, "size": 32, "optimizer": "adamw"},
}


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize(
    ("family", "scheme"),
    [("resnet", "fixup"), ("resnet", "plain"), ("vit", "layerscale"), ("convnext", "skipinit"), ("swin", "plain")],
)
def test_mid_epoch_interruption(tmp_path, family, scheme):
    """With stochastic depth, an average of the weights and batches in parts."""
    recipe = dataclasses.replace(BASE, **FAMILIES[family], scheme=f"{scheme} + stochasticdepth(0.3)", batch_size=28)
    whole = train(recipe, tmp_path / "whole")
    assert not train(recipe, tmp_path / "stopped", stop=StopAfter(2)).finished
    assert not train(None, tmp_path / "stopped", resume=True, stop=StopAfter(5)).finished
    assert_same(whole, train(None, tmp_path / "stopped", resume=True))


OPTIONS = [
    {"optimizer": "lion"},
    {"optimizer": "lamb", "scheme": "depthscaled(exponent=0.5, base=1)"},
    {"optimizer": "muon"},
    {"schedule": "onecycle", "warmup": 0.0},
    {"schedule": "step(at=(0.5,), factor=0.5)", "clip": "agc(0.02)"},
    {"augment": "trivial+mixup(0.4)+cutmix+erasing", "label_smoothing": 0.1},
    {"augment": "rand", "layer_decay": 0.7},
    {"freeze": "1"},
    {"freeze": "blocks(1)"},
    {"size": 16, "grow_from": 8, "class_weights": "balanced", "flip_test": True},
    {"start": "whitened"},
    {"scheme": "layerscale + prores(0.7)"},
    {"scheme": "prores(2, 'stagewise-0')"},
    {"precision": "bfloat16", "save_every": 2},
    {"precision": "float16", "clip": "norm(1.0)"},
]


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_option_continues_exactly(tmp_path, options):
    if options.get("optimizer") in ("lion", "lamb", "muon"):
        pytest.importorskip("pytorch_optimizer")
    recipe = dataclasses.replace(BASE, **FAMILIES["resnet"], **options, epochs=3, batch_size=28)
    whole = train(recipe, tmp_path / "whole")
    assert not train(recipe, tmp_path / "stopped", stop=StopAfter(3)).finished
    assert not train(None, tmp_path / "stopped", resume=True, stop=StopAfter(6)).finished
    assert_same(whole, train(None, tmp_path / "stopped", resume=True))


@pytest.mark.usefixtures("few_digits")
def test_parts_of_a_batch_have_the_gradient_of_the_whole(tmp_path):
    """Without a norm over the batch, accumulation changes nothing but rounding."""
    recipe = Recipe(**FAMILIES["vit"], epochs=1, batch_size=28, device="cpu", precision="float32")
    whole = train(recipe, tmp_path / "whole").folder.read_metrics()[0]
    parts = train(dataclasses.replace(recipe, accumulate=4), tmp_path / "parts").folder.read_metrics()[0]
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)
    assert parts["validation_loss"] == pytest.approx(whole["validation_loss"], rel=1e-4)


def test_the_average_is_what_is_tested_and_kept(tmp_path):
    """With a decay near 1 the rising decay (1 + t)/(10 + t) holds: a_t = d a + (1 - d) w, by hand."""
    from skipway.training.ema import ModelEMA

    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average, expected = ModelEMA(model, 0.9999), 0.0
    for update in range(1, 30):
        torch.nn.init.constant_(model.weight, float(update))
        average.update(model, update)
        decay = (1 + update) / (10 + update)
        expected = decay * expected + (1 - decay) * update
    assert float(average.tensors["weight"]) == pytest.approx(expected, rel=1e-5)


class Shared(torch.nn.Module):
    """A weight of several names, a part of it as a buffer, and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.head = self.embedding = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.head.weight)
        self.register_buffer("view", self.head.weight.detach()[0])

    def get_extra_state(self) -> torch.Tensor:
        return self.head.weight.detach() + 1

    def set_extra_state(self, state: torch.Tensor) -> None:
        pass


def test_averages_of_shared_tensors_are_swapped_in_and_out(tmp_path):
    from skipway.training.ema import ModelEMA

    model = Shared()
    average = ModelEMA(model, 0.9)
    torch.nn.init.ones_(model.head.weight)
    average.update(model, 1)
    kept = {name: tensor.clone() for name, tensor in average.tensors.items()}
    assert kept.keys() == {"view", "head.weight", "embedding.weight"}
    for _ in range(2):
        with average.applied(model):
            assert model.head.weight.item() == model.view.item() == pytest.approx(9 / 11)
        assert model.head.weight.item() == model.view.item() == 1.0
        assert all(torch.equal(tensor, kept[name]) for name, tensor in average.tensors.items())
    average.load({**kept, "_extra_state": torch.zeros(1, 1), "embedding.weight": torch.ones(1, 1)})
    with average.applied(model):  # the first name decides where a file has several values of a tensor
        assert model.head.weight.item() == pytest.approx(9 / 11)
    assert model.head.weight.item() == 1.0


@pytest.mark.usefixtures("few_digits")
def test_frozen_blocks_do_not_move(tmp_path):
    base = dataclasses.replace(BASE, **FAMILIES["resnet"], epochs=1, batch_size=28, ema=None)
    start = train(dataclasses.replace(base, lr=1e-9), tmp_path / "start")
    recipe = dataclasses.replace(base, freeze="1", start=start.folder.last, lr=0.1)
    tuned = train(recipe, tmp_path / "tuned")
    from skipway.checkpoint.files import read_tensors

    before, after = (read_tensors(outcome.folder.last)[0] for outcome in (start, tuned))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"head.classifier.weight", "head.classifier.bias"}


@pytest.mark.usefixtures("few_digits")
def test_patience_ends_a_run(tmp_path):
    recipe = dataclasses.replace(BASE, **FAMILIES["resnet"], epochs=9, batch_size=28, lr=1e-12, patience=2, ema=None)
    outcome = train(recipe, tmp_path / "run")
    assert outcome.finished
    assert outcome.epoch < 9
    assert outcome.epoch - outcome.best_epoch == 2


@pytest.mark.usefixtures("few_digits")
def test_a_time_budget_becomes_epochs(tmp_path):
    lines: list[str] = []

    class Heard(SilentReporter):
        def message(self, label: str, text: str) -> None:
            lines.append(label)

    recipe = dataclasses.replace(BASE, **FAMILIES["resnet"], epochs=1, batch_size=28, time="3s", ema=None)
    outcome = train(recipe, tmp_path / "run", reporter=Heard())
    assert "plan" in lines
    assert outcome.finished
    assert outcome.epoch > 1
    # a machine that others use as well is no clock, so only that the order of magnitude is right
    assert outcome.seconds < 40


def test_balanced_class_weights_are_scikit_learns(tmp_path):
    import numpy as np
    from sklearn.utils.class_weight import compute_class_weight

    from skipway.data import load
    from skipway.training.setup import class_weights

    data = load()
    expected = compute_class_weight("balanced", classes=np.arange(10), y=data.train.labels.numpy())
    found = class_weights(dataclasses.replace(BASE, class_weights="balanced"), data, torch.device("cpu"))
    assert found is not None
    assert found.numpy() == pytest.approx(expected, rel=1e-6)


def test_memory_that_runs_out_says_what_fits_or_splits(tmp_path, monkeypatch):
    """More than 64 images at a time do not fit here."""
    from skipway.training import step

    real = step.backward

    def small(run, batch):
        if len(batch.inputs) // run.progress.accumulation > 64:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return real(run, batch)

    monkeypatch.setattr(step, "backward", small)
    recipe = Recipe(**FAMILIES["vit"], epochs=1, batch_size=256, device="cpu", precision="float32")
    with pytest.raises(SkipwayError, match=r"one of 64 does \(measured\): use --batch-size 64, --accumulate 4"):
        train(recipe, tmp_path / "stop")
    split = train(dataclasses.replace(recipe, memory="split"), tmp_path / "split")
    monkeypatch.setattr(step, "backward", real)
    assert_same(split, train(dataclasses.replace(recipe, accumulate=4), tmp_path / "parts"))
