"""The memory that training takes: what is measured before the first step, and the batch that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.trials.reporting import Notes
from torch import nn

from skipway.recipe import Recipe
from skipway.training import memory, train
from skipway.training.memory import MemoryNeed, optimizer_bytes

SMALL = Recipe(model="resnet20", depth=8, width=4, epochs=1, device="cpu", precision="float32", health=0)
GB = 10**9


def need(free: float | None) -> MemoryNeed:
    """1 GB for each 100 images."""
    return MemoryNeed(held=GB, state=0.1 * GB, per_image=0.01 * GB, constant=0.0, free=free)


@pytest.mark.parametrize(
    ("optimizer", "moments"), [("sgd", 1), ("adamw", 2), ("lion", 1), ("lamb", 2)], ids=lambda value: str(value)
)
def test_the_state_of_an_optimizer_is_that_after_a_step(optimizer, moments):
    """A momentum, or two moments, of every parameter."""
    layer = nn.Linear(50, 30)
    built = replace_optimizer(optimizer).build([{"params": list(layer.parameters()), "lr": 0.1, "weight_decay": 0.0}])
    assert optimizer_bytes(built) == moments * 4 * (50 * 30 + 30)
    assert not built.state, "the optimizer itself takes no step"


def replace_optimizer(name: str):
    """The description of an optimizer."""
    from skipway.optim.optimizers import parse_optimizer

    return parse_optimizer(name)


def test_memory_is_said_before_the_first_step(tmp_path):
    notes = Notes()
    train(SMALL, tmp_path / "run", reporter=notes)
    labels = [label for label, _ in notes.lines]
    text = dict(notes.lines)["memory"]
    assert labels.index("memory") < labels.index("time") if "time" in labels else True
    assert "GB with batch_size=128" in text
    assert "GB are free" in text


def test_a_default_batch_is_made_smaller_until_it_fits(tmp_path, monkeypatch):
    """0.7 GB are free: 0.56 may be taken, 0.46 for images, which 32 take 0.32 of."""
    monkeypatch.setattr(memory, "measure_memory", lambda run: need(0.7 * GB))
    notes = Notes()
    outcome = train(SMALL, tmp_path / "run", reporter=notes)
    assert outcome.recipe.batch_size == 32
    assert outcome.recipe.lr == pytest.approx(0.1 * 32 / 128), "the default rate is that of the batch"
    assert notes.said("batch_size=128 would not fit into memory: batch_size=32 is taken")


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (0.7 * GB, ["batch_size=64 will not fit into memory: batch_size=32 does, and accumulate=2"]),
        (0.01 * GB, ["nor will batch_size=1"]),
        (100 * GB, []),
        (None, []),
    ],
)
def test_a_given_batch_is_kept_and_remarked_upon(tmp_path, monkeypatch, free, said):
    monkeypatch.setattr(memory, "measure_memory", lambda run: need(free))
    notes = Notes()
    outcome = train(replace(SMALL, batch_size=64), tmp_path / "run", reporter=notes)
    assert outcome.recipe.batch_size == 64
    assert [any(notes.said(words)) for words in said] == [True] * len(said)
    assert bool(notes.said("not fit into memory")) == bool(said)


def test_activations_are_counted_by_image():
    """A network that keeps 8 numbers of each image for the backward pass of its square, and nothing else."""

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.flatten(1) * self.scale).square()

    from skipway.surgery.saved_tensors import saved_bytes

    model = Squares()
    kept = [saved_bytes(model, torch.zeros(count, 2, 2, 2)) for count in (2, 4)]
    assert (kept[1] - kept[0]) / 2 == 2 * 4 * 8, "the input of the product and that of the square"
