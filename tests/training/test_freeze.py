"""Frozen layers: which ones, in which mode, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.checkpoint.files import read_tensors
from skipway.errors import SkipwayError
from skipway.training.freeze import freeze_layers, frozen_modules
from skipway.training.loop import open_run
from skipway.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("few_digits")
BASE = sw.Recipe(model="resnet", depth=14, width=8, epochs=1, batch_size=14, device="cpu", precision="float32", ema=0.5)


def saved_bytes(tmp_path, freeze: str) -> int:
    """Bytes that autograd keeps of a step on 32 images."""
    found = []

    def pack(tensor):
        found.append(tensor.numel() * tensor.element_size())
        return tensor

    with open_run(
        replace(BASE, freeze=freeze),
        RunFolder(tmp_path),
        resume=False,
        overwrite=True,
        reporter=None,
        stop=lambda: False,
        began=0.0,
    ) as run:
        run.model.train()
        freeze_layers(run)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run.network(run.example[:1].expand(32, -1, -1, -1)).sum().backward()
        gradients = {name for name, parameter in run.model.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("stem") for name in gradients) == (freeze == "none")
    return sum(found)


def test_frozen_blocks_are_not_differentiated(tmp_path):
    whole, some, most = (saved_bytes(tmp_path, freeze) for freeze in ("none", "blocks(2)", "blocks(5)"))
    assert most < some < 0.8 * whole


def test_frozen_blocks_do_not_change_in_a_run(tmp_path):
    frozen, still = (
        sw.from_pretrained(sw.train(replace(BASE, **choices, health=0.5), tmp_path / name).folder.last).state_dict()
        for name, choices in (("frozen", {"freeze": "blocks(2)"}), ("still", {"lr": 1e-12, "freeze": "blocks(6)"}))
    )
    same = {name for name in frozen if torch.equal(frozen[name], still[name])}
    layers = {".".join(name.split(".")[:3]) for name in set(frozen) - same if name.startswith("stages")}
    assert all(name in same for name in frozen if name.startswith("stem"))
    assert layers == {name for name in layers if not name.startswith("stages.0")}
    assert layers


def test_more_blocks_than_there_are_is_refused(tmp_path):
    with pytest.raises(SkipwayError, match=r"blocks\(7\).*has 6 blocks"):
        sw.train(replace(BASE, freeze="blocks(7)"), tmp_path / "run")


def test_a_dropout_is_frozen_before_what_learns_and_not_behind():
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2), nn.Dropout())
    for number in (1, 2):
        model[number].requires_grad_(False)
    frozen = frozen_modules(model, torch.zeros(2, 4))
    assert [number for number, module in enumerate(model) if any(module is each for each in frozen)] == [0, 1, 2, 3]
    with torch.no_grad():
        assert model.training


@pytest.mark.parametrize(("freeze", "kept"), [("first", True), ("none", False)])
def test_statistics_that_the_classifier_was_fitted_with_stay(tmp_path, monkeypatch, freeze, kept):
    """Batches of other images than the weights were trained on would shift the features under the fitted classifier."""
    monkeypatch.setenv("SKIPWAY_CACHE", str(tmp_path / "cache"))
    begun = sw.train(replace(BASE, ema=None), tmp_path / "begun")
    recipe = replace(BASE, ema=None, start=begun.folder.last, freeze=freeze)
    before, after = (read_tensors(run.folder.last)[0] for run in (begun, sw.train(recipe, tmp_path / "run")))
    statistics = [name for name in before if "running" in name]
    assert statistics
    assert all(torch.equal(before[name], after[name]) == kept for name in statistics)
    learned = next(name for name in before if name.startswith("stem") and name.endswith("weight"))
    assert not torch.equal(before[learned], after[learned])
