"""`Recipe.time`: the plan's arithmetic on simulated machines, and runs on a clock that the test moves."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.trials.reporting import Notes

from skipway.checkpoint.files import read_tensors
from skipway.checkpoint.store import Checkpoints
from skipway.errors import SkipwayError
from skipway.recipe import Recipe
from skipway.training import clock, image_task, loop, step, train
from skipway.training.budget import Plan, RunCosts, RunWork, plan_steps, validation_part
from skipway.training.cross_validation import cross_validate
from skipway.training.distributed import Ranks
from skipway.training.resume import resume_recipe
from skipway.training.run import Progress
from skipway.training.run_folder import RunFolder

# seconds of a step by (seconds of an ordinary step, part of the budget that is used, random numbers)
MACHINES: dict[str, Callable[[float, float, random.Random], float]] = {
    "constant": lambda step, _, __: step,
    "slowing": lambda step, used, _: step * (1 + 3 * used),
    "speeding": lambda step, used, _: step / (1 + 3 * used),
    "suddenly slow": lambda step, used, _: step * (4 if used > 0.5 else 1),
    "jittering": lambda step, _, draw: step * draw.lognormvariate(0, 0.5),
    "pausing": lambda step, _, draw: step * (5 if draw.random() < 0.05 else 1),
}


@dataclass
class Simulation:
    """A run on a machine, by the same functions as a real one; `trace` holds the part of the schedule at each step."""

    budget: float
    work: RunWork
    truth: RunCosts
    machine: Callable[[float, float, random.Random], float]
    draw: random.Random
    spent: float = 0.0
    trace: list[float] = field(default_factory=list)
    rounds: int = 0

    def run(self, startup: float) -> Simulation:
        self.spent = startup
        # what is known before the first step; images cost a little more than they did in the first measurement
        costs = replace(self.truth, step=0.0, weight=0.0, image=self.truth.image * self.draw.uniform(0.9, 1.1))
        plan, step, taken = Plan(end=1000, length=self.work.per_epoch), 0, 0
        while True:
            seconds = self.machine(self.truth.step, self.spent / self.budget, self.draw)
            seconds += 4 * self.truth.step if step == 0 else 0.0
            self.trace.append(plan.virtual_step(step) / plan.end)
            self.spent, step, taken = self.spent + seconds, step + 1, taken + 1
            costs = costs.with_steps(1, seconds)
            left = self.budget - self.spent
            if step == 1:
                self.work = replace(self.work, validation=validation_part(left, costs, self.work))
            settled = plan.length if self.rounds else 0
            steps, length, rounds = plan_steps(left, costs, self.work, step, taken, settled)
            plan = replace(plan.adjusted(step, steps), length=length)
            if step < plan.end and (taken < length or rounds == 1):
                continue
            self.rounds, taken = self.rounds + 1, 0
            self.spent += self.truth.validation(self.work.validation)
            costs = replace(costs, image=self.truth.image)
            if step >= plan.end:
                break
        self.trace.append(plan.virtual_step(step) / plan.end)
        self.spent += self.truth.ending(self.work.test)
        return self


def simulate(machine: str, seed: int) -> Simulation:
    """A run of random size: a budget of 30 steps and more, with a test that takes 1 to 30 % of it."""
    draw = random.Random(f"{machine} {seed}")
    step = 10 ** draw.uniform(-2, 1)
    budget = step * 10 ** draw.uniform(2, 4)
    test = draw.randint(50, 5000)
    work = RunWork(per_epoch=draw.choice([1, 7, 60, 800, 20_000]), validation=draw.randint(1, test), test=test)
    truth = RunCosts(step, 0.0, budget * draw.uniform(0.01, 0.3) / test, draw.uniform(0, step), draw.uniform(0, step))
    return Simulation(budget, work, truth, MACHINES[machine], draw).run(startup=budget * draw.uniform(0, 0.1))


@pytest.mark.parametrize("machine", MACHINES)
def test_a_run_ends_within_five_percent_of_its_budget(machine):
    for seed in range(60):
        found = simulate(machine, seed)
        assert found.spent == pytest.approx(found.budget, rel=0.05), (machine, seed)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_schedule_grows_with_every_step_and_ends_at_the_end(machine):
    """At 1, but where the machine becomes slower just before the end."""
    for seed in range(30):
        trace = simulate(machine, seed).trace
        assert trace[0] == 0
        assert trace == sorted(trace)
        assert trace[-1] == pytest.approx(1) if machine in ("constant", "speeding") else trace[-1] > 0.85


def test_validating_stays_below_its_share_of_the_time():
    """At most a fifth of the time of steps and validation, and some more where there are few of them."""
    for seed in range(60):
        found = simulate("constant", seed)
        spent = found.rounds * found.truth.validation(found.work.validation)
        assert spent <= 0.25 * found.budget or found.rounds == 1, seed


def test_an_epoch_is_part_of_the_data_where_not_one_fits():
    work = RunWork(per_epoch=1000, validation=10, test=10)
    steps, length, rounds = plan_steps(100.0, RunCosts(step=1.0, image=0.01), work, done=0, taken=0)
    assert 95 <= steps < 100
    assert length == 25
    assert rounds == 4


def test_the_schedule_of_a_plan_that_never_changes_is_exact():
    plan = Plan(end=997, length=10)
    assert [plan.virtual_step(step) for step in range(997)] == list(range(997))


@pytest.fixture
def machine(monkeypatch) -> Machine:
    """A machine whose clock is moved by steps, evaluated images and the report only."""
    found = Machine()
    monkeypatch.setattr(time, "monotonic", lambda: found.now)
    monkeypatch.setattr(step, "backward", found.taking(found.next_step, step.backward))
    monkeypatch.setattr(clock, "measure_evaluation", lambda run: found.image)
    monkeypatch.setattr(loop, "report_batches", found.evaluating(loop.report_batches))
    monkeypatch.setattr(image_task, "write_report", found.taking(lambda *_: found.report, lambda *_: found))
    return found


@dataclass
class Machine:
    """Seconds of a step, which grow by `slowing`, of an evaluated image and of the report; `now` is the clock."""

    step: float = 1.0
    image: float = 0.01
    report: float = 1.5
    now: float = 1000.0
    slowing: float = 0.0
    steps: int = 0

    def next_step(self, *_: Any) -> float:
        """Seconds of the next step."""
        self.steps += 1
        return self.step * (1 + self.slowing * self.steps)

    def taking(self, seconds: Callable[..., float], function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which takes so long."""

        def slow(*args: Any, **options: Any) -> Any:
            self.now += seconds(*args)
            return function(*args, **options)

        return slow

    def evaluating(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The batches of an evaluation, which take so long for each image."""

        def slow(*args: Any) -> Any:
            for batch in function(*args):
                self.now += self.image * len(batch.numbers)
                yield batch

        return slow


# 10 steps in an epoch, 143 images to validate on and 359 to test on
DIGITS = Recipe(model="resnet20", depth=8, width=4, batch_size=128, lr=0.1, device="cpu", precision="float32", health=0)


@pytest.mark.parametrize(
    ("given", "image", "step_seconds", "steps", "epochs"),
    [("60s", 0.01, 1.0, 42, 4), ("10s", 0.003, 0.5, 5, 2)],
)
def test_a_run_keeps_to_its_time(tmp_path, machine, given, image, step_seconds, steps, epochs):
    """Started 4 s before. With 0.01 s per image a validation takes 1.43 s and the test 3.59 s: 60 s leave 42 steps and
    4 epochs; with 0.003 s, 10 s leave 5 of the 10 steps of an epoch,
    in two parts.
    """
    machine.image, machine.step = image, step_seconds
    notes, recipe = Notes(), replace(DIGITS, time=given)
    outcome = train(recipe, tmp_path / "run", reporter=notes, began=machine.now - 4)
    assert machine.now - 996 == pytest.approx(recipe.budget, rel=0.05)
    rows = RunFolder(tmp_path / "run").read_metrics()
    assert outcome.finished
    assert rows[-1]["step"] == pytest.approx(steps, abs=2)
    assert len(rows) == epochs
    assert notes.said("steps per second, done at about")
    assert bool(notes.said("not one epoch of all training images fits")) == (steps < 10)
    assert rows[-1]["lr"] < 0.02, "a fifth of the peak before the end of five steps"


def test_what_is_too_short_says_what_the_least_is(tmp_path, machine):
    notes = Notes()
    outcome = train(replace(DIGITS, time="3s"), tmp_path / "run", reporter=notes)
    assert outcome.finished
    assert outcome.evaluation is not None
    assert outcome.evaluation.total == 359
    (said,) = notes.said("is too short")
    assert "The least for one step is about" in said


def test_a_machine_that_becomes_slower_gets_fewer_steps(tmp_path, machine):
    notes, machine.slowing = Notes(), 0.05
    train(replace(DIGITS, time="60s"), tmp_path / "run", reporter=notes)
    assert machine.now - 1000 == pytest.approx(60, rel=0.05)
    assert notes.said("slower: about")


@pytest.mark.parametrize("interruption", [2, 14])
def test_a_resumed_run_of_some_time_has_the_weights_of_an_uninterrupted_one(tmp_path, machine, interruption):
    """The plan, the step at which it changed and the costs are in the checkpoint; the machine becomes slower."""
    machine.slowing, weights = 0.05, []
    for name, stops in (("whole", []), ("parts", [interruption])):
        machine.now, machine.steps = 1000.0, 0
        for last in (*stops, 10**6):
            stop = partial(lambda last: machine.steps >= last, last)
            train(replace(DIGITS, time="40s"), tmp_path / name, resume=True, stop=stop)
        weights.append(read_tensors(RunFolder(tmp_path / name).last)[0])
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_more_time_continues_a_finished_run(tmp_path, machine):
    train(replace(DIGITS, time="30s"), tmp_path / "run")
    rows = RunFolder(tmp_path / "run").read_metrics()
    outcome = train(replace(DIGITS, time="1m"), tmp_path / "run", resume=True)
    more = RunFolder(tmp_path / "run").read_metrics()
    assert outcome.finished
    assert more[-1]["step"] > 1.5 * rows[-1]["step"]
    assert machine.now - 1000 == pytest.approx(60, rel=0.15), "the first test and report are part of it"


def test_folds_share_the_time_of_the_command(tmp_path, machine):
    """Half of 80 s for each of two, which share also what was lost before: 20 s from the start of the command."""
    notes = Notes()
    cross_validate(replace(DIGITS, time="80s"), tmp_path / "cv", folds=2, reporter=notes, began=machine.now - 20)
    assert machine.now - 980 == pytest.approx(80, rel=0.05)
    assert notes.said("40.0 s for each of 2 folds")
    folders = [RunFolder(tmp_path / name) for name in ("cv", "cv/fold-1", "cv/fold-2")]
    assert [folder.read_config()["recipe"]["time"] for folder in folders] == ["80s", "40s", "40s"]
    first, second = (folder.read_metrics()[-1]["step"] for folder in folders[1:])
    assert first == pytest.approx(second, abs=2)
    done = machine.now
    assert cross_validate(None, tmp_path / "cv", resume=True).finished
    assert machine.now == done, "whole folds are not repeated"


def test_expensive_validation_is_done_on_a_fixed_part(tmp_path, machine):
    notes, machine.image = Notes(), 0.03
    outcome = train(replace(DIGITS, time="40s"), tmp_path / "run", reporter=notes)
    assert notes.said("100 of them, the same in every epoch")
    assert outcome.validation_images == 100


def test_a_fitted_classifier_and_the_epochs_are_compared_on_the_same_images(tmp_path, machine, monkeypatch):
    monkeypatch.setenv("SKIPWAY_CACHE", str(tmp_path / "cache"))
    machine.image, totals, evaluate = 0.03, [], loop.Trainer.evaluate

    def evaluate_and_note(trainer, split, observe=None):
        evaluation = evaluate(trainer, split, observe)
        totals.extend([evaluation.total] if split == "validation" else [])
        return evaluation

    monkeypatch.setattr(loop.Trainer, "evaluate", evaluate_and_note)
    recipe = replace(DIGITS, freeze="first", batch_size=8)
    for given in ("40s", "80s"):  # which has time for more of them
        train(replace(recipe, time=given), tmp_path / "run", resume=True)
    assert len(totals) > 2
    assert set(totals) == {100}


def test_images_are_not_chosen_anew_once_there_is_a_result():
    """Epochs of few steps are done before the first plan."""
    recipe, progress = SimpleNamespace(budget=1.0), Progress(epoch=1, costs=RunCosts(image=9.0))
    run = SimpleNamespace(recipe=recipe, progress=progress, ranks=Ranks(), task=None, data=None)
    clock.choose_validation(run)
    assert not run.progress.validation_images


@pytest.mark.parametrize(("sharding", "count"), [("none", 100), ("full", 5000)])
def test_several_processes_measure_before_the_first_step_what_validating_costs(monkeypatch, sharding, count):
    """Whose time is unknown otherwise; each evaluates its half. A tenth of 20 s is enough for 100 images of 0.02 s."""
    passed = []

    class Slow(torch.nn.Module):
        def forward(self, x):
            passed.append(len(x))
            moments[0] += 0.04 * len(x)

    moments = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: moments[0])
    monkeypatch.setattr(Ranks, "all_reduce", lambda self, values: values)
    chosen = {"budget": 20.0, "batch_size": 32, "sharding": sharding, "flip_test": False, "seed": 0}
    task = SimpleNamespace(
        item="image",
        count=lambda data, split: {"validation": 5000, "test": 10}[split],
        sample=lambda run, count: SimpleNamespace(inputs=torch.zeros(count, 1)),
        limit_validation=lambda data, count, seed: data,
    )
    run = SimpleNamespace(
        recipe=SimpleNamespace(**chosen), task=task, ranks=Ranks(world=2), progress=Progress(), reporter=Notes(),
        model=Slow(), device=torch.device("cpu"), autocast=nullcontext, steps_per_epoch=9, elapsed=0.0, data=None,
    )  # fmt: skip
    clock.choose_validation(run)
    assert (run.progress.validation_images or 5000) == count
    assert set(passed) == ({16} if sharding == "none" else set())
    assert run.progress.costs.image == pytest.approx(0.02 if passed else 0)


def test_a_run_that_goes_back_to_its_start_is_planned_again(tmp_path, machine, monkeypatch):
    """A loss that is not finite after the plan, which also chose the images to validate on, and before a checkpoint."""
    real, machine.image = step.backward, 0.03

    def spoiled(run, batch):
        loss, correct = real(run, batch)
        return loss * (math.nan if machine.steps == 6 else 1.0), correct

    monkeypatch.setattr(step, "backward", spoiled)
    outcome = train(replace(DIGITS, time="40s", diverged="retry"), tmp_path / "run")
    assert outcome.finished
    assert machine.now - 1000 == pytest.approx(40, rel=0.1)
    snapshot, _ = Checkpoints(outcome.folder.checkpoints).newest()
    progress = snapshot.state["progress"]
    assert (progress["retries"], progress["validation_images"]) == (1, outcome.validation_images) == (1, 100)


@pytest.mark.usefixtures("few_digits")
def test_other_epochs_do_not_continue_a_run_of_some_time(tmp_path):
    recipe = Recipe(model="resnet8", width=4, time="2s", workers=0, health=0.0)
    assert train(recipe, tmp_path / "run").finished
    with pytest.raises(SkipwayError, match="follows from time='2s'"):
        train(Recipe(epochs=500), tmp_path / "run", resume=True)


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize(("length", "less", "text"), [("steps", 3, "4 steps"), ("epochs", 1, "2 epochs")])
def test_a_run_does_not_become_shorter_than_it_is(length, less, text, tmp_path):
    whole = {"steps": 4, "epochs": 2}[length]
    recipe = Recipe(model="resnet8", width=4, batch_size=512, workers=0, health=0.0, **{length: whole})
    folder = train(recipe, tmp_path / "run").folder
    before = folder.config.read_bytes()
    with pytest.raises(SkipwayError, match=f"{length}={less}: .* has been trained for {text}; the rule is as many"):
        train(Recipe(**{length: less}), folder.path, resume=True)
    assert folder.config.read_bytes() == before
    assert train(Recipe(**{length: whole}), folder.path, resume=True).finished


@pytest.mark.parametrize(
    ("stored", "idle", "longer", "message"),
    [
        ({"steps": 50}, {"epochs": 9}, {"steps": 60}, "follows from steps=50; more steps continue it"),
        ({"time": "3s"}, {"epochs": 9}, {"time": "4s"}, "follows from time='3s'; a longer time continues it"),
        ({"time": "3s"}, {"steps": 9}, {"time": "4s"}, "follows from time='3s'; a longer time continues it"),
    ],
)
def test_a_length_that_another_overrides_does_not_continue_a_run(stored, idle, longer, message):
    """Also where what decides is said again, as the command line does with what it fills in."""
    config = {"recipe": Recipe(**stored).to_json()}
    for given in (idle, {**stored, **idle}):
        with pytest.raises(SkipwayError, match=message):
            resume_recipe(config, Path("config.json"), Recipe(**given))
    recipe = resume_recipe(config, Path("config.json"), Recipe(**idle, **longer))
    assert {name: getattr(recipe, name) for name in longer} == longer
