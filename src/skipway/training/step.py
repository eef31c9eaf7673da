"""One optimizer step: its batch, its gradient, its update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from skipway.checkpoint.state import full_tensor
from skipway.data import Batch
from skipway.data.randomness import draw_key
from skipway.hardware.device import seed_torch
from skipway.hardware.precision import widest
from skipway.optim.clip import total_norm
from skipway.training.run import Run, StepResult

__all__ = ["backward", "clip_gradients", "reduce_result", "seed_step", "train_batches", "update_weights"]


def train_batches(run: Run) -> Iterator[Batch]:
    """The batches of this epoch from the current step on, the share of this rank of each.

    An epoch need not be a pass over the data: the next one goes on where it ends.
    """
    progress = run.progress
    while progress.step < progress.epoch_steps:
        data_epoch, start = divmod(run.global_step, run.steps_per_epoch)
        for batch in run.task.train_batches(run, data_epoch, start):
            yield batch
            if progress.step >= progress.epoch_steps:
                return


def backward(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute the gradient of the mean loss, accumulated over the parts of the batch; return the loss and the number of
    correct predictions.
    """
    seed_step(run, run.progress.step)
    run.optimizer.zero_grad(set_to_none=True)
    count = run.progress.accumulation
    parts = list(zip(*(each.chunk(count) for each in (batch.inputs, batch.targets, batch.labels)), strict=True))
    losses, correct = [], []
    for number, (inputs, targets, labels) in enumerate(parts):
        last = number == len(parts) - 1
        no_sync = getattr(run.network, "no_sync", None)
        with nullcontext() if last or no_sync is None else no_sync(), run.kernels():
            with run.autocast():
                out = run.network(inputs)
            loss = run.loss(out, targets) * run.task.share(run, targets, batch)
            run.scaler.scale(loss).backward()
        losses.append(loss.detach())
        correct.append(run.task.count_correct(out.detach(), labels))
    return torch.stack(losses).sum(), torch.stack(correct).sum()


def clip_gradients(run: Run) -> Tensor:
    """Clip the gradients as the recipe says; return their norm before clipping."""
    if run.scaler.is_enabled():
        run.scaler.unscale_(run.optimizer)
    clip = run.recipe.clipper
    return full_tensor(total_norm(run.parameters) if clip is None else clip(run.parameters, run.optimizer.param_groups))


def reduce_result(run: Run, batch: Batch, loss: Tensor, correct: Tensor, norm: Tensor) -> StepResult:
    """Reduce the result of a step over all ranks, without a synchronisation with the device."""
    is_finite = torch.isfinite(loss)
    if not run.scaler.is_enabled():  # the scaler skips steps whose gradient overflows, and lowers its scale
        is_finite = is_finite & torch.isfinite(norm)
    values = torch.stack([widest(loss) / run.ranks.world, widest(correct), widest(~is_finite)])
    loss, correct, failures = run.ranks.all_reduce(values)
    return StepResult(loss, correct, norm.detach(), failures == 0, batch.numbers)


def update_weights(run: Run, is_finite: Tensor) -> bool:
    """Update the weights if loss and gradient are finite; False if the update is known to have been skipped."""
    if run.scaler.is_enabled():
        if not bool(is_finite):
            return False
        run.scaler.step(run.optimizer)
        run.scaler.update()
    elif run.device.type == "cuda" and getattr(run.optimizer, "_step_supports_amp_scaling", False):
        # torch's fused optimizers check this flag on the device, as they do for the gradient scaler
        run.optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        run.optimizer.step()
    elif not bool(is_finite):
        return False
    else:
        run.optimizer.step()
    if run.ema is not None:
        run.ema.update(run.model, run.global_step)
    return True


def seed_step(run: Run, step: int) -> None:
    """Seed the random state of a step, which dropout and stochastic depth draw from."""
    rank = (run.ranks.rank,) if run.ranks.rank else ()
    data_epoch, number = divmod(run.progress.before + step, run.steps_per_epoch)
    seed_torch(draw_key(run.recipe.seed, "step", data_epoch, number, *rank))
