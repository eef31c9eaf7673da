"""Kind: a batch, or a part of one, on which statistics over the batch fail or are noise.

| trial | input | right value |
|---|---|---|
| A5 | one image of 1x1 in the last maps, with BatchNorm | refused before the first step; the ways out named work |
| A5 | `accumulate` that leaves one image in a part | the same, with a smaller `accumulate` |
| | `grow_from` whose first images end in 1x1 maps | the same |
| | networks without statistics over the batch | trained with batches of 1 |
| | images too small for the network | refused with the reason |
| | statistics over few values, or of few steps | a remark with the numbers |
| | out of memory, and parts of one image fail | an error that says both |
"""

from __future__ import annotations

import re

import pytest
import torch
from tests.trials.pictures import write_images
from tests.trials.reporting import Notes

import skipway as sw
from skipway.errors import SkipwayError

SMALL = {"width": 4, "device": "cpu", "workers": 0, "precision": "float32", "health": 0.0, "epochs": 1}


def train(folder, reporter=None, **options):
    data = folder / "data"
    if not data.exists():
        write_images(data, {"cat": 10, "dog": 10}, side=(32, 32))
    return sw.train(sw.Recipe(data, **{**SMALL, **options}), folder / "run", reporter=reporter, overwrite=True)


@pytest.mark.parametrize(
    "options",
    [
        {"model": "resnet18", "batch_size": 1},
        {"model": "resnet18", "batch_size": 4, "accumulate": 4},
        {"model": "resnet18", "batch_size": 8, "accumulate": 8},
        {"model": "resnet18", "size": 64, "grow_from": 16, "batch_size": 1},
    ],
)
def test_one_value_per_channel_is_refused_before_the_first_step(tmp_path, options):
    options = {"size": 32, **options}
    with pytest.raises(SkipwayError, match="more than 1 value per channel") as refused:
        train(tmp_path, **options)
    assert not (tmp_path / "run").exists()
    ways = dict(re.findall(r"(batch_size|accumulate|size)=(\d+)", str(refused.value).rpartition("runs with")[2]))
    assert ways
    assert ("batch_size" in ways) == (2 * options.get("accumulate", 1) <= 14), "14 images to train on"
    assert ("accumulate" in ways) == (options.get("accumulate", 1) > 1)
    for name, value in ways.items():
        assert train(tmp_path, **{**options, name: int(value)}).finished, name


@pytest.mark.parametrize(
    "options",
    [
        {"model": "vit-tiny-16", "width": None, "depth": 2, "size": 32},
        {"model": "resnet20", "size": 32},
        {"model": "convnext-atto", "depth": 4, "size": 32},
    ],
)
def test_networks_that_run_on_one_image_are_trained_on_one(tmp_path, options):
    write_images(tmp_path / "data", {"cat": 3, "dog": 3}, side=(32, 32))
    assert train(tmp_path, batch_size=1, validation=0.0, **options).finished


def test_statistics_of_few_values_and_few_steps_are_remarked_upon(tmp_path):
    notes = Notes()
    train(tmp_path, notes, model="resnet18", size=32, batch_size=2)
    assert notes.said("normalises with the mean and variance of 2 values, those of 2 images")
    # 7 steps of momentum 0.1 leave 0.9^7 = 48 % of the start
    assert notes.said("after 7 steps the running mean and variance of")
    assert notes.said("are still 48 % their initial values")


def test_enough_statistics_are_no_remark(tmp_path):
    notes = Notes()
    train(tmp_path, notes, model="resnet8", size=32, batch_size=2, epochs=5)
    assert not notes.said("mostly noise")
    assert not notes.said("running mean")


def test_parts_that_fail_after_memory_ran_out_are_named(tmp_path, monkeypatch):
    from skipway.training import step

    real = step.backward

    def small(run, batch):
        if len(batch.inputs) // run.progress.accumulation > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return real(run, batch)

    monkeypatch.setattr(step, "backward", small)
    with pytest.raises(
        SkipwayError, match="out of memory: a batch of 4 does not fit, and parts of 1 cannot be trained"
    ):
        train(tmp_path, model="resnet18", size=32, batch_size=4, memory="split")


def test_the_trial_leaves_no_trace(tmp_path):
    """The same weights as without it."""
    from skipway.training import loop

    torch.manual_seed(0)
    first = train(tmp_path, model="resnet8", batch_size=4).folder.last.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "check_forward", lambda run: None)
        assert train(tmp_path, model="resnet8", batch_size=4).folder.last.read_bytes() == first
