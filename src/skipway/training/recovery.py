"""Recovery from failed steps: values that are not finite, and out of memory."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
from torch import Tensor

from skipway.data import Batch
from skipway.errors import DivergedError, SkipwayError
from skipway.probes.nonfinite import find_culprit
from skipway.training import step as steps
from skipway.training.records import finish_saving, save_checkpoint
from skipway.training.residual_warmup import move_warmup
from skipway.training.resume import change_plan, load_newest_checkpoint
from skipway.training.run import Run, StepResult

__all__ = ["divergence_error", "is_out_of_memory", "retry_from_checkpoint", "split_batch"]

MAX_RETRIES = 3
RETRY_LR_SCALE = 0.5


def divergence_error(run: Run, cause: str, step: int, result: StepResult) -> DivergedError:
    """Build the error for a step that is not finite: cause, step, images and remedies."""
    where = f"in epoch {run.progress.epoch + 1}, step {step} of {run.progress.epoch_steps}"
    at = ""
    if run.ranks.world == 1:
        run.progress.step = step - 1
        move_warmup(run)
        batch = next(iter(steps.train_batches(run)))
        at = f": {describe_culprit(run, batch)}"
        run.folder.write_bundle(
            {f"{run.task.item}s": batch.inputs, "targets": batch.targets},
            {
                "cause": cause,
                "where": where,
                "blame": at.removeprefix(": "),
                "progress": asdict(run.progress),
                "files": run.task.item_names(run, result.indices),
            },
        )
    return DivergedError(
        f"{cause} {where}{at}. The weights are unchanged by that step; the learning rate is "
        f"{run.optimizer.param_groups[0]['lr']:.3g}. The last good checkpoint is in {run.folder.checkpoints}, the "
        f"batch and its file names in {run.folder.bundle}. Try a lower --lr, a longer --warmup, another --scheme, or "
        "--diverged retry"
    )


def describe_culprit(run: Run, batch: Batch) -> str:
    """Name the first value of a step that is not finite."""

    def loss() -> Tensor:
        steps.seed_step(run, run.progress.step)
        with run.autocast():
            return run.loss(run.model(batch.inputs), batch.targets)

    run.optimizer.zero_grad(set_to_none=True)
    return str(find_culprit(run.model, batch.inputs, loss))


def retry_from_checkpoint(run: Run, error: DivergedError) -> None:
    """With `diverged="retry"`, resume from the last checkpoint with half the learning rate, 3 times; else raise."""
    retries = run.progress.retries
    if run.recipe.diverged != "retry" or retries >= MAX_RETRIES:
        raise error
    run.reporter.message("diverged", str(error))
    before = run.progress
    run.pending.clear()
    run.rows.clear()
    run.optimizer.state.clear()
    finish_saving(run)
    run.ranks.barrier()  # only the first rank writes, and all have to read the same checkpoint
    length = load_newest_checkpoint(run)
    if length is not None:  # of another plan where the newest one is damaged, or could not be written
        change_plan(run, length)
    # the clock does not go back, nor what was learned of the machine and the test images
    kept = ("overhead", "costs", "accumulation", "validation_images", "tested_after")
    run.progress = replace(run.progress, **{name: getattr(before, name) for name in kept})
    lr_scale = run.progress.lr_scale = before.lr_scale * RETRY_LR_SCALE
    run.progress.retries, run.steps_again = retries + 1, True
    if run.recipe.time is not None:  # it is planned again where that was undone
        run.estimated = run.estimated and run.progress.planned
    if run.ranks.first:
        run.folder.keep_rows_until(run.progress.epoch, run.global_step)
    run.reporter.message(
        "retry", f"from epoch {run.progress.epoch}, step {run.progress.step}, learning rates times {lr_scale:g}"
    )
    save_checkpoint(run)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means out of memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def split_batch(run: Run, batch: Batch, error: RuntimeError) -> None:
    """After an out-of-memory error, try smaller parts of the batch until one fits; other errors are raised again.

    Raises:
        SkipwayError: with `memory="stop"`, naming the batch size that fits; or not even one image fits.
    """
    if not is_out_of_memory(error):
        raise error
    local, parts = len(batch.inputs), run.progress.accumulation
    while True:
        parts *= 2
        run.optimizer.zero_grad(set_to_none=True)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        if parts > local:
            raise SkipwayError(
                f"out of memory: not even one {run.task.item} of {run.task.side_text(batch.inputs.shape[-1])} fits"
            ) from error
        before, run.progress.accumulation = run.progress.accumulation, parts
        try:
            steps.backward(run, batch)
            break
        except (RuntimeError, ValueError) as again:  # batch statistics refuse a single value with a ValueError
            run.progress.accumulation = before
            if isinstance(again, ValueError):
                raise SkipwayError(
                    f"out of memory: a batch of {local} does not fit, and parts of {local // parts} cannot be trained: "
                    f"{again}"
                ) from error
            if not is_out_of_memory(again):
                raise
    fits = local // parts
    if run.recipe.memory == "stop":
        run.progress.accumulation = before
        raise SkipwayError(
            f"out of memory: a batch of {local} does not fit, one of {fits} does (measured): use --batch-size {fits}, "
            f"--accumulate {parts} for the same batch in parts, or --memory split to do so automatically"
        ) from error
    run.reporter.message("memory", f"a batch of {local} does not fit: continuing with {parts} parts of {fits}")
