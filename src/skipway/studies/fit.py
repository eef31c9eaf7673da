"""The small loop that trains a network for a study: what it returns are numbers, also where training fails.

`skipway train` saves, resumes, watches and reports; a study wants none of that and trains a few hundred small nets.
Both share data, schedules, optimizers and optimizer groups.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipway.data import Batch, Data, DataChoices, load
from skipway.optim.groups import param_groups
from skipway.optim.optimizers import parse_optimizer
from skipway.optim.schedules import lr_factor, parse_schedule, set_lr
from skipway.studies.cell import Row

__all__ = ["FitSettings", "data_of", "dataset_name", "fit", "update", "xavier_"]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a network is trained.

    Args:
        epochs: passes over the training images.
        batch_size: images per step.
        optimizer, schedule: spec strings as in a recipe.
        lr: at the end of the warm-up.
        weight_decay: of the roles that are decayed.
        warmup: share of the steps.
        clip: norm of the gradient at most; None does not clip.
        seed: of the order.
    """

    epochs: int
    lr: float
    batch_size: int = 128
    optimizer: str = "sgd"
    schedule: str = "cosine"
    weight_decay: float = 1e-4
    warmup: float = 0.05
    clip: float | None = None
    seed: int = 0


@lru_cache(maxsize=2)
def data_of(source: str | None, *, vary: bool = True) -> Data:
    """The embedded digits, unvaried, for None; else a folder of images, padded, cropped and mirrored if they `vary`.

    A study tests the last weights and chooses nothing, so no validation images are split off.
    """
    if source is None:
        return load(None, crop="none", validation=0.0)
    choices = DataChoices(source=Path(source), validation=0.0)
    return load(choices if vary else replace(choices, crop="none", flip=False))


def dataset_name(data: Data) -> str:
    """What the data are, by what they hold: the published numbers are about CIFAR-10."""
    whole = (len(data.train), len(data.test), len(data.classes), data.size, data.channels)
    return "cifar10" if whole == (50_000, 10_000, 10, 32, 3) else data.name


def xavier_(model: nn.Module) -> None:
    """Xavier's start for all linear maps, in place: the ViTs' N(0, 0.02²) is meant for hundreds of channels, and a
    study's few start far too small in it.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)


def fit(
    model: nn.Module, data: Data, plan: FitSettings, device: str = "cpu", watch: Callable[[int], None] | None = None
) -> Row:
    """Train `model` and return what became of it.

    `train_error` is of the last epoch, while it trained; `test_error` of the last weights, `first_test_error` after one
    epoch. A loss that is not finite ends the training: `diverged`; the weights are then as they are.

    Args:
        watch: called with the number of complete epochs, 0 included.
    """
    place = torch.device(device)
    model.to(place).train()
    kind = parse_optimizer(plan.optimizer)
    chosen = kind.build(param_groups(model, lr=plan.lr, weight_decay=plan.weight_decay))
    steps, shape = data.steps(plan.batch_size), parse_schedule(plan.schedule)
    losses: list[float] = []
    errors: list[float] = []
    first, taken, diverged = math.nan, 0, False
    began = time.perf_counter()
    if watch is not None:
        watch(0)
    for epoch in range(plan.epochs):
        totals = torch.zeros(2, dtype=torch.float64, device=place)
        for batch in data.train_batches(seed=plan.seed, epoch=epoch, batch_size=plan.batch_size, device=place):
            set_lr(chosen, lr_factor(taken, plan.epochs * steps, plan.warmup, shape))
            totals += update(model, chosen, batch, plan.clip)
            taken += 1
            # a GPU is not asked after every step
            if place.type == "cpu" and not math.isfinite(float(totals[0])):
                break
        seen = max(1, taken - epoch * steps)
        losses.append(float(totals[0]) / seen)
        errors.append(1 - float(totals[1]) / seen)
        diverged = not math.isfinite(losses[-1])
        if epoch == 0:
            first = test_error_and_loss(model, data, place)[0]
        if diverged:
            break
        if watch is not None:
            watch(epoch + 1)
    seconds = (time.perf_counter() - began) / max(1, taken)
    error, loss = test_error_and_loss(model, data, place)
    return {
        "train_loss": losses[-1],
        "train_error": 1 - 1 / len(data.classes) if diverged else errors[-1],
        "test_loss": loss,
        "test_error": error,
        "first_test_error": first,
        "diverged": diverged,
        "epochs_done": len(losses),
        "seconds_per_step": round(seconds, 5),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dataset": dataset_name(data),
        "losses": " ".join(f"{loss:.4g}" for loss in losses),
    }


def update(model: nn.Module, chosen: torch.optim.Optimizer, batch: Batch, clip: float | None) -> Tensor:
    """One update; the loss and the share of right answers, left on the device."""
    logits = model(batch.inputs)
    loss = F.cross_entropy(logits.float(), batch.targets)
    chosen.zero_grad()
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    chosen.step()
    right = (logits.detach().argmax(1) == batch.labels).double().mean()
    return torch.stack([loss.detach().double(), right])


@torch.no_grad()
def test_error_and_loss(model: nn.Module, data: Data, device: torch.device) -> tuple[float, float]:
    """Error and loss on the test images; the model trains on afterwards."""
    model.eval()
    wrong, loss, total = 0.0, 0.0, 0
    for batch in data.evaluation_batches("test", batch_size=512, device=device):
        logits = model(batch.inputs).float()
        wrong += float((logits.argmax(1) != batch.labels).sum())
        loss += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
        total += len(batch.labels)
    model.train()
    return wrong / total, loss / total
