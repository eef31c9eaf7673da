"""The clock of a residual warm-up in a run: it counts optimizer steps, and goes on where weights end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.training.test_loop import StopAfter, assert_same

import skipway as sw
from skipway.checkpoint.files import read_tensors
from skipway.nn import warmup_state
from skipway.recipe import Recipe
from skipway.training.budget import Plan
from skipway.training.loop import train
from skipway.training.reporter import SilentReporter
from skipway.training.residual_warmup import move_warmup, warmup_lines

pytestmark = pytest.mark.usefixtures("few_digits")
SMALL = Recipe(model="resnet20", depth=8, width=4, epochs=2, batch_size=28, device="cpu", precision="float32")


class Heard(SilentReporter):
    """Keeps what is said."""

    quiet = False

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def message(self, label: str, text: str) -> None:
        self.lines.append((label, text))

    def about(self, words: str) -> list[tuple[str, str]]:
        return [line for line in self.lines if words in line[1]]


def clock(path: Path) -> set[tuple[int, int]]:
    """Step and end of all branches in a file of weights."""
    tensors, _ = read_tensors(path)
    names = [name.removesuffix(".step") for name in tensors if name.endswith(".step")]
    assert len(names) == 3
    return {(int(tensors[f"{name}.step"]), int(tensors[f"{name}.end"])) for name in names}


@pytest.mark.parametrize("ema", [None, 0.9])
def test_one_optimizer_step_is_one_step_of_the_clock(tmp_path, ema):
    """Whatever the parts of a batch, in the weights and in their average."""
    recipe = dataclasses.replace(SMALL, scheme="prores(0.5)", accumulate=2, ema=ema)
    outcome = train(recipe, tmp_path / "run")
    steps = outcome.epoch * (outcome.folder.read_config()["data"]["train"] // 28)
    end = round(0.5 * steps)
    assert clock(outcome.folder.last) == {(end, end)}, "it stops at its end"


def test_a_warm_up_longer_than_the_run_is_said_before_and_after(tmp_path):
    heard = Heard()
    outcome = train(dataclasses.replace(SMALL, scheme="prores(1000)", epochs=1), tmp_path / "run", reporter=heard)
    ((_, planned),) = heard.about("warmed up one block after the other")
    assert "the last one at step 3,000 of " in planned
    ((label, before),) = heard.about("never have their full size")
    assert label == "note"
    assert "scheme='prores(0.25)'" in before
    assert heard.about("ended before the residual warm-up: the network stands at step")
    ((step, end),) = clock(outcome.folder.last)
    assert 0 < step < end == 3000


def test_weights_whose_warm_up_is_over_are_tuned_with_all_branches(tmp_path):
    """Set back to 0 the clock would make a trained network its shortcuts."""
    done = train(dataclasses.replace(SMALL, scheme="prores(2)"), tmp_path / "done")
    before = clock(done.folder.last)
    assert before == {(6, 6)}
    heard = Heard()
    again = dataclasses.replace(SMALL, scheme="prores(2)", epochs=1, start=done.folder.last)
    assert clock(train(again, tmp_path / "again", reporter=heard).folder.last) == before
    assert heard.about("over in the initial weights")


@pytest.mark.parametrize(
    ("scheme", "words"),
    [("prores(0.25)", "the last one after 0.25 of the steps that fit into the time"), ("prores(7)", "one at step 21")],
)
def test_with_a_time_the_length_of_the_run_is_not_made_up(scheme, words):
    network = sw.build("resnet-cifar", depth=8, width=4, stem_width=4, scheme=scheme)
    progress = SimpleNamespace(plan=Plan(end=400, length=10), planned=False)
    recipe = SimpleNamespace(time="9m", initial_weights=None)
    run = SimpleNamespace(model=network, recipe=recipe, progress=progress, global_step=0, warmup_offset=0)
    ((label, text),) = warmup_lines(run)
    assert label == "branches"
    assert text.endswith(words)
    run.warmup_offset, run.global_step = None, 300  # a run that is resumed after the end of its warm-up
    assert list(warmup_lines(run)) == []


def test_weights_in_the_middle_of_their_warm_up_go_on(tmp_path):
    done = train(dataclasses.replace(SMALL, scheme="prores(1000)", epochs=1), tmp_path / "done")
    ((step, _),) = clock(done.folder.last)
    again = dataclasses.replace(SMALL, scheme="prores(1000)", epochs=1, start=done.folder.last)
    assert clock(train(again, tmp_path / "again").folder.last) == {(2 * step, 3000)}


NETWORK = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x):
        return x + self.branch(x)

def network():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    return nn.Sequential(nn.Conv2d(3, 4, 3), Block(), Block(), Block(), *head)
"""


def test_networks_of_others_start_at_0(tmp_path):
    """They are dressed at the end of their warm-up, where a trained network is unchanged, and have no weights here."""
    file = tmp_path / "mine.py"
    file.write_text(NETWORK)
    own = Recipe(model=f"{file}:network", epochs=1, batch_size=28, device="cpu", precision="float32")
    scratch = dataclasses.replace(own, scheme="prores(1000)")
    stopped = train(scratch, tmp_path / "scratch", stop=StopAfter(2))
    ((step, end),) = clock(stopped.folder.last)
    assert 0 < step < end == 3000
    whole = train(scratch, tmp_path / "whole")
    assert_same(whole, train(None, tmp_path / "scratch", resume=True))


def test_other_plans_move_no_factor_back():
    """With a time budget the length of a run changes on the way, and the part that is done does not."""
    network = sw.build("resnet-cifar", depth=8, width=4, stem_width=4, scheme="prores(1.0)")
    plan = Plan(end=1000, length=10)
    run = SimpleNamespace(model=network, warmup_offset=0, global_step=500, progress=SimpleNamespace(plan=plan))
    move_warmup(run)
    before = warmup_state(network).factors
    assert before[-1] == pytest.approx(0.5)
    run.progress.plan = plan.extended(500, 700)
    move_warmup(run)
    assert warmup_state(network).factors == pytest.approx(before, abs=2e-3)
    run.global_step = 700
    move_warmup(run)
    assert not warmup_state(network).running
    assert run.warmup_offset is None
