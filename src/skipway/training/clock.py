"""The time of a run: what its parts take, when it will be done, and with `Recipe.time` how long it is."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from skipway.errors import clock_text, counted, duration, spell
from skipway.tracing import preserved_state
from skipway.training.budget import Plan, RunCosts, RunWork, plan_steps, validation_part
from skipway.training.run import Run
from skipway.training.trial_pass import keeps_statistics, stale_statistics

__all__ = [
    "choose_validation",
    "expected_seconds",
    "is_estimate_due",
    "limit_validation",
    "note_evaluation",
    "plan_time",
    "reopen_plan",
    "seconds_left",
    "start_epoch",
    "time_steps",
]

# the first estimate is made after so many steps, so many seconds, or this share of the budget
TIMED_STEPS, TIMED_SECONDS, TIMED_SHARE = 20, 3.0, 0.05
# steps after which a plan is remarked upon; the first one is slower than others
SOUND_STEPS = 3
# cost of evaluating an image relative to training on it where it was not measured: one of three passes
EVALUATION_COST = 1 / 3
# seconds that measuring it may take
MEASURING_SECONDS = 2.0
# share of the time that is not planned
MARGIN = 0.01
# change of the length of the run from which it is said
REMARKABLE = 0.15


def start_epoch(run: Run) -> None:
    """Start the clocks of an epoch, or of the rest of one."""
    run.epoch_began = run.timed_at = time.monotonic()
    run.steps_this_epoch, run.timed_steps = 0, run.steps_taken
    if not run.steps_taken:
        run.first_step_at = run.epoch_began
        run.reporter.activity("first step")
    if not run.progress.step:
        plan = run.progress.plan
        run.progress.epoch_position = plan.virtual_step(run.global_step) / max(1, plan.end)


def is_estimate_due(run: Run) -> bool:
    """Whether enough steps are timed to say how long the run takes, and it has not been said."""
    if run.estimated:
        return False
    spent = time.monotonic() - run.first_step_at
    share = TIMED_SHARE * (run.recipe.budget or math.inf)
    return run.ranks.any(run.steps_taken >= TIMED_STEPS or spent >= min(TIMED_SECONDS, share))


def time_steps(run: Run) -> None:
    """After a step: note what the steps since the last call took, say once how long the run will take, and with
    `Recipe.time` plan it anew.
    """
    if run.pending:  # the device is still computing
        return
    now = time.monotonic()
    run.progress.costs = run.progress.costs.with_steps(run.steps_taken - run.timed_steps, now - run.timed_at)
    run.timed_at, run.timed_steps = now, run.steps_taken
    is_due = is_estimate_due(run)
    if run.recipe.budget is None:
        if is_due:
            run.estimated = True
            run.reporter.estimate(expected_seconds(run))
        return
    if not run.progress.planned and not is_due:
        return
    if not run.progress.planned:
        choose_validation(run)
        run.progress.planned = True
    plan_time(run)
    if is_due:
        run.estimated = True
        report_plan(run, "")
    if (
        run.estimated
        and not run.remarked
        and (run.steps_taken >= SOUND_STEPS or run.progress.plan.end <= run.global_step)
    ):
        run.remarked = True
        for sentence in plan_remarks(run):
            run.reporter.message("note", sentence)
    if run.estimated and abs(run.progress.plan.end - run.reported_end) > REMARKABLE * run.reported_end:
        report_plan(run, "slower: " if run.progress.plan.end < run.reported_end else "faster: ")


def known_costs(run: Run) -> RunCosts:
    """The costs of the run; that of an evaluated image is guessed where it was not measured."""
    costs = run.progress.costs
    return costs if costs.image else replace(costs, image=EVALUATION_COST * costs.step / run.recipe.batch_size)


def work_of(run: Run) -> RunWork:
    """What the run has to do."""
    validation, test = (run.task.count(run.data, split) for split in ("validation", "test"))
    return RunWork(run.steps_per_epoch, validation, test)


def expected_seconds(run: Run) -> float:
    """Seconds until the report is written, by what the parts of the run took so far."""
    costs, work, progress = known_costs(run), work_of(run), run.progress
    rounds = max(0, progress.epochs - progress.epoch)
    steps = max(0, progress.plan.end - run.global_step)
    return steps * costs.step + rounds * costs.validation(work.validation) + costs.ending(work.test)


def seconds_left(run: Run) -> float:
    """Seconds of `Recipe.time` that are left to plan; a few are kept for the end of the process."""
    return (1 - MARGIN) * (run.recipe.budget or math.inf) - run.elapsed


def choose_validation(run: Run) -> None:
    """With `Recipe.time`: measure what evaluating an item costs, and choose how many are validated on.

    They are chosen once, before the first validation: results on other items cannot be compared with its result.
    """
    if run.recipe.budget is None:
        return
    sharded = run.ranks.world > 1 and run.recipe.sharding != "none"  # its ranks would have to pass equally often
    if not sharded and not run.progress.costs.image:
        run.progress.costs = replace(run.progress.costs, image=measure_evaluation(run))
    if run.progress.validation_images or run.progress.epoch or run.progress.head_fitted:
        return
    work, costs = work_of(run), known_costs(run)
    (count,) = share_from_first(run, validation_part(seconds_left(run), costs, work))
    if count < work.validation:
        seconds = duration(costs.validation(work.validation))
        run.reporter.message(
            "plan",
            f"validating on all {work.validation:,} {run.task.item}s takes about {seconds}: {count:,} of them, the "
            "same in every epoch, choose the epoch",
        )
        limit_validation(run, count)


def measure_evaluation(run: Run) -> float:
    """Seconds that evaluating an image takes, by that of some training images; each rank evaluates its share."""
    step, world = run.progress.costs.step, run.ranks.world
    batch_size = run.recipe.batch_size // (world * run.progress.accumulation)
    count = max(1, min(batch_size, int(MEASURING_SECONDS * run.recipe.batch_size / max(step, 1e-9))))
    seconds = 0.0
    with preserved_state(run.model), torch.no_grad(), run.autocast():
        for _ in range(2):  # the first pass of a shape is slower
            began = time.monotonic()
            batch = run.task.sample(run, count)
            run.model.eval()(batch.inputs)
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)
            seconds = time.monotonic() - began
            if seconds > MEASURING_SECONDS / 2:
                break
    return seconds * (2 if run.recipe.flip_test else 1) / (world * len(batch.inputs))


def note_evaluation(run: Run, images: int, seconds: float) -> None:
    """Note what an evaluation took."""
    if images:
        run.progress.costs = replace(run.progress.costs, image=seconds / images)


def limit_validation(run: Run, count: int) -> None:
    """Validate on so many of the validation items, always the same ones, in place; 0: on all."""
    if 0 < count < run.task.count(run.data, "validation"):
        run.data = run.task.limit_validation(run.data, count, run.recipe.seed)
        run.progress.validation_images = count


def plan_time(run: Run) -> None:
    """With `Recipe.time`, once it is planned: plan anew how many steps fit into the time that is left."""
    budget, progress = run.recipe.budget, run.progress
    if budget is None or not progress.planned or progress.stopped_early:
        return
    done, taken = run.global_step, progress.step
    length = progress.plan.length if progress.epoch else 0
    found = plan_steps(seconds_left(run), known_costs(run), work_of(run), done, taken, length)
    steps, length, rounds = share_from_first(run, *found)
    progress.plan = replace(progress.plan.adjusted(done, steps), length=length)
    steps = progress.plan.end - done
    progress.epoch_steps = max(length, taken) if rounds > 1 else taken + steps
    progress.epochs = progress.epoch + (rounds if progress.epoch_steps else 0)


def report_plan(run: Run, change: str) -> None:
    """Say how much fits into the time, when the run will be done, and what an epoch is."""
    run.reported_end = run.progress.plan.end
    seconds = expected_seconds(run)
    run.reporter.message(
        "plan", f"{change}{plan_text(run.progress.plan, run.steps_per_epoch)} in {run.recipe.time}, "
        f"{1 / max(run.progress.costs.step, 1e-9):.3g} steps per second, done at about {clock_text(seconds)}"
    )  # fmt: skip


def plan_text(plan: Plan, per_epoch: int) -> str:
    """The length of a run in words.

    >>> plan_text(Plan(end=14, length=5), 23), plan_text(Plan(end=35, length=23), 23), plan_text(Plan(end=230), 23)
    ('about 0.6 of an epoch (14 steps)', 'about 1.5 epochs (35 steps)', 'about 10 epochs (230 steps)')
    """
    share, steps = plan.end / per_epoch, counted(plan.end, "step")
    if share < 1:
        return f"about {share:.1g} of an epoch ({steps})"
    return f"about {share:.1f} epochs ({steps})" if share < 9.5 else f"about {share:,.0f} epochs ({steps})"


def plan_remarks(run: Run) -> Iterator[str]:
    """Remarks about a plan: too little time for anything, epochs that are not passes over the data, few steps."""
    costs, work, plan, per_epoch = known_costs(run), work_of(run), run.progress.plan, run.steps_per_epoch
    spent, budget, seconds = run.elapsed, run.recipe.budget or 0.0, expected_seconds(run)
    if spent + seconds > 1.05 * budget and plan.end <= run.global_step:
        yield (
            f"{spell('time', run.recipe.time)} is too short for more steps: {duration(spent)} have gone, and testing "
            f"on {counted(work.test, run.task.item)} with the report takes about {duration(costs.ending(work.test))}. "
            f"The least for one step is about {duration(spent + seconds)}; the test is done all the same"
        )
    elif plan.length > per_epoch:
        yield (
            f"validating takes about {duration(costs.validation(work.validation))} and an epoch "
            f"{duration(costs.step * per_epoch)}: it is done once in {plan.length / per_epoch:.0f} epochs, which count "
            "as one"
        )
    elif plan.length < per_epoch:
        parts = (
            f": each of the {run.progress.epochs} is {counted(plan.length, 'step')}, and the next goes on from there"
        )
        yield (
            f"not one epoch of all training {run.task.item}s fits, which is {counted(per_epoch, 'step')}"
            f"{parts if run.progress.epochs > 1 else ''}"
        )
    if not keeps_statistics(run):
        yield from stale_statistics(run.model, plan.end)


def reopen_plan(run: Run) -> None:
    """After `Recipe.time` was changed: the schedule spans the new time, and the run is planned anew."""
    progress, budget = run.progress, run.recipe.budget or 0.0
    done = run.global_step
    end = max(done + 1, round(done * budget / max(progress.seconds + progress.overhead, 1e-9)))
    progress.plan = Plan(end=end, length=run.steps_per_epoch)
    progress.planned, progress.stopped_early, progress.epoch_steps = False, False, run.steps_per_epoch
    progress.epochs = progress.epoch + 1


def share_from_first(run: Run, *numbers: int) -> tuple[int, ...]:
    """The numbers of rank 0, on every rank: their clocks differ."""
    given = torch.tensor([float(number) if run.ranks.first else 0.0 for number in numbers], dtype=torch.float64)
    return tuple(int(number) for number in run.ranks.all_reduce(given).tolist())
