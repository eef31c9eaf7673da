"""What a run writes on its way: metrics, the best weights, checkpoints."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from skipway.checkpoint.files import read_tensors, write_tensors
from skipway.checkpoint.state import all_finite, gather_tensors, model_state, optimizer_state
from skipway.checkpoint.store import Snapshot
from skipway.errors import CheckpointError, DivergedError
from skipway.inference.evaluation import Evaluation, wilson_interval
from skipway.training.run import Run
from skipway.training.setup import model_of, preprocessing_of, snapshot_state
from skipway.training.tensorboard import write_board

__all__ = ["note_step", "record", "save", "save_is_due", "write_result", "write_weights"]

SECONDS_BETWEEN_SAVES = 600.0
# rows of `steps.jsonl` in an epoch
ROWS_PER_EPOCH = 50


def note_step(run: Run, step: int, loss: float, norm: float) -> None:
    """Every so many steps a line for `steps.jsonl`, which is written together with the next checkpoint."""
    if step % max(1, run.steps // ROWS_PER_EPOCH) == 0:
        done = run.position.epoch * run.steps + step
        rate = run.recipe.peak_lr * run.rate_factor(done - 1)
        run.rows.append({"step": done, "epoch": run.position.epoch + 1, "loss": loss, "norm": norm, "lr": rate})


def record(run: Run, evaluation: Evaluation | None) -> None:
    """Enter a complete epoch into the metrics, keep its weights if they are the best, and move on to the next.

    Args:
        evaluation: of the epoch's weights on the validation images; None: there are none, and the last epoch counts as
            the best.
    """
    position, images = run.position, run.steps * run.recipe.batch_size
    last_rate = run.recipe.peak_lr * run.rate_factor(run.steps_done - 1)
    position.epoch, position.step = position.epoch + 1, 0
    if evaluation is None:
        position.best_epoch = position.epoch
    elif evaluation.accuracy > position.best_accuracy:
        position.best_accuracy, position.best_epoch = evaluation.accuracy, position.epoch
        write_weights(run, run.folder.best)
    elif run.recipe.patience is not None and position.epoch - position.best_epoch >= run.recipe.patience:
        position.ended = True
    row = {
        "epoch": position.epoch,
        "step": run.steps_done,
        "lr": last_rate,
        "train_loss": position.loss_sum / images,
        "train_accuracy": position.correct / images,
        "validation_loss": None if evaluation is None or not math.isfinite(evaluation.loss) else evaluation.loss,
        "validation_accuracy": None if evaluation is None else evaluation.accuracy,
        "images_per_second": round(run.images_per_second, 1),
        "seconds": round(run.seconds, 3),
    }
    if run.ranks.first:
        run.folder.append_metrics(row)
        if run.recipe.tensorboard:
            write_board(run.folder.board, row, run.rows)
    run.screen.epoch(row, position.epochs)
    if position.ended:
        run.screen.say("patience", f"no better accuracy for {run.recipe.patience} epochs: the run ends here")
    position.loss_sum, position.correct = 0.0, 0
    keep_to_time(run)


def keep_to_time(run: Run) -> None:
    """With `Recipe.time`: fewer epochs than planned, if at the pace of the last one so many no longer fit."""
    budget, position = run.recipe.budget, run.position
    if budget is None or not position.planned:
        return
    pace = time.monotonic() - run.epoch_began
    fit = position.epoch + max(0, int((budget - run.seconds) / pace))
    told = run.ranks.total(torch.tensor(float(fit) if run.ranks.first else 0.0))
    if int(told) < position.epochs:
        position.epochs = int(told)
        run.screen.say("plan", f"slower than planned: {position.epochs} epochs fit into {run.recipe.time}")


def save_is_due(run: Run) -> bool:
    """Whether a checkpoint within the epoch is due: every so many steps, or every ten minutes."""
    if run.recipe.save_every is not None:
        return run.position.step % run.recipe.save_every == 0
    return run.ranks.any(time.monotonic() - run.saved_at > SECONDS_BETWEEN_SAVES)


def save(run: Run) -> None:
    """Write a checkpoint, unless a weight is not finite: then the last good one stays. A full disk is no reason to
    stop: it is said, and the next save is another try."""
    if run.ranks.any(not all_finite(run.model)):
        raise DivergedError(
            f"a weight is not finite in epoch {run.position.epoch + 1}, step {run.position.step} of {run.steps}. The "
            f"last good checkpoint is in {run.folder.checkpoints}. Try a lower --lr or another --scheme"
        )
    run.position.seconds, run.saved_at = run.seconds, time.monotonic()
    tensors = {"model": model_state(run.model), "optimizer": optimizer_state(run.model, run.optimizer)}
    if run.average is not None:
        tensors["ema"] = gather_tensors(run.average.tensors)
    if not run.ranks.first:
        return
    run.folder.append_steps(run.rows)
    run.rows.clear()
    try:
        run.checkpoints.save(Snapshot(run.steps_done, tensors, snapshot_state(run)))
    except CheckpointError as error:
        if not run.checkpoints.steps():
            raise
        run.screen.say("warning", str(error))


def about_weights(run: Run) -> dict[str, Any]:
    """What the header of a file of weights says: the network, how images are prepared, and the epoch."""
    return {"model": model_of(run), "preprocessing": preprocessing_of(run), "epoch": run.position.epoch}


def write_result(run: Run, path: Path, evaluation: Evaluation) -> None:
    """Add the test result to the header of a file of weights."""
    tensors, about = read_tensors(path)
    low, high = wilson_interval(evaluation.correct, evaluation.total)
    result = {
        "test_accuracy": evaluation.accuracy,
        "test_correct": evaluation.correct,
        "test_images": evaluation.total,
        "test_interval": [low, high],
        "validation_images": len(run.data.validation),
        "validation_accuracy": run.position.best_accuracy if len(run.data.validation) else None,
    }
    write_tensors(path, tensors, {**about, "result": result})


def write_weights(run: Run, path: Path) -> None:
    """Write the weights alone, the averaged ones if there are any, with what is needed to use them in the header."""
    about = about_weights(run)
    with nullcontext() if run.average is None else run.average.applied(run.model):
        tensors = model_state(run.model)
        if run.ranks.first:
            write_tensors(path, dict(tensors), about)
