"""The time budget of a run: `Recipe.time` converted to a number of epochs."""

from __future__ import annotations

import time

import torch

from skipway.errors import counted
from skipway.training.run import Run

__all__ = ["TIMED_STEPS", "plan_epochs", "shorten_plan"]

# steps that are timed before the plan is made, and the first of them, which are slow and do not count
TIMED_STEPS, WARMUP_STEPS = 20, 3
# cost of evaluating an image relative to training on it: the forward pass of three passes
EVALUATION_COST = 1 / 3


def plan_epochs(run: Run) -> None:
    """With `Recipe.time`, once enough steps are timed: plan as many epochs as fit into the budget."""
    budget, progress = run.recipe.budget, run.progress
    if run.steps_taken == WARMUP_STEPS:
        run.timed_from = time.monotonic()
    if budget is None or progress.planned or run.steps_taken < TIMED_STEPS:
        return
    per_step = (time.monotonic() - run.timed_from) / max(1, run.steps_taken - WARMUP_STEPS)
    validation, test = (
        EVALUATION_COST * len(images) / run.recipe.batch_size for images in (run.data.validation, run.data.test)
    )
    left = budget - run.seconds + per_step * (run.global_step - test)
    epochs = int(left / (per_step * (run.steps_per_epoch + validation)))
    progress.epochs, progress.planned = share_from_first(run, max(1, epochs)), True
    run.reporter.message(
        "plan",
        f"time for {counted(progress.epochs, 'epoch')} in {run.recipe.time}, at {1 / per_step:.3g} steps per second",
    )


def shorten_plan(run: Run) -> None:
    """With `Recipe.time`, after an epoch: reduce the planned epochs if they no longer fit at its pace."""
    budget, progress = run.recipe.budget, run.progress
    if budget is None or not progress.planned:
        return
    seconds_per_epoch = time.monotonic() - run.epoch_began
    epochs = share_from_first(run, progress.epoch + max(0, int((budget - run.seconds) / seconds_per_epoch)))
    if epochs < progress.epochs:
        progress.epochs = epochs
        run.reporter.message("plan", f"slower than planned: time for {counted(epochs, 'epoch')} in {run.recipe.time}")


def share_from_first(run: Run, number: int) -> int:
    """The number of rank 0, on every rank: their clocks differ."""
    return int(run.ranks.all_reduce(torch.tensor(float(number) if run.ranks.first else 0.0, device=run.device)))
