"""One step: its batch, its gradient, its update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from skipway.data import Batch
from skipway.data.randomness import draw_key
from skipway.training.run import Run

__all__ = ["batches", "gradients", "seed_step", "update"]


def batches(run: Run) -> Iterator[Batch]:
    """The batches of this epoch from the run's position on, this process's share of each."""
    return run.data.train_batches(
        seed=run.recipe.seed,
        epoch=run.position.epoch,
        batch_size=run.recipe.batch_size,
        device=run.device,
        start=run.position.step,
        rank=run.ranks.rank,
        world=run.ranks.world,
        size=run.side,
    )


def gradients(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """The gradient of the mean loss in every parameter; that loss, and the logits."""
    seed_step(run, run.position.step)
    run.optimizer.zero_grad(set_to_none=True)
    parts = list(zip(batch.inputs.chunk(run.position.parts), batch.targets.chunk(run.position.parts), strict=True))
    losses, logits = [], []
    for number, (inputs, targets) in enumerate(parts):
        last = number == len(parts) - 1
        waiting = getattr(run.network, "no_sync", None)
        with nullcontext() if last or waiting is None else waiting():
            with run.autocast():
                out = run.network(inputs)
            loss = run.loss(out, targets) * (len(inputs) / len(batch.inputs))
            run.scaler.scale(loss).backward()
        losses.append(loss.detach())
        logits.append(out.detach().float())
    return torch.stack(losses).sum(), torch.cat(logits)


def seed_step(run: Run, step: int) -> None:
    """The random state of a step: dropout and stochastic depth draw from it."""
    rank = (run.ranks.rank,) if run.ranks.rank else ()
    torch.manual_seed(draw_key(run.recipe.seed, "step", run.position.epoch, step, *rank))


def update(run: Run, fine: Tensor) -> bool:
    """Change the weights by the gradient, if its numbers are finite; False where they are known not to be."""
    if run.scaler.is_enabled():
        if not bool(fine):
            return False
        run.scaler.step(run.optimizer)
        run.scaler.update()
    elif run.device.type == "cuda" and getattr(run.optimizer, "_step_supports_amp_scaling", False):
        # torch's fused updates look at this flag on the device, as they do for the gradient scaler
        run.optimizer.found_inf = (~fine).float()  # type: ignore[attr-defined]
        run.optimizer.step()
    elif not bool(fine):
        return False
    else:
        run.optimizer.step()
    if run.average is not None:
        run.average.update(run.model, run.steps_done)
    return True
