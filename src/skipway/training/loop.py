"""The training loop: a recipe in, a trained network and its run folder out.

`train` opens a run (setup.py builds a fresh one, resume.py restores one) and `Trainer` trains it. One optimizer step is
in step.py, the handling of failed steps in recovery.py, everything that is written in records.py, and the time budget
in clock.py,
by the arithmetic of budget.py.

Order, augmentation and every other random draw are functions of (seed, epoch, step), and the learning rate is a
function of the step and the plan. So the state of a run is its weights, the optimizer's tensors, the EMA, the plan and
a few numbers, and a resumed run ends with the weights of an uninterrupted one: bit for bit on one CPU with the same
number of threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skipway.checkpoint.files import read_tensors, write_json
from skipway.checkpoint.state import load_model_state
from skipway.checkpoint.store import Checkpoints
from skipway.data import Batch
from skipway.errors import DivergedError, SkipwayError, printable
from skipway.hardware.device import choose_device, choose_precision
from skipway.optim.schedules import set_lr
from skipway.recipe import Recipe
from skipway.tracing.restoration import random_states, restored
from skipway.training import step
from skipway.training.classifier_fit import fit_classifier, record_fit, withdraw_fit
from skipway.training.clock import (
    choose_validation,
    is_estimate_due,
    note_evaluation,
    plan_time,
    start_epoch,
    time_steps,
)
from skipway.training.distributed import join_ranks
from skipway.training.freeze import check_freeze, freeze_layers
from skipway.training.image_features import feature_seconds
from skipway.training.memory import fit_batch
from skipway.training.preflight import report_preflight
from skipway.training.records import (
    check_finite,
    finish_saving,
    is_save_due,
    record_epoch,
    record_health,
    record_step,
    report_progress,
    save_checkpoint,
    write_result,
    write_weights,
)
from skipway.training.recovery import divergence_error, retry_from_checkpoint, split_batch
from skipway.training.reporter import Reporter, SilentReporter
from skipway.training.residual_warmup import move_warmup, start_warmup, unfinished_warmup
from skipway.training.resume import resume_recipe, resume_run
from skipway.training.run import Outcome, Run
from skipway.training.run_folder import RunFolder
from skipway.training.setup import (
    build_run,
    deterministic_algorithms,
    load_data,
    write_run_files,
)
from skipway.training.task import TestLog
from skipway.training.task_choice import choose_task
from skipway.training.tensorboard import summary_writer
from skipway.training.trial_pass import check_forward

__all__ = ["Trainer", "train"]

# seconds of a report besides building the network
REPORT_SECONDS = 0.5
# reading a number from a GPU synchronises with it, so it is done once in so many steps; steps that are not finite
# change nothing meanwhile
GPU_STEPS_PER_CHECK = 25


def train(
    recipe: Recipe | None,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    stop: Callable[[], bool] = lambda: False,
    began: float | None = None,
) -> Outcome:
    """Train a network by a recipe and write everything to the run folder `out`.

    The network learns from the training split. After each epoch it is evaluated on the validation split: the weights of
    the best epoch (images: highest accuracy, at equal accuracy lowest loss; text: lowest loss) are kept, and
    `Recipe.patience` counts epochs without improvement. The test split is evaluated once, after the last epoch, with
    the weights of the best epoch.

    Under torchrun every process calls this function alike; rank 0 writes and reports.

    Args:
        recipe: what to train and how; None with `resume` uses the recipe in the folder.
        out: the run folder, see `RunFolder`.
        resume: resume the run in `out` from its newest valid checkpoint; if there is no run, start one by the recipe.
        overwrite: replace the run in `out`.
        reporter: receives messages and progress; None for no output.
        stop: polled after every step; once it returns True the state is saved and the function returns.
        began: when the command began, on the clock of `time.monotonic`, from which `Recipe.time` counts; None: now.

    Raises:
        DataError: the images or texts cannot be used for training.
        CheckpointError: the initial weights, or the run to resume, cannot be used.
        DivergedError: a loss, gradient or weight is not finite; the last valid checkpoint is kept.
        SkipwayError: an unknown model or scheme, an impossible depth, a folder in use, or out of memory.
    """
    choices: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "reporter": reporter, "stop": stop}
    began = time.monotonic() if began is None else began
    with (
        restored(random_states(nn.Identity())),  # also outside of the run: reading data, the report
        open_run(recipe, RunFolder(out), **choices, began=began) as run,
    ):
        return Trainer(run).train()


class Trainer:
    """Trains one run: load, step, validate, save.

    Args:
        run: the network, data, optimizer and progress, which are changed in place.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def train(self) -> Outcome:
        """Train until all epochs are done or the run is told to stop, and write the result."""
        run = self.run
        if run.recipe.freeze_plan.fits_classifier and not run.progress.head_fitted:
            fitted = fit_classifier(run)
            if fitted and run.recipe.freeze_plan.takes_steps:
                choose_validation(run)
            evaluation = self.validate() if fitted else None
            if evaluation is None:  # told to stop: the checkpoint has the network as it was
                return self.finish()
            record_fit(run, evaluation)
            save_checkpoint(run)
        plan_time(run)
        while not run.finished:
            try:
                complete = self.train_epoch()
            except DivergedError as error:
                retry_from_checkpoint(run, error)
                continue
            evaluation = self.validate() if complete else None
            if not complete or (evaluation is None and has_validation(run)):  # told to stop
                save_checkpoint(run)
                break
            record_epoch(run, evaluation)
            save_checkpoint(run)
        finish_saving(run)
        return self.finish()

    def train_epoch(self) -> bool:
        """Train from the current step to the end of the epoch; False if told to stop before.

        Raises:
            DivergedError: a loss, gradient or weight is not finite.
        """
        run = self.run
        run.model.train()
        freeze_layers(run)
        start_epoch(run)
        for batch in step.train_batches(run):
            set_lr(run.optimizer, run.lr_factor(run.global_step))
            self.train_step(batch)
            time_steps(run)
            record_health(run, batch)
            run.stopping = run.ranks.any(run.stop())
            if run.stopping:
                break
            if is_save_due(run):
                self.read_results()
                save_checkpoint(run)
        self.read_results()
        check_finite(run)  # before anything is made of the weights: a retry takes them back
        return run.progress.step >= run.progress.epoch_steps and not run.stopping

    def train_step(self, batch: Batch) -> None:
        """Forward, backward, clip, update; the update is skipped if the loss or the gradient is not finite."""
        run = self.run
        try:
            loss, correct = step.backward(run, batch)
        except RuntimeError as error:
            split_batch(run, batch, error)
            loss, correct = step.backward(run, batch)
        result = step.reduce_result(run, batch, loss, correct, step.clip_gradients(run))
        run.pending.append(result)
        run.progress.step += 1
        run.steps_taken += 1
        run.steps_this_epoch += 1
        move_warmup(run)
        updated = step.update_weights(run, result.is_finite)
        if not updated or run.device.type != "cuda" or len(run.pending) >= GPU_STEPS_PER_CHECK or is_estimate_due(run):
            self.read_results()

    def read_results(self) -> None:
        """Read the results of the last steps from the device, check and record them.

        Raises:
            DivergedError: the loss or the gradient of a step is not finite.
        """
        run = self.run
        if not run.pending:
            return
        pending, run.pending = run.pending, []
        first = run.progress.step - len(pending) + 1
        values = torch.stack([result.to_tensor() for result in pending]).tolist()
        for number, (result, (loss, correct, norm, is_finite)) in enumerate(zip(pending, values, strict=True), first):
            if not is_finite:
                cause = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
                raise divergence_error(run, cause, number, result)
            run.progress.loss_sum += loss * run.recipe.batch_size
            run.progress.correct += int(correct)
            record_step(run, number, loss, norm)
        report_progress(run)

    def validate(self) -> Any:
        """Evaluate the weights, or their EMA, on the validation split; None if there is none, or if told to stop."""
        run = self.run
        if not has_validation(run):
            return None
        share_buffers(run)
        with nullcontext() if run.ema is None else run.ema.applied(run.model):
            return self.evaluate("validation")

    def test(self) -> tuple[Any, TestLog]:
        """Load the best weights into the network and evaluate them on the test split; None if told to stop. The log
        is what the report needs of it.
        """
        self.run.ranks.barrier()
        tensors, _ = read_tensors(self.run.folder.best)
        load_model_state(self.run.model, tensors)
        log = self.run.task.test_log(self.run)
        with log.recording():
            return self.evaluate("test", observe=log.add), log

    def evaluate(
        self, split: Literal["validation", "test"], observe: Callable[[Batch, Tensor], None] | None = None
    ) -> Any:
        """Evaluate the network on a split, each rank on its share; None if told to stop."""
        run = self.run
        size = max(1, run.recipe.batch_size // run.progress.accumulation)
        label = {"validation": "validating", "test": "testing"}[split]
        # the ranks of a sharded network must run it equally often
        items = run.task.count(run.data, split)
        share = math.ceil(items / run.ranks.world)
        rounds = math.ceil(share / max(1, size // run.ranks.world))
        batches = run.task.evaluation_batches(run, split, size)
        began = time.monotonic()
        evaluation = run.task.evaluate(
            run,
            split,
            report_batches(run, batches, label, share),
            rounds=rounds if run.recipe.sharding == "full" else 0,
            observe=observe,
        )
        note_evaluation(run, items, time.monotonic() - began)
        return evaluation

    def finish(self) -> Outcome:
        """Write the last weights; if all epochs are done, test the best weights and write summary and report."""
        run = self.run
        write_weights(run, run.folder.last)
        if not has_validation(run):
            write_weights(run, run.folder.best)
        evaluation, log = self.test() if run.finished else (None, TestLog())
        if evaluation is not None:
            run.progress.tested_after = sorted({*run.progress.tested_after, run.global_step})
        outcome = Outcome.of(run, evaluation)
        if run.finished and (sentence := unfinished_warmup(run)) is not None:
            run.reporter.message("note", sentence)
        if evaluation is not None and run.ranks.first:
            write_result(run, run.folder.best, evaluation)
            write_json(run.folder.summary, outcome.to_json())
        run.ranks.barrier()
        if evaluation is not None and run.ranks.first:
            report_run(run, evaluation, log)
        return outcome


def has_validation(run: Run) -> bool:
    """Whether there is anything to validate on."""
    return run.task.count(run.data, "validation") > 0


def share_buffers(run: Run) -> None:
    """Give every rank the buffers of rank 0 and their averages, in place: running statistics may be those of a rank's
    own images, and rank 0 writes the weights.
    """
    buffers = dict(run.model.named_buffers(remove_duplicate=False))
    averages = {} if run.ema is None else run.ema.tensors
    run.ranks.broadcast([*buffers.values(), *(averages[name] for name in buffers if name in averages)])


def report_batches(run: Run, batches: Iterable[Batch], label: str, items: int) -> Iterator[Batch]:
    """The batches, while it is reported how many of so many items are done."""
    done = 0
    run.reporter.activity(label, done, items)
    for batch in batches:
        yield batch
        done += len(batch.numbers)
        run.reporter.activity(label, done, items)


def report_run(run: Run, evaluation: Any, log: TestLog) -> None:
    """Write `report.html`. The run is complete by now, so a failure is reported as a warning and not raised."""
    run.reporter.activity("report")
    try:
        if not run.task.write_report(run, evaluation, log):
            run.reporter.message("note", "told to stop before the report was written; the run itself is complete")
    except Exception as error:
        run.reporter.message("warning", f"no report: {printable(str(error) or type(error).__name__)}")


@contextmanager
def open_run(
    recipe: Recipe | None,
    folder: RunFolder,
    *,
    resume: bool,
    overwrite: bool,
    reporter: Reporter | None,
    stop: Callable[[], bool],
    began: float,
) -> Iterator[Run]:
    """Build a fresh run, or restore one, and hold the lock of its folder until the end."""
    # the same command starts a run and resumes it
    stored = folder.read_config() if resume and (recipe is None or folder.config.exists()) else None
    if stored is not None and "folds" in stored:
        raise SkipwayError(
            f"out={printable(folder.path)}: the folder holds a cross-validation; cross_validate resumes it"
        )
    if stored is not None:
        recipe = resume_recipe(stored, folder.config, recipe)
    elif recipe is None:
        raise SkipwayError("recipe=None: a new run needs a recipe; only resume=True reads it from the folder")
    else:
        folder.check_free(overwrite=overwrite)
    folder.check_apart(recipe.data)
    if recipe.tensorboard:  # what is missing is said before anything is done
        summary_writer()
    with ExitStack() as stack:
        ranks = stack.enter_context(join_ranks(recipe.device))
        reporter = SilentReporter() if reporter is None or not ranks.first else reporter
        reporter.activity("starting")
        stack.enter_context(deterministic_algorithms(recipe))
        device = choose_device(recipe.device, ranks.local)
        precision, reason = choose_precision(recipe.precision, device)
        listed = None if stored is None else folder.read_split()
        reporter.activity("listing")
        task = choose_task(recipe)
        reporter.item = task.item
        chosen, data = load_data(task, recipe, reporter, ranks, device, listed, fresh=stored is None)
        resolved = task.resolve(chosen, data, precision, ranks.world)
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        fresh = stored is None or not Checkpoints(folder.checkpoints).steps()
        reporter.activity("building")
        building = time.monotonic()
        run = build_run(task, resolved, data, folder, reporter, device, ranks, stop, fresh=fresh)
        run.given = recipe
        # the report builds the network again, and takes some of the time that its features may take
        report_seconds = REPORT_SECONDS + time.monotonic() - building + feature_seconds(resolved.budget or 0.0) / 2
        reporter.activity("checking")
        check_forward(run)
        smaller, memory_lines = fit_batch(run, is_fresh=stored is None)
        if smaller != resolved:
            run = build_run(task, smaller, data, folder, reporter, device, ranks, stop, fresh=fresh)
            run.given = recipe
        run.memory_lines = memory_lines
        withdraw_fit(run)
        check_freeze(run)
        if ranks.first:
            note = stack.enter_context(folder.lock())
            if note:
                reporter.message("note", note)
            run.checkpoints.sweep()
        if stored is not None and not run.checkpoints.steps():
            reporter.message("note", "the run ended before its first checkpoint and starts again")
            stored = None
        if stored is None:
            write_run_files(run)
            start_warmup(run)
        else:
            resume_run(run, stored)
        run.progress.overhead += run.began - began
        run.progress.costs = replace(run.progress.costs, report=report_seconds)
        report_preflight(run, reason, stored)
        if stored is None:
            save_checkpoint(run)
        yield run
