"""`train`: a recipe and a folder in, a trained network and its run folder out.

This file is the loop; `stepping` holds one step of it, `keeping` what it writes, `trouble` what happens when a step
goes wrong.

Order, augmentation and every other random draw are functions of (seed, epoch, step), and the learning rate is a
function of the step. So the state of a run is its weights, its optimiser's tensors, the average and a few numbers, and
a run that continues ends in the weights of an uninterrupted one: bit for bit on one CPU with equally many threads.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from skipway.checkpoint.files import read_tensors, write_json
from skipway.checkpoint.state import full_tensor, load_model_state
from skipway.data import Batch
from skipway.errors import DivergedError, SkipwayError, printable
from skipway.hardware.device import choose_device, choose_precision
from skipway.inference.evaluation import Evaluation, evaluate
from skipway.optim.clip import total_norm
from skipway.optim.schedules import set_lr
from skipway.recipe import Recipe
from skipway.report.run import write_report
from skipway.report.run.answers import AnswerLog, Answers
from skipway.training import step as stepping
from skipway.training.distributed import joined
from skipway.training.preflight import introduce
from skipway.training.recording import note_step, record, save, save_is_due, write_result, write_weights
from skipway.training.recovery import diverged, out_of_memory, retry, split
from skipway.training.reporter import Screen, Silent, StepReport
from skipway.training.run import Outcome, Pending, Run
from skipway.training.run_folder import RunFolder
from skipway.training.setup import (
    assemble,
    begin,
    continued,
    freeze,
    load_data,
    resolved,
    restore,
)

__all__ = ["train"]

# a GPU is asked for its numbers once in so many steps, because each question makes it wait; bad steps change nothing
GPU_STEPS_PER_CHECK = 25
# steps that are timed before `Recipe.time` is turned into epochs, and the first of them, which are slow
TIMED_STEPS, WARMING_STEPS = 20, 3
# what an image costs in an evaluation, in training images: the forward pass of three passes
EVALUATION_COST = 1 / 3


def train(
    recipe: Recipe | None,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    screen: Screen | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train a network as `recipe` says and leave everything in the folder `out`.

    The training images are learned from. After each epoch the validation images choose: the weights of the best epoch
    so far are kept, and `Recipe.patience` counts by them. The test images are looked at once, after the last epoch,
    with the weights that were chosen.

    Under torchrun every process calls it alike; the first writes and reports.

    Args:
        recipe: what to do; None with `resume` takes the one in the folder.
        out: the run folder, see `RunFolder`.
        resume: continue the run in `out` from its newest good checkpoint; with a recipe and no run there, start it.
        overwrite: replace the run in `out`.
        screen: where to report; None reports nowhere.
        stop: asked after every step; once it says True the state is saved and the call returns.

    Raises:
        DataError: the images cannot be trained on.
        CheckpointError: the weights to start from, or the run to continue, cannot be used.
        DivergedError: a loss, gradient or weight is not finite; the last good checkpoint is kept.
        SkipwayError: an unknown model or scheme, an impossible depth, a folder that is taken, memory that ran out.
    """
    folder = RunFolder(out)
    # one and the same command starts a run and continues it
    stored = folder.read_config() if resume and (recipe is None or folder.config.exists()) else None
    if stored is not None and "folds" in stored:
        raise SkipwayError(f"out={printable(out)}: the folder holds a cross-validation; cross_validate continues it")
    if stored is not None:
        recipe = continued(stored, folder.config, recipe)
    elif recipe is None:
        raise SkipwayError("recipe=None: a run that starts needs a recipe; only resume=True finds one in the folder")
    else:
        folder.check_free(overwrite=overwrite)
    folder.check_apart(recipe.data)
    with ExitStack() as stack:
        ranks = stack.enter_context(joined(recipe.device))
        screen = Silent() if screen is None or not ranks.first else screen
        stack.enter_context(repeatable(recipe))
        device = choose_device(recipe.device, ranks.local)
        precision, reason = choose_precision(recipe.precision, device)
        data = load_data(recipe, screen, ranks, None if stored is None else folder.read_split())
        recipe = resolved(recipe, data, precision, ranks.world)
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        run = assemble(recipe, data, folder, screen, device, ranks, stop)
        if ranks.first:
            taken = stack.enter_context(folder.lock())
            if taken:
                screen.say("note", taken)
            run.checkpoints.sweep()
        if stored is not None and not run.checkpoints.steps():
            screen.say("note", "the run ended before its first checkpoint: it starts again")
            stored = None
        if stored is None:
            begin(run)
        else:
            restore(run, stored)
        introduce(run, reason, stored)
        if stored is None:
            save(run)
        fit(run)
        return conclude(run)


@contextmanager
def repeatable(recipe: Recipe) -> Iterator[None]:
    """With `deterministic`, torch refuses every algorithm that may give other bits the next time."""
    before = torch.are_deterministic_algorithms_enabled()
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def fit(run: Run) -> None:
    """Train until all epochs are done or `stop` says so; the checkpoint on disk is current when this returns."""
    while not run.finished:
        try:
            complete = train_epoch(run)
        except DivergedError as error:
            retry(run, error)
            continue
        evaluation = validate(run) if complete else None
        if not complete or (evaluation is None and len(run.data.validation)):
            save(run)
            break
        record(run, evaluation)
        save(run)
    run.checkpoints.finish()


def train_epoch(run: Run) -> bool:
    """Train from the run's position to the end of its epoch; False if `stop` ended it early."""
    position = run.position
    run.model.train()
    freeze(run)
    run.epoch_began, run.steps_this_epoch = time.monotonic(), 0
    for batch in stepping.batches(run):
        set_lr(run.optimizer, run.rate_factor(run.steps_done))
        take_step(run, batch)
        plan(run)
        watch(run, batch)
        run.stopping = run.ranks.any(run.stop())
        if run.stopping:
            break
        if save_is_due(run):
            settle(run)
            save(run)
    settle(run)
    return position.step == run.steps and not run.stopping


def take_step(run: Run, batch: Batch) -> None:
    """Forward and backward, part by part; clip; update, unless a number is not finite."""
    try:
        loss, logits = stepping.gradients(run, batch)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        split(run, batch, error)
        loss, logits = stepping.gradients(run, batch)
    run.scaler.unscale_(run.optimizer) if run.scaler.is_enabled() else None
    clip = run.recipe.clipper
    norm = full_tensor(total_norm(run.parameters) if clip is None else clip(run.parameters))
    fine = torch.isfinite(loss)
    if not run.scaler.is_enabled():  # the scaler leaves out steps whose gradient overflowed, and lowers its scale
        fine = fine & torch.isfinite(norm)
    correct = (logits.argmax(1) == batch.labels).sum()
    told = run.ranks.total(torch.stack([loss.double() / run.ranks.world, correct.double(), (~fine).double()]))
    run.pending.append(Pending(told[0], told[1], norm.detach(), told[2] == 0, batch.numbers))
    run.position.step += 1
    run.steps_taken += 1
    run.steps_this_epoch += 1
    known = not stepping.update(run, run.pending[-1].fine) or run.device.type != "cuda"
    if known or len(run.pending) >= GPU_STEPS_PER_CHECK:
        settle(run)


def settle(run: Run) -> None:
    """Fetch the numbers that are still on the device, check them, add them up and report."""
    if not run.pending:
        return
    pending, run.pending = run.pending, []
    first = run.position.step - len(pending) + 1
    values = torch.stack([torch.stack([p.loss, p.correct, p.norm.double(), p.fine.double()]) for p in pending]).tolist()
    for step, (each, (loss, correct, norm, fine)) in enumerate(zip(pending, values, strict=True), start=first):
        if not fine:
            raise diverged(
                run, f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite", step, each
            )
        run.position.loss_sum += loss * run.recipe.batch_size
        run.position.correct += int(correct)
        note_step(run, step, loss, norm)
    report(run)


def report(run: Run) -> None:
    """Tell the screen how far the run is."""
    position, images = run.position, run.position.step * run.recipe.batch_size
    elapsed = time.monotonic() - run.epoch_began
    run.images_per_second = run.steps_this_epoch * run.recipe.batch_size / max(elapsed, 1e-9)
    per_step = (time.monotonic() - run.began) / run.steps_taken
    run.screen.step(
        StepReport(
            epoch=position.epoch + 1,
            epochs=position.epochs,
            step=position.step,
            steps=run.steps,
            loss=position.loss_sum / images,
            accuracy=position.correct / images,
            images_per_second=run.images_per_second,
            seconds_left=per_step * (position.epochs * run.steps - run.steps_done),
        )
    )
    if run.steps_taken == TIMED_STEPS and not position.planned and run.recipe.time is None:
        run.screen.estimate(per_step * (position.epochs * run.steps - run.steps_done))


def plan(run: Run) -> None:
    """With `Recipe.time`: once a few steps are timed, plan as many epochs as fit."""
    budget, position = run.recipe.budget, run.position
    if run.steps_taken == WARMING_STEPS:
        run.timed_from = time.monotonic()
    if budget is None or position.planned or run.steps_taken < TIMED_STEPS:
        return
    timed = run.steps_taken - WARMING_STEPS
    per_step = (time.monotonic() - run.timed_from) / max(1, timed)
    each, once = (
        EVALUATION_COST * len(images) / run.recipe.batch_size for images in (run.data.validation, run.data.test)
    )
    left = budget - run.seconds + per_step * (run.steps_done - once)
    epochs = int(left / (per_step * (run.steps + each)))
    told = run.ranks.total(torch.tensor(float(max(1, epochs)) if run.ranks.first else 0.0, device=run.device))
    position.epochs, position.planned = int(told), True
    word = "epoch" if position.epochs == 1 else "epochs"
    run.screen.say(
        "plan", f"{position.epochs} {word} fit into {run.recipe.time}, at {1 / per_step:.3g} steps per second"
    )


def watch(run: Run, batch: Batch) -> None:
    """Now and then: how every connection fares."""
    if not run.health.due():
        return
    with run.autocast():
        rows, warnings = run.health.sample(run.model, batch.inputs, batch.targets, run.loss)
    run.folder.append_health({"step": run.steps_done, "connections": rows})
    for sentence in warnings:
        run.screen.say("warning", f"step {run.steps_done}: {sentence}")


def validate(run: Run) -> Evaluation | None:
    """Evaluate the network, or its averaged weights, on the validation images; None if there are none, or if `stop`
    ended it early.
    """
    if not len(run.data.validation):
        return None
    with nullcontext() if run.average is None else run.average.applied(run.model):
        return evaluate_split(run, "validation")


def evaluate_split(
    run: Run, split: Literal["validation", "test"], observe: Callable[[Batch, Tensor], None] | None = None
) -> Evaluation | None:
    """Evaluate the network as it is on a split, each process on its share; None if `stop` ended it early."""
    size = max(1, run.recipe.batch_size // run.position.parts)
    # the processes of a network that is spread over them have to run it equally often
    images = len(run.data.validation if split == "validation" else run.data.test)
    rounds = math.ceil(math.ceil(images / run.ranks.world) / max(1, size // run.ranks.world))
    batches = run.data.evaluation_batches(
        split, batch_size=size, device=run.device, rank=run.ranks.rank, world=run.ranks.world
    )
    return evaluate(
        run.model,
        batches,
        classes=len(run.data.classes),
        autocast=run.autocast,
        stop=run.stop,
        flip=run.recipe.flip_test,
        total=run.ranks.total,
        rounds=rounds if run.recipe.sharding == "full" else 0,
        observe=observe,
    )


def conclude(run: Run) -> Outcome:
    """Write the last weights; test the best ones, if all epochs are done; write the summary and the report."""
    write_weights(run, run.folder.last)
    if not len(run.data.validation):
        write_weights(run, run.folder.best)
    answers = AnswerLog()
    evaluation = test(run, answers) if run.finished else None
    position = run.position
    outcome = Outcome(
        finished=run.finished,
        folder=run.folder,
        recipe=run.recipe,
        classes=run.data.classes,
        evaluation=evaluation,
        validation_images=len(run.data.validation),
        best_accuracy=position.best_accuracy,
        best_epoch=position.best_epoch,
        epoch=position.epoch,
        step=position.step,
        seconds=run.seconds,
    )
    if evaluation is not None and run.ranks.first:
        write_result(run, run.folder.best, evaluation)
        write_json(run.folder.summary, outcome.to_json())
    run.ranks.wait()
    if evaluation is not None and run.ranks.first:
        # the other processes saw the rest of the test images
        report_on(run, evaluation, answers.answers() if run.ranks.world == 1 else None)
    return outcome


def test(run: Run, answers: AnswerLog) -> Evaluation | None:
    """Load the best weights into the network and evaluate them on the test images; None if `stop` ended it early."""
    run.ranks.wait()
    tensors, _ = read_tensors(run.folder.best)
    load_model_state(run.model, tensors)
    return evaluate_split(run, "test", observe=answers.add)


def report_on(run: Run, evaluation: Evaluation, answers: Answers | None) -> None:
    """Write the page. The run is safe by now, so whatever goes wrong here is said, and no more."""
    try:
        if write_report(run, evaluation, answers) is None:
            run.screen.say("note", "told to stop before the report was written; the run itself is complete")
    except Exception as error:
        run.screen.say("warning", f"no report: {printable(str(error) or type(error).__name__)}")
