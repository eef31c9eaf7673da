"""Everything that decides how a network is trained, in one frozen object that a file can hold.

This file imports no torch: the command line reads its fields, their docstrings and their defaults to make its help.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from skipway.errors import CheckpointError, SkipwayError, suggest

__all__ = ["Recipe", "read_recipe"]

# the batch size that the default learning rates are meant for; they grow in proportion (Goyal 2017)
REFERENCE_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained. None leaves a choice to the data; a run's `config.json` says what was chosen.

    The line under each field is its help on the command line, with the default in brackets where it is a choice.
    The learning rates of 0.1 (SGD) and 0.001 (AdamW) are for a batch of 128 and grow in proportion to it.

    >>> Recipe(lr=-1.0)
    Traceback (most recent call last):
    skipway.errors.SkipwayError: lr=-1.0: the rule is lr > 0
    """

    data: Path | None = field(default=None, kw_only=False)
    """Folder of images. [handwritten digits]"""

    size: int | None = None
    """Input side in pixels. [own up to 64, else 224]"""

    channels: Literal[1, 3] | None = None
    """Grey or colour. [as the images]"""

    holdout: float = 0.2
    """Share of each class to test on without test/."""

    crop: Literal["auto", "pad", "resized", "none"] = "auto"
    """Random crop."""

    flip: bool | None = None
    """Mirror half of the images. [yes; digits no]"""

    unreadable: Literal["skip", "stop"] = "skip"
    """What to do about damaged images."""

    model: str | None = None
    """See skipway models. [resnet20, above 64 px resnet50]"""

    depth: int | None = None
    """Weight layers, the 110 of resnet110. [the model's]"""

    width: int | None = None
    """Channels of the first stage. [the model's]"""

    scheme: str | None = None
    """See skipway schemes. [the model's]"""

    weights: Path | None = None
    """Start from this safetensors file. [random weights]"""

    epochs: int = 30
    """Passes over the training images."""

    batch_size: int = 128
    """Images per step."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW."""

    lr: float | None = None
    """Peak learning rate. [sgd 0.1, adamw 0.001 per 128]"""

    weight_decay: float | None = None
    """Decay of the weights. [sgd 5e-4, adamw 0.05]"""

    momentum: float = 0.9
    """Momentum; adamw's first beta."""

    warmup: float = 0.05
    """Share of the steps to rise in, then a cosine."""

    label_smoothing: float = 0.0
    """Share of the target that all classes get."""

    seed: int = 0
    """Of split, weights, order and augmentation."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of forward passes."""

    workers: int | None = None
    """Processes that decode images. [one per core]"""

    def __post_init__(self) -> None:
        for name in ("size", "depth", "width", "epochs", "batch_size"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise SkipwayError(f"{name}={number}: the rule is {name} >= 1")
        if self.lr is not None and not self.lr > 0:
            raise SkipwayError(f"lr={self.lr}: the rule is lr > 0")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise SkipwayError(f"weight_decay={self.weight_decay}: the rule is weight_decay >= 0")
        if not 0 < self.holdout < 1:
            raise SkipwayError(f"holdout={self.holdout}: the rule is 0 < holdout < 1")
        for name in ("momentum", "warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise SkipwayError(f"{name}={getattr(self, name)}: the rule is 0 <= {name} < 1")
        if self.workers is not None and self.workers < 0:
            raise SkipwayError(f"workers={self.workers}: the rule is workers >= 0")

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up: `lr`, or the optimiser's own in proportion to the batch.

        >>> Recipe(batch_size=256).peak_lr
        0.2
        """
        if self.lr is not None:
            return self.lr
        return {"sgd": 0.1, "adamw": 1e-3}[self.optimizer] * self.batch_size / REFERENCE_BATCH

    @property
    def decay(self) -> float:
        """Weight decay: as given, or 5e-4 for SGD (CIFAR practice), 0.05 for AdamW (Touvron 2021, DeiT)."""
        if self.weight_decay is not None:
            return self.weight_decay
        return {"sgd": 5e-4, "adamw": 0.05}[self.optimizer]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; `read_recipe` makes the same recipe of them.

        >>> Recipe(data=Path("photos")).to_json()["data"]
        'photos'
        """
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any], source: str) -> Recipe:
        """The recipe of `to_json`'s values; unknown names raise, absent ones take their defaults."""
        known = [entry.name for entry in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise CheckpointError(f"{source}: {suggest('recipe field', name, known)}")
        fields: dict[str, Any] = dict(values)
        for name in ("data", "weights"):
            if fields.get(name) is not None:
                fields[name] = Path(fields[name])
        try:
            return cls(**fields)
        except TypeError as error:
            raise CheckpointError(f"{source}: {error}") from error

    def changes(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """The fields in which two recipes differ, as (this one's value, the other's).

        >>> Recipe(epochs=3).changes(Recipe(epochs=5))
        {'epochs': (3, 5)}
        """
        mine, theirs = self.to_json(), other.to_json()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def read_recipe(path: Path) -> Recipe:
    """The recipe in a run folder's `config.json`.

    Raises:
        CheckpointError: the file is missing, not JSON, or not a recipe.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("recipe"), dict):
        raise CheckpointError(f"{path} holds no recipe: the rule is a JSON object with the key 'recipe'")
    return Recipe.from_json(values["recipe"], str(path))
