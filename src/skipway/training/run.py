"""The state of a run: its parts, its progress, and its outcome."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from skipway.checkpoint.store import Checkpoints
from skipway.hardware.precision import widest
from skipway.kernels.dispatch import bfloat16_kernels
from skipway.monitoring.health import Health
from skipway.optim.schedules import lr_factor
from skipway.recipe import Recipe, ResolvedRecipe
from skipway.tracing.chain import Chain, read_chain
from skipway.training.budget import Plan, RunCosts
from skipway.training.distributed import Ranks
from skipway.training.ema import ModelEMA
from skipway.training.reporter import Reporter
from skipway.training.run_folder import RunFolder
from skipway.training.task import Task

__all__ = ["LENGTH_FIELDS", "Outcome", "Progress", "Run", "StepResult", "growing_side"]

# fields that decide when a run ends
LENGTH_FIELDS = ("epochs", "steps", "time", "patience")

# validations of a run that is given in steps
VALIDATIONS = 10


@dataclass
class Progress:
    """The progress of a run: `step` steps into epoch `epoch`, both from 0, with the sums of this epoch so far.

    An epoch ends with a validation. It is one pass over the training images, or with `Recipe.time` as many steps as are
    planned.

    Args:
        epochs: planned epochs; `Recipe.time` decides them during the run.
        before: steps in the complete epochs.
        epoch_steps: planned steps of this epoch.
        epoch_position: part of the run that was done when this epoch began.
        plan: the steps of the run and its schedule over them.
        costs: what its parts take.
        overhead: seconds of all sessions before their training began: imports, reading, checks.
        validation_images: number of validation images that are used; 0: all.
        accumulation: number of parts in which a batch passes through the network.
        planned: whether `Recipe.time` has been converted to epochs.
        lr_scale: factor on all learning rates, less than 1 after a retry.
        retries: number of retries after a divergence.
        loss_sum: sum of the losses of the images of this epoch.
        correct: number of correct predictions in this epoch.
        seconds: seconds spent in training up to the checkpoint.
        best_accuracy: best validation accuracy over all epochs; -1 before the first.
        best_loss: validation loss of the best epoch, which decides between epochs of equal accuracy.
        best_epoch: epoch of the best accuracy, from 1, 0 for the classifier fitted before; the last one without
            validation images.
        stopped_early: whether `Recipe.patience` has ended the run.
        head_fitted: whether the classifier has been fitted to features, see `Recipe.freeze`.
        head: name of the classifier and width of its hidden layer, if it has been given one.
        tested_after: steps after which the test split was looked at, one for each end of the run.
    """

    epoch: int = 0
    step: int = 0
    epochs: int = 0
    before: int = 0
    epoch_steps: int = 0
    epoch_position: float = 0.0
    plan: Plan = field(default_factory=Plan)
    costs: RunCosts = field(default_factory=RunCosts)
    overhead: float = 0.0
    validation_images: int = 0
    accumulation: int = 1
    planned: bool = False
    lr_scale: float = 1.0
    retries: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    best_accuracy: float = -1.0
    best_loss: float = 0.0
    best_epoch: int = 0
    stopped_early: bool = False
    head_fitted: bool = False
    head: list[Any] | None = None
    tested_after: list[int] = field(default_factory=list)

    @classmethod
    def of_epochs(cls, epochs: int, per_epoch: int, accumulation: int) -> Progress:
        """The start of a run of so many epochs."""
        plan = Plan(end=epochs * per_epoch, length=per_epoch)
        return cls(epochs=epochs, epoch_steps=per_epoch, plan=plan, accumulation=accumulation)

    @classmethod
    def of_steps(cls, steps: int, per_epoch: int, accumulation: int) -> Progress:
        """The start of a run of so many steps, validated every tenth of them, or after every pass over the data."""
        progress = cls(accumulation=accumulation)
        progress.plan_steps(steps, per_epoch)
        return progress

    def plan_steps(self, steps: int, per_epoch: int) -> None:
        """Plan to end after so many steps, in place."""
        length = min(per_epoch, math.ceil(steps / VALIDATIONS))
        self.plan = Plan(end=steps, length=length)
        left = steps - self.before
        self.epochs, self.epoch_steps = self.epoch + math.ceil(max(0, left) / length), min(length, max(0, left))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        """The progress that a checkpoint holds."""
        nested: dict[str, Any] = {"plan": Plan(**values["plan"]), "costs": RunCosts(**values["costs"])}
        return cls(**{**values, **nested})


@dataclass(frozen=True)
class StepResult:
    """The result of a step, still on the device, reduced over all ranks.

    Args:
        loss: mean over the batch.
        correct: number of correct predictions.
        grad_norm: 2-norm of the gradient before clipping.
        is_finite: whether loss and gradient are finite.
        indices: indices of the images in the training split.
    """

    loss: Tensor
    correct: Tensor
    grad_norm: Tensor
    is_finite: Tensor
    indices: Tensor

    def to_tensor(self) -> Tensor:
        """Loss, correct predictions, gradient norm and finiteness in one tensor, to be read at once."""
        return torch.stack([self.loss, self.correct, widest(self.grad_norm), widest(self.is_finite)])


def growing_side(start: int, full: int, done: float) -> int:
    """The image size where sizes grow, when this share of the run is done.

    >>> [growing_side(16, 32, epoch / 6) for epoch in range(6)]
    [16, 20, 24, 28, 32, 32]
    """
    grain = 16 if full > 64 else 4
    return min(full, max(start, int(start + (full - start) * 3 / 2 * done) // grain * grain))


@dataclass
class Run:
    """Everything that a run consists of: recipe, task, data, network, optimizer, and progress.

    `given` is the recipe before choices were made for the user, `data` what the task loads, `warmup_offset` what the
    clock of a residual warm-up is ahead of the steps of the run, None where it does not run, `steps_again` whether the
    next rows of steps may have been written before, by an earlier session or before the run went back.
    """

    recipe: ResolvedRecipe
    task: Task
    data: Any
    model: nn.Module
    network: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEMA | None
    folder: RunFolder
    checkpoints: Checkpoints
    reporter: Reporter
    device: torch.device
    ranks: Ranks
    stop: Callable[[], bool]
    health: Health
    class_weights: Tensor | None = None
    given: Recipe = field(default_factory=Recipe)
    progress: Progress = field(default_factory=Progress)
    pending: list[StepResult] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    earlier_seconds: float = 0.0
    epoch_began: float = 0.0
    saved_at: float = field(default_factory=time.monotonic)
    steps_taken: int = 0
    steps_this_epoch: int = 0
    targets_per_second: float = 0.0
    first_step_at: float = 0.0
    timed_at: float = 0.0
    timed_steps: int = 0
    memory_lines: list[tuple[str, str]] = field(default_factory=list)
    estimated: bool = False
    remarked: bool = False
    reported_end: int = 0
    steps_again: bool = True
    stopping: bool = False
    warmup_offset: int | None = None

    @property
    def length(self) -> dict[str, Any]:
        """The fields of the recipe that decide when the run ends."""
        return {name: getattr(self.recipe, name) for name in LENGTH_FIELDS}

    @property
    def example(self) -> Tensor:
        """Two items, as the network takes them."""
        return self.task.example(self.data).to(self.device)

    @cached_property
    def connections(self) -> Chain[Any]:
        """The residual connections of the network."""
        return read_chain(self.model, self.example)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which all training items are seen."""
        return self.task.steps(self.data, self.recipe.batch_size)

    @property
    def global_step(self) -> int:
        """Optimizer steps since the start of the run, over all sessions."""
        return self.progress.before + self.progress.step

    @property
    def seconds(self) -> float:
        """Seconds spent in training, over all sessions."""
        return self.earlier_seconds + time.monotonic() - self.began

    @property
    def elapsed(self) -> float:
        """Seconds of the commands, over all sessions, each from its start."""
        return self.progress.overhead + self.seconds

    @property
    def finished(self) -> bool:
        return self.progress.stopped_early or self.progress.epoch >= self.progress.epochs

    @property
    def side(self) -> int | None:
        """The image size of this epoch with `grow_from`: linear up to the full size at two thirds of the epochs, in
        multiples of 16 pixels (4 below 64); None at full size (Howard 2018; Tan 2021).
        """
        start = self.recipe.grow_from
        if start is None:
            return None
        full = self.data.size
        done = self.progress.epoch / self.progress.epochs
        if self.recipe.time is not None:  # the plan may change within an epoch
            done = self.progress.epoch_position
        side = growing_side(start, full, done)
        return side if side < full else None

    def lr_factor(self, step: int) -> float:
        """The factor on the peak learning rate at a step of the run."""
        plan = self.progress.plan
        place = plan.virtual_step(min(step, plan.end - 1))
        return self.progress.lr_scale * lr_factor(place, plan.end, self.recipe.warmup, self.recipe.schedule_shape)

    def autocast(self) -> AbstractContextManager[object]:
        """The autocast context of forward passes."""
        if self.recipe.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.recipe.precision))

    def kernels(self) -> AbstractContextManager[object]:
        """The context of both passes, in which products compute what torch is slow at on a CPU in bfloat16."""
        if self.device.type != "cpu" or self.recipe.precision != "bfloat16" or self.recipe.compile:
            return nullcontext()
        return bfloat16_kernels()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, as the task defines it."""
        return self.task.loss(self, logits, targets)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a call of `train`.

    Args:
        finished: whether all epochs are done and the test, too; False after `stop`.
        folder: the run folder.
        recipe: the recipe with every choice resolved.
        task: what was learned.
        classes: class names in the order of the outputs; empty for text.
        evaluation: test result of `best.safetensors`; None if the run was stopped.
        validation_images: number of validation images, or sequences of text.
        best_accuracy: best validation accuracy over all epochs; -1 without validation images.
        best_loss: validation loss of the best epoch.
        best_epoch: epoch of the best accuracy, ties by the lower loss, from 1, 0 for the classifier fitted before; the
            last one without validation images. For text, the epoch of the lowest loss.
        epoch: complete epochs.
        step: steps into the next epoch.
        seconds: seconds spent in training, over all sessions.
        tested_after: see `Progress`.
    """

    finished: bool
    folder: RunFolder
    recipe: ResolvedRecipe
    task: Task
    classes: tuple[str, ...]
    evaluation: Any
    validation_images: int
    best_accuracy: float
    best_loss: float
    best_epoch: int
    epoch: int
    step: int
    seconds: float
    tested_after: tuple[int, ...]

    @classmethod
    def of(cls, run: Run, evaluation: Any) -> Outcome:
        """The outcome of a run as it stands."""
        progress = run.progress
        return cls(
            finished=run.finished and evaluation is not None,
            folder=run.folder,
            recipe=run.recipe,
            task=run.task,
            classes=getattr(run.data, "classes", ()),
            evaluation=evaluation,
            validation_images=run.task.count(run.data, "validation"),
            best_accuracy=progress.best_accuracy,
            best_loss=progress.best_loss,
            best_epoch=progress.best_epoch,
            epoch=progress.epoch,
            step=progress.step,
            seconds=run.seconds,
            tested_after=tuple(progress.tested_after),
        )

    def to_json(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        return {**self.task.summary(self), "tested_after": list(self.tested_after)}
