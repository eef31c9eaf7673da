"""What one run of training is: its parts, where it stands, and what it comes to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipway.checkpoint.store import Checkpoints
from skipway.data import Data
from skipway.inference.evaluation import Evaluation, wilson_interval
from skipway.monitor.health import Health
from skipway.optim.schedules import lr_factor
from skipway.recipe import Recipe
from skipway.training.averaging import Average
from skipway.training.distributed import Ranks
from skipway.training.reporter import Screen
from skipway.training.run_folder import RunFolder

__all__ = ["Outcome", "Pending", "Position", "Run"]


@dataclass
class Position:
    """Where a run stands: `step` steps into epoch `epoch`, both from 0, with the sums of that epoch so far.

    Args:
        epochs: planned in all; `Recipe.time` decides it on the way.
        parts: a batch goes through the network in so many parts.
        rate: factor on all learning rates, less than 1 once a run went back.
        best_accuracy: on the validation images, over all epochs; -1 before the first.
        best_epoch: the epoch of that, from 1; the last one where there are no validation images.
        ended: no better accuracy for as long as `Recipe.patience` says.
    """

    epoch: int = 0
    step: int = 0
    epochs: int = 0
    parts: int = 1
    planned: bool = False
    rate: float = 1.0
    retries: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    best_accuracy: float = -1.0
    best_epoch: int = 0
    ended: bool = False


@dataclass(frozen=True)
class Pending:
    """What a step left on the device: its loss, its hits, whether its numbers were finite; and its images."""

    loss: Tensor
    correct: Tensor
    norm: Tensor
    fine: Tensor
    numbers: Tensor


@dataclass
class Run:
    """What the functions of the loop share."""

    recipe: Recipe
    data: Data
    model: nn.Module
    network: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    folder: RunFolder
    checkpoints: Checkpoints
    screen: Screen
    device: torch.device
    ranks: Ranks
    stop: Callable[[], bool]
    health: Health
    class_weights: Tensor | None = None
    position: Position = field(default_factory=Position)
    pending: list[Pending] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    earlier_seconds: float = 0.0
    epoch_began: float = 0.0
    saved_at: float = field(default_factory=time.monotonic)
    steps_taken: int = 0
    steps_this_epoch: int = 0
    images_per_second: float = 0.0
    timed_from: float = 0.0
    evaluation: Evaluation | None = None
    stopping: bool = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return self.data.steps(self.recipe.batch_size)

    @property
    def steps_done(self) -> int:
        """Steps since the start of training, over all sessions."""
        return self.position.epoch * self.steps + self.position.step

    @property
    def seconds(self) -> float:
        """Time spent in training, over all sessions."""
        return self.earlier_seconds + time.monotonic() - self.began

    @property
    def finished(self) -> bool:
        return self.position.ended or self.position.epoch >= self.position.epochs

    @property
    def side(self) -> int | None:
        """The side of this epoch's images while they grow: from `grow_from` in a line to the full size at two thirds of
        the epochs, in multiples of 16 pixels (of 4 below 64); None at full size (Howard 2018; Tan 2021).
        """
        start, full = self.recipe.grow_from, self.data.size
        if start is None:
            return None
        grown = start + (full - start) * self.position.epoch / max(1.0, 2 / 3 * self.position.epochs)
        grain = 16 if full > 64 else 4
        side = max(start, int(grown) // grain * grain)
        return side if side < full else None

    def rate_factor(self, step: int) -> float:
        """What multiplies the peak learning rate at a step of the whole run."""
        total = self.position.epochs * self.steps
        return self.position.rate * lr_factor(min(step, total - 1), total, self.recipe.warmup, self.recipe.shape)

    def autocast(self) -> AbstractContextManager[object]:
        """The arithmetic of forward passes."""
        if self.recipe.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.recipe.precision))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy; with class weights each image counts with that of its class."""
        losses = nn.functional.cross_entropy(
            logits.float(),
            targets,
            weight=self.class_weights,
            label_smoothing=self.recipe.label_smoothing,
            reduction="none",
        )
        return losses.mean()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a call of `train` came to.

    Args:
        finished: whether all epochs are done; False after `stop`.
        folder: where everything is.
        recipe: with every choice resolved.
        classes: names in the order of their numbers.
        evaluation: of the weights in `best.safetensors` on the test images; None if the run was stopped.
        validation_images: number of images that the best epoch was chosen on.
        best_accuracy: on these images, over all epochs; -1 where there are none.
        best_epoch: the epoch of that, from 1; the last one where there are no validation images.
        epoch: complete epochs.
        step: steps into the next.
        seconds: spent in training, over all sessions.
    """

    finished: bool
    folder: RunFolder
    recipe: Recipe
    classes: tuple[str, ...]
    evaluation: Evaluation | None
    validation_images: int
    best_accuracy: float
    best_epoch: int
    epoch: int
    step: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What `summary.json` holds."""
        assert self.evaluation is not None
        few = len(self.classes) <= MOST_CLASSES_IN_CONFUSION
        loss = self.evaluation.loss
        return {
            "test_accuracy": self.evaluation.accuracy,
            "test_loss": loss if math.isfinite(loss) else None,
            "test_correct": self.evaluation.correct,
            "test_images": self.evaluation.total,
            "test_interval": list(wilson_interval(self.evaluation.correct, self.evaluation.total)),
            "tested": self.folder.best.name,
            "best_epoch": self.best_epoch,
            "best_validation_accuracy": self.best_accuracy if self.validation_images else None,
            "validation_images": self.validation_images,
            "epochs": self.epoch,
            "seconds": round(self.seconds, 3),
            "confusion": self.evaluation.confusion.tolist() if few else None,
        }


# the confusion matrix of more classes than this would be most of the summary
MOST_CLASSES_IN_CONFUSION = 100
