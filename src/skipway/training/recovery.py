"""What is done about numbers that are not finite and memory that runs out."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from skipway.data import Batch
from skipway.errors import DivergedError, SkipwayError
from skipway.training import step as stepping
from skipway.training.nonfinite import find_culprit
from skipway.training.recording import save
from skipway.training.run import Pending, Run
from skipway.training.setup import go_back

__all__ = ["diverged", "out_of_memory", "retry", "split"]

MOST_RETRIES = 3
RETRY_RATE = 0.5


def diverged(run: Run, what: str, step: int, pending: Pending) -> DivergedError:
    """The error for numbers that are not finite: what, where, which images, and what to do."""
    where = f"in epoch {run.position.epoch + 1}, step {step} of {run.steps}"
    at = ""
    if run.ranks.world == 1:
        run.position.step = step - 1
        batch = next(iter(stepping.batches(run)))
        at = f": {blamed(run, batch)}"
        run.folder.write_bundle(
            {"images": batch.inputs, "targets": batch.targets},
            {
                "what": what,
                "where": where,
                "blame": at.removeprefix(": "),
                "position": asdict(run.position),
                "files": [str(run.data.train.names[number]) for number in pending.numbers.tolist()],
            },
        )
    return DivergedError(
        f"{what} {where}{at}. The weights are as before that step; at learning rate "
        f"{run.optimizer.param_groups[0]['lr']:.3g}. The last good checkpoint is in {run.folder.checkpoints}, the "
        f"batch and its files in {run.folder.bundle}. Try a lower --lr, a longer --warmup, another --scheme, or "
        "--diverged retry"
    )


def blamed(run: Run, batch: Batch) -> str:
    """What was not finite first in a step, in words."""

    def loss() -> Tensor:
        stepping.seed_step(run, run.position.step)
        with run.autocast():
            return run.loss(run.model(batch.inputs), batch.targets)

    run.optimizer.zero_grad(set_to_none=True)
    return str(find_culprit(run.model, batch.inputs, loss))


def retry(run: Run, error: DivergedError) -> None:
    """With `diverged="retry"` go back to the last checkpoint and on with half the rate, some times; else raise."""
    retries = run.position.retries
    if run.recipe.diverged != "retry" or retries >= MOST_RETRIES:
        raise error
    run.screen.say("diverged", str(error))
    rate = run.position.rate * RETRY_RATE
    run.pending.clear()
    run.rows.clear()
    run.optimizer.state.clear()
    go_back(run)
    run.position.rate, run.position.retries = rate, retries + 1
    if run.ranks.first:
        run.folder.keep_metrics(run.position.epoch)
        run.folder.keep_steps(run.steps_done)
    run.screen.say("retry", f"from epoch {run.position.epoch}, step {run.position.step}, rates times {rate:g}")
    save(run)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def split(run: Run, batch: Batch, error: RuntimeError) -> None:
    """Find in how many parts a batch fits into memory, by trying; go on with that, or stop and say it."""
    local, parts = len(batch.inputs), run.position.parts
    while True:
        parts *= 2
        run.optimizer.zero_grad(set_to_none=True)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        if parts > local:
            raise SkipwayError(f"out of memory: not even one image of {batch.inputs.shape[-1]} pixels fits") from error
        before, run.position.parts = run.position.parts, parts
        try:
            stepping.gradients(run, batch)
            break
        except RuntimeError as again:
            run.position.parts = before
            if not out_of_memory(again):
                raise
    fits = local // parts
    if run.recipe.memory == "stop":
        run.position.parts = before
        raise SkipwayError(
            f"out of memory: a batch of {local} does not fit, {fits} at a time do (tried): --batch-size {fits}, or "
            f"--accumulate {parts} for the same batch in parts, or --memory split to let that happen by itself"
        ) from error
    run.screen.say("memory", f"{local} images at a time do not fit: from here on {parts} parts of {fits}")
