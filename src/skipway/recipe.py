"""Everything that decides how a network is trained, in one frozen object that a file can hold.

This file imports no torch: the command line reads its fields, their docstrings and their defaults to make its help.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from skipway.errors import CheckpointError, SkipwayError, suggest
from skipway.optim.clip import Clipper, parse_clipper
from skipway.optim.optimizers import OptimizerSpec, parse_optimizer
from skipway.optim.schedules import ScheduleShape, parse_schedule
from skipway.registry import Registry, parse_spec

__all__ = ["NO_PATIENCE", "Recipe", "read_recipe"]

NO_PATIENCE = "patience needs a validation split, and there is none: set validation above 0, or leave patience out"

# the batch size that the default learning rates are meant for; they grow in proportion (Goyal 2017)
REFERENCE_BATCH = 128


def more(default: Any) -> Any:
    """A field that `skipway train --help` leaves to `--help-all`."""
    return field(default=default, metadata={"more": True})


def seconds(text: str) -> float:
    """A duration in seconds.

    Raises:
        SkipwayError: it is none.

    >>> seconds("90s"), seconds("2h"), seconds("1h30m")
    (90.0, 7200.0, 5400.0)
    """
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip().lower())
    found = (
        sum(float(part) * unit for part, unit in zip(parts.groups(), (3600, 60, 1), strict=True) if part)
        if parts
        else 0
    )
    if not found:
        raise SkipwayError(f"time={text!r}: the rule is hours, minutes, seconds: 2h, 30m, 1h30m, 90s")
    return found


VARIATIONS: Registry[Callable[..., dict[str, Any]]] = Registry("augmentation")
VARIATIONS.add("none", dict)
VARIATIONS.add("trivial", lambda: {"policy": "trivial"})
VARIATIONS.add("rand", lambda: {"policy": "rand"})
VARIATIONS.add("mixup", lambda alpha=0.2: {"mixup": alpha})
VARIATIONS.add("cutmix", lambda alpha=1.0: {"cutmix": alpha})
VARIATIONS.add("erasing", lambda probability=0.25: {"erasing": probability})


def variations(text: str) -> dict[str, Any]:
    """The choices of `skipway.data` that a sum of augmentations means.

    >>> variations("rand+cutmix+erasing(0.1)")
    {'policy': 'rand', 'cutmix': 1.0, 'erasing': 0.1}
    """
    found: dict[str, Any] = {}
    for part in text.split("+"):
        own = parse_spec(part.strip(), VARIATIONS.__getitem__)
        twice = [name for name in own if name in found]
        if twice:
            raise SkipwayError(f"augment={text!r}: {twice[0]} is given twice")
        found.update(own)
    return found


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained. None leaves a choice to the data; a run's `config.json` says what was chosen.

    The line under each field is its help on the command line, with the default in brackets where it is a choice.
    Optimisers, schedules and clippings are spec strings of objects in `skipway.training`; their own learning rates are
    for a batch of 128 and grow with it.

    >>> Recipe(lr=-1.0)
    Traceback (most recent call last):
    skipway.errors.SkipwayError: lr=-1.0: the rule is lr > 0
    """

    data: Path | None = field(default=None, kw_only=False)
    """Folder, list, tar shards, hf:NAME. [digits]"""

    size: int | None = None
    """Input side in pixels. [own up to 64, else 224]"""

    channels: Literal[1, 3] | None = None
    """Grey or colour. [as the images]"""

    holdout: float = 0.2
    """Without test/: fraction of a class to test on."""

    validation: float = 0.1
    """Without val/: fraction of the rest to tune on."""

    fold: str | None = more(None)
    """Test on this fold of the training images, 2/5; --folds trains all. [no folds]"""

    crop: Literal["auto", "pad", "resized", "none"] = "auto"
    """Random crop."""

    flip: bool | None = None
    """Mirror half of the images. [yes; digits no]"""

    unreadable: Literal["skip", "stop"] = "skip"
    """What to do about damaged images."""

    most_unreadable: float = more(0.01)
    """Share of damaged images above which it stops all the same."""

    allow_empty: bool = more(False)
    """Keep a class without images."""

    grey16: Literal["range", "minmax"] = more("range")
    """16-bit grey from its full range, or from each image's own."""

    columns: str = more("image,label,split")
    """Of a list in CSV, TSV or Parquet."""

    cache: bool | None = more(None)
    """Keep decoded images in the cache folder, larger ones too. [small ones]"""

    model: str | None = None
    """See skipway models. [resnet20, above 64 px resnet50]"""

    depth: int | None = None
    """Weight layers, the 110 of resnet110. [the model's]"""

    width: int | None = None
    """Channels of the first stage. [the model's]"""

    scheme: str | None = None
    """See skipway schemes. [the model's]"""

    weights: Path | None = None
    """Start from this file, or hf:ORG/NAME. [random]"""

    weights_names: Literal["skipway", "timm", "torchvision", "huggingface"] = more("skipway")
    """Whose names the weights have."""

    epochs: int = 30
    """Passes over the training images."""

    time: str | None = None
    """As many epochs as fit: 30m, 2h. [--epochs]"""

    batch_size: int = 128
    """Images per step, over all processes."""

    optimizer: str = "sgd"
    """sgd, adamw, lion, lamb, muon."""

    lr: float | None = None
    """Peak learning rate. [sgd 0.1, adamw 0.001 per 128]"""

    weight_decay: float | None = None
    """Decay of the weights. [sgd 5e-4, adamw 0.05]"""

    schedule: str = "cosine"
    """cosine, step, onecycle, trapezoid."""

    warmup: float = 0.05
    """Share of the steps to rise in beforehand."""

    label_smoothing: float = 0.0
    """Share of the target that all classes get."""

    augment: str = "none"
    """trivial, rand, mixup, cutmix, erasing; a+b."""

    ema: float | None = more(None)
    """Average the weights with this decay, 0.999 say; the average is evaluated and kept. [no]"""

    clip: str | None = more(None)
    """Hold gradients in bounds: norm(1.0), or agc(0.01) unit by unit. [no]"""

    accumulate: int = more(1)
    """Parts of a batch that go through the network one after the other, for less memory."""

    layer_decay: float = more(1.0)
    """Rate of a block over that of the block behind it, for fine-tuning: 0.75."""

    freeze: int = more(0)
    """Epochs in which only the classifier learns, for fine-tuning."""

    class_weights: Literal["none", "balanced"] = more("none")
    """Weigh the classes in the loss by 1 / images."""

    patience: int | None = more(None)
    """Stop after so many epochs without a better validation accuracy. [never]"""

    grow_from: int | None = more(None)
    """Side to begin with; it grows to --size over two thirds of the epochs. [--size]"""

    flip_test: bool = more(False)
    """Evaluate with the mirrored image too, logits averaged."""

    seed: int = 0
    """Of split, weights, order and augmentation."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of forward passes."""

    workers: int | None = None
    """Processes that decode images. [one per core]"""

    compile: bool = more(False)
    """torch.compile the network."""

    deterministic: bool = more(False)
    """Only algorithms that give the same bits again; on a CPU they do anyway."""

    sharding: Literal["none", "full"] = more("none")
    """Under torchrun: every process holds the whole network (DDP), or a part of it (FSDP2)."""

    save_every: int | None = more(None)
    """Steps between checkpoints within an epoch. [ten minutes]"""

    health: float = more(0.01)
    """Share of the time spent on watching the connections, at most; 0 is off."""

    diverged: Literal["stop", "retry"] = more("stop")
    """When a number is not finite: stop, or go back and on with half the rate, three times."""

    memory: Literal["stop", "split"] = more("stop")
    """When memory runs out: stop and say what fits, or split the batch and go on."""

    tensorboard: bool = more(False)
    """Write the curves for TensorBoard, too."""

    def __post_init__(self) -> None:
        for name in (
            "size",
            "depth",
            "width",
            "epochs",
            "batch_size",
            "accumulate",
            "patience",
            "grow_from",
            "save_every",
        ):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise SkipwayError(f"{name}={number}: the rule is {name} >= 1")
        if self.lr is not None and not self.lr > 0:
            raise SkipwayError(f"lr={self.lr}: the rule is lr > 0")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise SkipwayError(f"weight_decay={self.weight_decay}: the rule is weight_decay >= 0")
        if self.patience is not None and self.validation == 0 and self.data is None:
            raise SkipwayError(NO_PATIENCE)
        for name in ("holdout", "ema"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise SkipwayError(f"{name}={share}: the rule is 0 < {name} < 1")
        for name in ("validation", "warmup", "label_smoothing", "health"):
            if not 0 <= getattr(self, name) < 1:
                raise SkipwayError(f"{name}={getattr(self, name)}: the rule is 0 <= {name} < 1")
        if not 0 < self.layer_decay <= 1:
            raise SkipwayError(f"layer_decay={self.layer_decay}: the rule is 0 < layer_decay <= 1")
        for name in ("workers", "freeze"):
            number = getattr(self, name)
            if number is not None and number < 0:
                raise SkipwayError(f"{name}={number}: the rule is {name} >= 0")
        if self.batch_size % self.accumulate:
            raise SkipwayError(
                f"accumulate={self.accumulate}: the rule is a divisor of batch_size, which is {self.batch_size}"
            )
        for read in (
            lambda: self.optimizer_spec,
            lambda: self.shape,
            lambda: self.clipper,
            lambda: self.budget,
            lambda: self.fold_number,
            lambda: variations(self.augment),
        ):
            read()

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        """What `parse_optimizer` names."""
        return parse_optimizer(self.optimizer)

    @property
    def shape(self) -> ScheduleShape:
        """What `parse_schedule` names."""
        return parse_schedule(self.schedule)

    @property
    def clipper(self) -> Clipper | None:
        """What `clip` names."""
        return None if self.clip is None else parse_clipper(self.clip)

    @property
    def budget(self) -> float | None:
        """`time` in seconds.

        >>> Recipe(time="1h30m").budget
        5400.0
        """
        return None if self.time is None else seconds(self.time)

    @property
    def fold_number(self) -> tuple[int, int] | None:
        """`fold` as (number, count).

        >>> Recipe(fold="2/5").fold_number
        (2, 5)
        """
        if self.fold is None:
            return None
        found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", self.fold)
        number, count = (int(part) for part in found.groups()) if found else (0, 0)
        if not 1 <= number <= count or count < 2:
            raise SkipwayError(f"fold={self.fold!r}: the rule is NUMBER/COUNT, from 1/2: 2/5 is the second of five")
        return number, count

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up: `lr`, or the optimiser's own, grown with the batch.

        >>> Recipe(batch_size=256).peak_lr
        0.2
        """
        if self.lr is not None:
            return self.lr
        spec = self.optimizer_spec
        return spec.base_lr * (self.batch_size / REFERENCE_BATCH) ** spec.lr_power

    @property
    def decay(self) -> float:
        """Weight decay: as given, or the optimiser's own."""
        return self.optimizer_spec.weight_decay if self.weight_decay is None else self.weight_decay

    def data_choices(self) -> dict[str, Any]:
        """What `skipway.data.load` is told.

        >>> Recipe(augment="trivial + mixup(0.2)").data_choices()["mixup"]
        0.2
        """
        names = ("size", "channels", "seed", "crop", "flip", "unreadable", "workers", "most_unreadable", "allow_empty")
        return {
            **{name: getattr(self, name) for name in (*names, "grey16", "cache", "holdout", "validation")},
            "fold": self.fold_number,
            "columns": tuple(name.strip() for name in self.columns.split(",")),
            **variations(self.augment),
        }

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
