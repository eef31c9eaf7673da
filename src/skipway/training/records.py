"""Everything that a run records: metrics, health, progress reports, weights, checkpoints."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from skipway.checkpoint.files import read_tensors, write_tensors
from skipway.checkpoint.state import all_finite, gather_tensors, model_state, optimizer_state
from skipway.checkpoint.store import Snapshot
from skipway.data import Batch
from skipway.errors import CheckpointError, DivergedError, counted
from skipway.inference.reference_outputs import describe_outputs
from skipway.report.summary import CHANCE_STEPS
from skipway.training.clock import expected_seconds, plan_time
from skipway.training.reporter import StepReport
from skipway.training.run import Run
from skipway.training.run_folder import RunFolder
from skipway.training.setup import model_config
from skipway.training.tensorboard import write_tensorboard

__all__ = [
    "check_finite",
    "finish_saving",
    "is_save_due",
    "read_tests",
    "record_epoch",
    "record_health",
    "record_step",
    "report_progress",
    "save_checkpoint",
    "write_result",
    "write_weights",
]

SECONDS_BETWEEN_SAVES = 600.0
# rows of `steps.jsonl` per epoch
ROWS_PER_EPOCH = 50


def record_step(run: Run, step: int, loss: float, norm: float) -> None:
    """Collect a row for `steps.jsonl` every few steps; it is written with the next checkpoint."""
    if step % max(1, run.progress.epoch_steps // ROWS_PER_EPOCH) == 0:
        done = run.progress.before + step
        rate = run.recipe.peak_lr * run.lr_factor(done - 1)
        run.rows.append({"step": done, "epoch": run.progress.epoch + 1, "loss": loss, "norm": norm, "lr": rate})


def report_progress(run: Run) -> None:
    """Report the progress of the epoch."""
    progress, items = run.progress, run.progress.step * run.recipe.batch_size
    elapsed = time.monotonic() - run.epoch_began
    targets = run.recipe.batch_size * run.task.targets_per_item(run.data)
    run.targets_per_second = run.steps_this_epoch * targets / max(elapsed, 1e-9)
    run.reporter.step(
        StepReport(
            epoch=progress.epoch + 1,
            epochs=progress.epochs,
            step=progress.step,
            steps=progress.epoch_steps,
            loss=progress.loss_sum / items,
            accuracy=progress.correct / (progress.step * targets),
            unit=run.task.unit,
            per_second=run.targets_per_second,
            seconds_left=expected_seconds(run),
            **run.task.measures(run, progress.loss_sum / items),
        )
    )


def record_health(run: Run, batch: Batch) -> None:
    """If a sample is due, measure every residual connection on the batch, write the sample and report warnings."""
    if not run.health.due():
        return
    with run.autocast():
        rows, warnings = run.health.sample(run.model, batch.inputs, batch.targets, run.loss)
    run.folder.append_health({"step": run.global_step, "connections": rows})
    for sentence in warnings:
        run.reporter.message("warning", f"step {run.global_step}: {sentence}")


def record_epoch(run: Run, evaluation: Any) -> None:
    """Record the metrics of a complete epoch, write its weights if they are the best, and advance to the next.

    Args:
        evaluation: the validation result; None without a validation split, the last epoch is the best one then.
    """
    progress, items = run.progress, run.progress.step * run.recipe.batch_size
    earlier = progress.before
    last_rate = run.recipe.peak_lr * run.lr_factor(run.global_step - 1)
    progress.epoch, progress.before, progress.step = progress.epoch + 1, run.global_step, 0
    if evaluation is None:
        progress.best_epoch = progress.epoch
    elif run.task.is_better(evaluation, progress):
        progress.best_accuracy = evaluation.accuracy
        progress.best_loss = evaluation.loss if math.isfinite(evaluation.loss) else sys.float_info.max
        progress.best_epoch = progress.epoch
        write_weights(run, run.folder.best)
    elif run.recipe.patience is not None and progress.epoch - progress.best_epoch >= run.recipe.patience:
        progress.stopped_early = True
    row = {
        "epoch": progress.epoch,
        "step": run.global_step,
        "lr": last_rate,
        "train_loss": progress.loss_sum / items,
        "train_accuracy": progress.correct / (items * run.task.targets_per_item(run.data)),
        "validation_loss": None if evaluation is None or not math.isfinite(evaluation.loss) else evaluation.loss,
        "validation_accuracy": None if evaluation is None else evaluation.accuracy,
        f"{run.task.unit}s_per_second": round(run.targets_per_second, 1),
        "seconds": round(run.seconds, 3),
    }
    row = run.task.epoch_metrics(run, row, evaluation)
    if run.ranks.first:
        run.folder.append_metrics(row)
        write_steps(run, row)
    run.reporter.epoch(row, progress.epochs)
    remark = run.task.chance_remark(run, row)
    if remark is not None and (earlier < CHANCE_STEPS or run.finished):
        run.reporter.message("warning", remark)
    if progress.stopped_early:
        run.reporter.message(
            "patience",
            f"no better validation result for {counted(run.recipe.patience or 0, 'epoch')}: the run stops early",
        )
    progress.loss_sum, progress.correct = 0.0, 0
    if run.recipe.time is None and progress.plan.end > progress.before:  # the last epoch may be shorter
        progress.epoch_steps = min(progress.plan.length, progress.plan.end - progress.before)
    plan_time(run)


def write_steps(run: Run, epoch: dict[str, Any] | None = None) -> None:
    """Write the steps that were recorded since the last time, and the row of an epoch to TensorBoard with them."""
    run.folder.append_steps(run.rows)
    if run.recipe.tensorboard and (run.rows or epoch is not None):
        write_tensorboard(run.folder.board, run.rows, epoch, again=run.steps_again)
    run.steps_again = run.steps_again and not run.rows
    run.rows.clear()


def is_save_due(run: Run) -> bool:
    """Whether a checkpoint within the epoch is due: every `save_every` steps, or every ten minutes."""
    if run.recipe.save_every is not None:
        return run.progress.step % run.recipe.save_every == 0
    return run.ranks.any(time.monotonic() - run.saved_at > SECONDS_BETWEEN_SAVES)


def save_checkpoint(run: Run) -> None:
    """Write a checkpoint. A full disk does not stop the run: it is reported, and the next save tries again.

    A result of an earlier end goes before the run goes on, so that it stands beside no weights but its own.

    Raises:
        DivergedError: a weight is not finite; the last good checkpoint is kept.
    """
    check_finite(run)
    began = time.monotonic()
    run.progress.seconds, run.saved_at = run.seconds, began
    tensors = {"model": model_state(run.model), "optimizer": optimizer_state(run.model, run.optimizer)}
    if run.ema is not None:
        tensors["ema"] = gather_tensors(run.ema.tensors)
    state = training_state(run)
    if not run.ranks.first:
        return
    write_steps(run)
    if not run.finished:
        run.folder.remove_result()
    with reporting_failures(run):
        run.checkpoints.save(Snapshot(run.global_step, tensors, state))
    run.progress.costs = replace(run.progress.costs, save=time.monotonic() - began)


def check_finite(run: Run) -> None:
    """Raise DivergedError where a weight is not finite, on any rank."""
    if run.ranks.any(not all_finite(run.model)):
        raise DivergedError(
            f"a weight is not finite in epoch {run.progress.epoch + 1}, step {run.progress.step} of "
            f"{run.progress.epoch_steps}. The last good checkpoint is in {run.folder.checkpoints}. Try a lower --lr or "
            "another --scheme"
        )


def finish_saving(run: Run) -> None:
    """Wait for a save in the background; a failure is reported as `save_checkpoint` does."""
    with reporting_failures(run):
        run.checkpoints.finish()


@contextmanager
def reporting_failures(run: Run) -> Iterator[None]:
    """Report that a checkpoint was not written; where there is none at all, that is an error."""
    try:
        yield
    except CheckpointError as error:
        if not run.checkpoints.steps():
            raise
        run.reporter.message("warning", str(error))


def training_state(run: Run) -> dict[str, Any]:
    """The state of a run that a checkpoint stores besides tensors; every rank has to call this."""
    return {
        "progress": asdict(run.progress),
        "length": run.length,
        "scaler": run.scaler.state_dict(),
        "world": run.ranks.world,
        "reference": describe_outputs(run.model, model_config(run)),
    }


def weights_header(run: Run) -> dict[str, Any]:
    """The header of a weight file: network, what it computes with the weights that it has now, preprocessing, epoch,
    and the decay of averaged weights.
    """
    averaged = {} if run.recipe.ema is None else {"ema": run.recipe.ema}
    model = model_config(run)
    reference = describe_outputs(run.model, model)
    return {
        "model": model,
        **({} if reference is None else {"reference": reference}),
        **run.task.describe_inputs(run.data),
        "epoch": run.progress.epoch,
        **averaged,
    }


def write_result(run: Run, path: Path, evaluation: Any) -> None:
    """Add the test result to the header of a weight file."""
    tensors, about = read_tensors(path)
    result = {**run.task.header_result(run, evaluation), "tested_after": run.progress.tested_after}
    write_tensors(path, tensors, {**about, "result": result})


def read_tests(folder: RunFolder, step: int) -> list[int]:
    """The steps after which a run was tested by the header of its best weights, which keep their result when the run
    goes on; a checkpoint is older than the test of its weights. A result without them was one test, after `step`.
    """
    try:
        _, about = read_tensors(folder.best)
    except CheckpointError:  # none yet; whoever tests damaged ones says so
        return []
    result = about.get("result")
    return [] if result is None else result.get("tested_after", [step])


def write_weights(run: Run, path: Path) -> None:
    """Write the weights, or their EMA if there is one, with everything needed for inference in the header."""
    with nullcontext() if run.ema is None else run.ema.applied(run.model):
        about = weights_header(run)
        tensors = model_state(run.model)
        if run.ranks.first:
            write_tensors(path, dict(tensors), about)
