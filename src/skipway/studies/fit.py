"""Training loop of the studies: it returns numbers, also if training diverges.

Studies train hundreds of small networks and need none of the checkpoints, monitoring and reports of `skipway train`.
Both share data, schedules, optimizers and parameter groups.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipway.data import Batch, Data, DataChoices, load
from skipway.hardware.precision import widest
from skipway.nn.initial import Initial, TruncatedNormal
from skipway.nn.warmup import set_step
from skipway.optim.groups import param_groups
from skipway.optim.optimizers import parse_optimizer
from skipway.optim.schedules import lr_factor, parse_schedule, set_lr
from skipway.schemes.initialisation import common_scheme, reset
from skipway.studies.cell import Row
from skipway.tracing.chain import chain

__all__ = [
    "UNKNOWN_CHANCE",
    "FitSettings",
    "chance",
    "chance_note",
    "chance_of",
    "data_of",
    "dataset_name",
    "fit",
    "fit_batch",
    "restart_",
    "trained_error",
    "xavier_",
]

PUBLISHED_DATA = {"cifar10": (50_000, 10_000, 10, 32, 3), "imagenet": (1_281_167, 50_000, 1000, 224, 3)}
"""Training and test images, classes, size and channels of the data that published numbers refer to."""
UNKNOWN_CHANCE = "measured by a version that did not record the error of chance; the same command measures again"


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """Hyperparameters of a training run.

    Args:
        epochs: number of passes over the training images.
        batch_size: images per step.
        optimizer, schedule: spec strings as in a recipe.
        lr: peak learning rate, reached at the end of the warm-up.
        weight_decay: of the parameters that are decayed.
        warmup: fraction of the steps used for warm-up.
        clip: maximum gradient norm; None does not clip.
        seed: of the data order.
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
    """Load the embedded digits, without augmentation, for None, otherwise a folder of images.

    A study tests the last weights and selects nothing, so that no validation images are split off.

    Args:
        vary: pad, crop and flip the images of a folder at random.
    """
    if source is None:
        return load(None, crop="none", validation=0.0)
    choices = DataChoices(source=Path(source), validation=0.0)
    return load(choices if vary else replace(choices, crop="none", flip=False))


def dataset_name(data: Data) -> str:
    """Return the name of a dataset; those that published numbers refer to are recognised by their dimensions alone."""
    dimensions = (len(data.train), len(data.test), len(data.classes), data.size, data.channels)
    known = next((name for name, each in PUBLISHED_DATA.items() if each == dimensions), None)
    return known or (f"another {data.name}" if data.name in PUBLISHED_DATA else data.name)


def chance(data: Data) -> Row:
    """Return test error and loss of the best constant answer: 1 - max pₖ and -Σ pₖ log pₖ, pₖ the share of class k."""
    shares = torch.bincount(data.test.labels).double() / len(data.test.labels)
    return {"chance_error": 1 - float(shares.max()), "chance_loss": float(torch.special.entr(shares).sum())}


def chance_of(rows: Iterable[Row], column: Literal["chance_error", "chance_loss"] = "chance_error") -> float | None:
    """Return the error or loss of the best constant answer on the data of `rows`; None if no row says.

    The classes of the digits, and of the data that published numbers refer to, count as equally frequent.

    >>> chance_of([{"dataset": "digits"}]), chance_of([{"data": "photos", "chance_error": 0.25}])
    (0.9, 0.25)
    """
    for row in rows:
        stored = row.get(column)
        if row.get("data") and isinstance(stored, int | float):
            return float(stored)
        known = PUBLISHED_DATA.get(str(row.get("dataset")))
        if known or not row.get("data"):
            classes = known[2] if known else 10
            return {"chance_error": 1 - 1 / classes, "chance_loss": math.log(classes)}[column]
    return None


def trained_error(rows: Iterable[Row]) -> float | None:
    """Return the test error below which a network counts as trained, 50 % for ten equally frequent classes, in
    proportion to that of the best constant answer; None if no row says which that is.
    """
    found = chance_of(rows)
    return None if found is None else found * 5 / 9


def chance_note(rows: Iterable[Row]) -> str:
    """Say what error the best constant answer has; nothing if no row says.

    >>> chance_note([{"dataset": "digits"}])
    'Chance is 90 %.'
    """
    found = chance_of(rows)
    return "" if found is None else f"Chance is {100 * found:.3g} %."


def xavier_(model: nn.Module) -> None:
    """Initialise all linear layers of `model` with Xavier's normal distribution, in place.

    The N(0, 0.02²) of ViTs suits hundreds of channels and is far too small for the few channels of a study. For schemes
    that start their maps alike only; see `restart_`.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)


@torch.no_grad()
def restart_(model: nn.Module, starts: Mapping[type[nn.Linear | nn.Conv2d], Initial]) -> nn.Module:
    """Start the maps of `model` that have the N(0, 0.02²) of their family from other distributions, in place.

    The scheme takes its own step afterwards, and maps whose start it chose itself keep that. What stands outside of the
    connections, and is not among `starts`, keeps its values.

    Args:
        model: network of ours, just built.
        starts: distributions by kind of map.
    """
    connections = chain(model)
    residuals = [connection.residual for connection in connections]
    slots = [slot for each in residuals for name, slot in each.named_children() if name not in ("branch", "shortcut")]
    added = {id(module) for slot in slots for module in slot.modules()}
    family = [
        module
        for module in model.modules()
        if getattr(module, "initial", None) == TruncatedNormal(0.02) and id(module) not in added
    ]
    for module in dict.fromkeys(module for each in residuals for module in each.modules()):
        if module not in family:
            reset("", module)  # the scheme's step multiplies what it finds
    for kind, initial in starts.items():
        for module in family:
            if isinstance(module, kind):
                module.initial = initial  # type: ignore[assignment]
                reset("", module)
    common_scheme([each.scheme for each in residuals]).init_(connections)
    return model


def fit(
    model: nn.Module, data: Data, settings: FitSettings, device: str = "cpu", watch: Callable[[int], None] | None = None
) -> Row:
    """Train `model` in place and return its errors and losses, and those of chance, see `chance`.

    `train_error` is measured during the last epoch, `test_error` with the last weights, `first_test_error` after the
    first epoch. A non-finite loss ends the training and sets `diverged`.

    Args:
        model: any classifier of the images of `data`.
        data: of `data_of`.
        settings: hyperparameters.
        device: on which to train.
        watch: called with the number of completed epochs, from 0.
    """
    target = torch.device(device)
    model.to(target).train()
    spec = parse_optimizer(settings.optimizer)
    decay = settings.weight_decay
    optimizer = spec.build(
        param_groups(model, lr=settings.lr, weight_decay=decay, eps=spec.eps, adaptive=spec.adaptive)
    )
    steps, shape = data.steps(settings.batch_size), parse_schedule(settings.schedule)
    losses: list[float] = []
    errors: list[float] = []
    first, taken, diverged = math.nan, 0, False
    began = time.perf_counter()
    if watch is not None:
        watch(0)
    for epoch in range(settings.epochs):
        totals = widest(torch.zeros(2, device=target))
        for batch in data.train_batches(seed=settings.seed, epoch=epoch, batch_size=settings.batch_size, device=target):
            set_lr(optimizer, lr_factor(taken, settings.epochs * steps, settings.warmup, shape))
            totals += fit_batch(model, optimizer, batch, settings.clip)
            taken += 1
            set_step(model, taken, settings.epochs * steps)
            # reading the loss after every step would stall a GPU
            if target.type == "cpu" and not math.isfinite(float(totals[0])):
                break
        seen = max(1, taken - epoch * steps)
        losses.append(float(totals[0]) / seen)
        errors.append(1 - float(totals[1]) / seen)
        diverged = not math.isfinite(losses[-1])
        if epoch == 0:
            first = test_error_and_loss(model, data, target)[0]
        if diverged:
            break
        if watch is not None:
            watch(epoch + 1)
    seconds = (time.perf_counter() - began) / max(1, taken)
    error, loss = test_error_and_loss(model, data, target)
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
        **chance(data),
        "losses": " ".join(f"{loss:.4g}" for loss in losses),
    }


def fit_batch(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, clip: float | None) -> Tensor:
    """Update `model` in place by one batch; return loss and accuracy as a tensor on the device."""
    logits = model(batch.inputs)
    loss = F.cross_entropy(logits.float(), batch.targets)
    optimizer.zero_grad()
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    accuracy = widest(logits.detach().argmax(1) == batch.labels).mean()
    return torch.stack([widest(loss.detach()), accuracy])


@torch.no_grad()
def test_error_and_loss(model: nn.Module, data: Data, device: torch.device) -> tuple[float, float]:
    """Measure error and loss on the test images; `model` is left in training mode."""
    model.eval()
    wrong, loss, total = 0.0, 0.0, 0
    for batch in data.evaluation_batches("test", batch_size=512, device=device):
        logits = model(batch.inputs).float()
        wrong += float((logits.argmax(1) != batch.labels).sum())
        loss += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
        total += len(batch.labels)
    model.train()
    return wrong / total, loss / total
