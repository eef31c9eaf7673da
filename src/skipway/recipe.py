"""The recipe of a training run: every option in one frozen dataclass that can be stored as JSON.

Importable without torch: the command line builds its help from the fields, their docstrings and defaults.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from skipway.errors import CheckpointError, SkipwayError, spell, suggest
from skipway.optim.clip import Clipper, parse_clipper
from skipway.optim.freeze import FreezePlan, FrozenTrunk, parse_freeze
from skipway.optim.optimizers import OptimizerSpec, parse_optimizer
from skipway.optim.schedules import ScheduleShape, parse_schedule, usual_warmup
from skipway.registry import Registry, parse_spec
from skipway.validation import is_whole

__all__ = ["LENGTHS", "NO_PATIENCE", "Recipe", "ResolvedRecipe", "read_recipe"]

NO_PATIENCE = "patience needs a validation split, and there is none: set validation above 0, or leave patience out"

LENGTHS = ("time", "steps", "epochs")
"""Fields that set the length of a run: the first of them that is given does."""

WHITENED = "whitened"
"""The start from random weights with a first convolution that whitens the training images."""

STEP_FIELDS = (
    *("epochs", "steps", "batch_size", "accumulate", "optimizer", "lr", "weight_decay", "schedule", "warmup"),
    *("layer_decay", "ema", "clip", "patience", "grow_from"),
)
"""Fields that only optimizer steps read."""

RENAMED = {"weights": "start"}
"""Fields of stored recipes by their earlier names."""

Kind = Literal["image", "text"]
"""Kinds of data that are trained on."""

DEFAULT_CONTEXT = 128
"""Tokens of a sequence where neither the recipe nor the case chooses them."""
LIST_COLUMNS = "image,label,split"
"""Names of columns that let the content decide."""

# the batch size of the default learning rates, which scale with the batch (Goyal 2017)
REFERENCE_BATCH = 128


def rename_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a stored recipe by their present names.

    >>> rename_fields({"freeze": 0, "linear_probe": "only", "weights": None})
    {'freeze': 'all', 'start': None}
    """
    fields = {RENAMED.get(name, name): value for name, value in values.items()}
    probe = fields.pop("linear_probe", "none")
    if probe != "none":
        fields["freeze"] = "all" if probe == "only" else probe
    elif isinstance(fields.get("freeze"), int):  # a number of epochs
        fields["freeze"] = str(fields["freeze"] or "none")
    return fields


def advanced(default: Any, only: Kind | None = None) -> Any:
    """An advanced field, which only `skipway train --help-all` shows."""
    return field(default=default, metadata={"advanced": True, "only": only})


def kind_field(kind: Kind, default: Any) -> Any:
    """A field for one kind of data, which is refused for others."""
    return field(default=default, metadata={"only": kind})


def parse_duration(text: str) -> float:
    """Parse a duration into seconds.

    Raises:
        SkipwayError: the text is not a duration.

    >>> parse_duration("90s"), parse_duration("2h"), parse_duration("1h30m")
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


AUGMENTATIONS: Registry[Callable[..., dict[str, Any]]] = Registry("augmentation")
AUGMENTATIONS.add("none", dict)
AUGMENTATIONS.add("trivial", lambda: {"policy": "trivial"})
AUGMENTATIONS.add("rand", lambda: {"policy": "rand"})
AUGMENTATIONS.add("mixup", lambda alpha=0.2: {"mixup": alpha})
AUGMENTATIONS.add("cutmix", lambda alpha=1.0: {"cutmix": alpha})
AUGMENTATIONS.add("erasing", lambda probability=0.25: {"erasing": probability})


def parse_augmentations(text: str) -> dict[str, Any]:
    """Parse a sum of augmentations into arguments of `skipway.data.load`.

    >>> parse_augmentations("rand+cutmix+erasing(0.1)")
    {'policy': 'rand', 'cutmix': 1.0, 'erasing': 0.1}
    """
    found: dict[str, Any] = {}
    for part in text.split("+"):
        own = parse_spec(part.strip(), AUGMENTATIONS.__getitem__)
        twice = [name for name in own if name in found]
        if twice:
            raise SkipwayError(f"augment={text!r}: {twice[0]} is given twice")
        found.update(own)
    return found


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options of a training run. None leaves a choice to the case: network, start, data, device and time, see
    `skipway.training.defaults`; `config.json` of a run records what was chosen.

    The docstring of each field is its help on the command line, with a default that depends on the data in brackets.
    Optimizers, schedules and clippers are spec strings of objects in `skipway.optim`; their default learning rates are
    for a batch of 128 and scale with it.

    >>> Recipe(lr=-1.0)
    Traceback (most recent call last):
    skipway.errors.SkipwayError: lr=-1.0: the rule is lr > 0
    """

    data: Path | None = field(default=None, kw_only=False)
    """Images (folder, list, tar, hf:NAME), text. [digits]"""

    size: int | None = kind_field("image", None)
    """Image size in pixels. [own up to 64, else by case]"""

    channels: Literal[1, 3] | None = kind_field("image", None)
    """Grey or colour. [as the images]"""

    holdout: float = 0.2
    """Test fraction of each class, or of text."""

    validation: float = 0.1
    """Validation fraction of the rest, without val/."""

    fold: str | None = advanced(None, "image")
    """Test on this fold of the training images, 2/5; --folds trains all. [no folds]"""

    crop: Literal["auto", "pad", "resized", "none"] = advanced("auto", "image")
    """Random crop."""

    flip: bool | None = kind_field("image", None)
    """Random horizontal flip. [yes; digits no]"""

    unreadable: Literal["skip", "stop"] = advanced("skip", "image")
    """Handling of damaged images."""

    most_unreadable: float = advanced(0.01, "image")
    """With --unreadable skip: stop above this fraction of damaged images."""

    allow_empty: bool = advanced(False, "image")
    """Allow classes without images."""

    grey16: Literal["range", "minmax"] | None = advanced(None, "image")
    """Scale 16-bit grey by its full range, or by the range of each image. [as the weights, else range]"""

    fit: Literal["crop", "pad", "squeeze"] | None = advanced(None, "image")
    """How rectangles become square. [as the weights, else crop]"""

    crop_share: float | None = advanced(None, "image")
    """Side of the central crop in evaluation, over the shorter side. [0.875 after random crops, else 1]"""

    resample: Literal["bicubic", "bilinear"] | None = advanced(None, "image")
    """Filter that images are scaled with in evaluation. [bicubic]"""

    mean: str | None = advanced(None, "image")
    """Mean subtracted from each channel in [0, 1]: 0.5, or 0.485,0.456,0.406. [what the weights expect]"""

    std: str | None = advanced(None, "image")
    """Deviation that each channel is divided by: 0.5. [what the weights expect]"""

    max_megapixels: float = advanced(64.0, "image")
    """Refuse images that decode to more megapixels; JPEG counts as reduced."""

    inspect: int | None = advanced(None, "image")
    """Images of a large set to inspect before training. [all]"""

    subfolders: Literal["merge", "classes"] = advanced("merge", "image")
    """Subfolders of a class folder: merge them into the class, or make each a class."""

    outside: bool = advanced(False)
    """Follow links, and paths in lists, that lead out of the data's folder."""

    columns: str = advanced(LIST_COLUMNS)
    """Columns of a list: image,label,split; of a table of texts: the text. [by content]"""

    cache: bool | None = advanced(None)
    """Cache decoded images, or tokens, on disk. [small images, large texts]"""

    tokenizer: str | None = kind_field("text", None)
    """For text: bytes, chars, a tokenizer.json. [bytes]"""

    context: int | None = kind_field("text", None)
    """For text: tokens of a sequence. [by case, 128]"""

    sampling: Literal["packed", "random"] = advanced("packed", "text")
    """Sequences: every token once an epoch, or anywhere in the text."""

    split_by: Literal["auto", "documents", "parts"] = advanced("auto", "text")
    """Hold out whole documents, or the end of each. [documents, where there are enough]"""

    divider: str | None = advanced(None, "text")
    """Text between two documents of a file, such as <|endoftext|>. [a file is one document]"""

    encoding: str | None = advanced(None, "text")
    """Encoding of the files of text. [by content]"""

    model: str | None = None
    """Ours, timm:NAME, FILE.py:NAME; gpt-micro. [by case]"""

    depth: int | None = None
    """Weight layers: 110 for resnet110. [the model's]"""

    width: int | None = None
    """Channels of the first stage. [the model's]"""

    scheme: str | None = None
    """See skipway schemes. [the model's]"""

    start: str | Path | None = None
    """random, auto, pretrained, FILE, hf:NAME. [by case]"""

    weights_names: Literal["skipway", "timm", "torchvision", "huggingface"] = advanced("skipway")
    """Naming scheme of the checkpoint."""

    weights_entry: str | None = advanced(None)
    """State dict of a checkpoint with several: model, ema.module. [averaged weights]"""

    weights_adapt: str = advanced("classes,size")
    """Differences allowed: classes, size, channels, depth, unexpected."""

    epochs: int | None = None
    """Passes over the training data. [by case, 30]"""

    steps: int | None = None
    """Steps instead of epochs. [text: by case, 2000]"""

    time: str | None = None
    """Time budget instead of epochs: 30m, 2h. [none]"""

    batch_size: int | None = None
    """Images or sequences per step. [by case, 128]"""

    optimizer: str | None = None
    """sgd, adamw, lion, lamb, muon. [by case, sgd]"""

    lr: float | None = None
    """Peak rate. [sgd 0.1, adamw 0.001; text: by width]"""

    weight_decay: float | None = None
    """Weight decay. [sgd 5e-4, adamw 0.05; text: 0.1]"""

    schedule: str = "cosine"
    """cosine, step, onecycle, trapezoid."""

    warmup: float | None = None
    """Warm-up fraction of the steps. [0.05; onecycle 0]"""

    label_smoothing: float | None = kind_field("image", None)
    """Label smoothing. [by case, 0]"""

    augment: str | None = kind_field("image", None)
    """trivial+mixup, rand, cutmix, erasing. [by case]"""

    ema: float | None = advanced(None)
    """Decay of an exponential moving average of the weights, e.g. 0.999. [none]"""

    clip: str | None = advanced(None)
    """Gradient clipping: norm(1.0), or adaptive per unit, agc(0.01); none. [none; text norm(1.0)]"""

    accumulate: int = advanced(1)
    """Gradient accumulation: number of parts of a batch."""

    layer_decay: float | None = advanced(None)
    """Learning rate of a block relative to the next one, for fine-tuning. [by case, 1]"""

    freeze: str | None = advanced(None, "image")
    """Frozen layers: all or first (the classifier is fitted to features), N epochs, blocks(K). [by case]"""

    class_weights: Literal["none", "balanced"] = advanced("none", "image")
    """Class weights in the loss; balanced: inversely proportional to the class size."""

    patience: int | None = advanced(None)
    """Early stopping: epochs without a better validation result. [never]"""

    grow_from: int | None = advanced(None, "image")
    """Initial image size, which grows to --size over two thirds of the epochs. [--size]"""

    flip_test: bool = advanced(False, "image")
    """In evaluation, average the logits with those of the mirrored image."""

    seed: int = 0
    """Seed of split, weights, order and augmentation."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type."""

    workers: int | None = kind_field("image", None)
    """Threads that decode. [cores; 0 below 2,000 files]"""

    compile: bool = advanced(False)
    """Compile the network with torch.compile."""

    deterministic: bool = advanced(False)
    """Use only deterministic algorithms; on a CPU they always are."""

    sharding: Literal["none", "full"] = advanced("none")
    """Under torchrun: none replicates the network (DDP), full shards it (FSDP2)."""

    save_every: int | None = advanced(None)
    """Steps between checkpoints within an epoch. [every ten minutes]"""

    health: float = advanced(0.01)
    """Maximum fraction of the time spent on monitoring the connections; 0 disables it."""

    diverged: Literal["stop", "retry"] = advanced("stop")
    """On non-finite values: stop, or retry from the checkpoint with half the learning rate."""

    memory: Literal["stop", "split"] = advanced("stop")
    """When out of memory: stop with the batch size that fits, or split the batch."""

    tensorboard: bool = advanced(False)
    """Also write curves for TensorBoard."""

    def __post_init__(self) -> None:
        if is_whole(self.freeze):
            object.__setattr__(self, "freeze", str(self.freeze))
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if str(entry.type).startswith("str") and not isinstance(value, str | Path | None):
                way_out = "; a network of your own is FILE.py:NAME" if entry.name == "model" else ""
                raise SkipwayError(f"{entry.name}={type(value).__name__}: the rule is a text{way_out}")
        for name in (
            "size",
            "depth",
            "width",
            "context",
            "epochs",
            "steps",
            "batch_size",
            "accumulate",
            "patience",
            "grow_from",
            "save_every",
        ):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
                raise SkipwayError(f"{name}={number!r}: the rule is a whole number >= 1")
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
            if share is not None and not 0 < share < 1 and not (name == "holdout" and share == 0):
                also = "; 0 for text, which is then tested on its validation part" if name == "holdout" else ""
                raise SkipwayError(f"{name}={share}: the rule is 0 < {name} < 1{also}")
        for name in ("validation", "warmup", "label_smoothing", "health"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise SkipwayError(f"{name}={share}: the rule is 0 <= {name} < 1")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise SkipwayError(f"layer_decay={self.layer_decay}: the rule is 0 < layer_decay <= 1")
        if self.workers is not None and self.workers < 0:
            raise SkipwayError(f"workers={self.workers}: the rule is workers >= 0")
        if self.batch_size is not None and self.batch_size % self.accumulate:
            raise SkipwayError(
                f"accumulate={self.accumulate}: the rule is a divisor of batch_size, which is {self.batch_size}"
            )
        for read in (
            lambda: self.optimizer is None or parse_optimizer(self.optimizer),
            lambda: self.schedule_shape,
            lambda: self.clipper,
            lambda: self.freeze_plan,
            lambda: self.budget,
            lambda: self.fold_number,
            lambda: self.numbers("mean"),
            lambda: self.numbers("std"),
            lambda: parse_augmentations(self.augment or "none"),
        ):
            read()

    @property
    def initial_weights(self) -> str | None:
        """Where the weights to start from are: a path, a name of a hub, or "pretrained"; None where they are random.

        >>> Recipe(start="random").initial_weights, Recipe(start="pretrained").initial_weights
        (None, 'pretrained')
        """
        return None if self.start in (None, "random", WHITENED) else str(self.start)

    @property
    def schedule_shape(self) -> ScheduleShape:
        """The schedule shape that `schedule` describes."""
        return parse_schedule(self.schedule)

    @property
    def clipper(self) -> Clipper | None:
        """The clipper that `clip` describes; None without clipping."""
        return None if self.clip in (None, "none") else parse_clipper(self.clip)

    @property
    def freeze_plan(self) -> FreezePlan:
        """What `freeze` describes.

        >>> Recipe(freeze="blocks(2)").freeze_plan
        FrozenBlocks(count=2)
        """
        return parse_freeze("none" if self.freeze is None else self.freeze)

    @property
    def idle_fields(self) -> tuple[str, ...]:
        """The fields that have no effect since no optimizer step is taken; the batch size still is that of evaluations.

        >>> Recipe().idle_fields, "lr" in Recipe(freeze="all").idle_fields
        ((), True)
        """
        plan = self.freeze_plan
        if plan.takes_steps:
            return ()
        return (*STEP_FIELDS, *(() if isinstance(plan, FrozenTrunk) and plan.views else ("augment",)))

    @property
    def budget(self) -> float | None:
        """`time` in seconds.

        >>> Recipe(time="1h30m").budget
        5400.0
        """
        return None if self.time is None else parse_duration(self.time)

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

    @staticmethod
    def text_of(numbers: Iterable[float]) -> str:
        """Numbers as `mean` and `std` hold them, exactly.

        >>> Recipe.text_of((0.5, 0.25))
        '0.5,0.25'
        """
        return ",".join(map(repr, numbers))

    def numbers(self, name: Literal["mean", "std"]) -> tuple[float, ...] | None:
        """`mean` or `std` as numbers.

        >>> Recipe(mean="0.485, 0.456, 0.406").numbers("mean")
        (0.485, 0.456, 0.406)
        """
        text = getattr(self, name)
        try:
            return None if text is None else tuple(float(part) for part in text.split(","))
        except ValueError:
            raise SkipwayError(
                f"{name}={text!r}: the rule is one number, or one for each channel: 0.485,0.456,0.406"
            ) from None

    def check_kind(self, kind: Kind, source: str) -> None:
        """Raise if a field is chosen that has no meaning for this kind of data.

        Raises:
            SkipwayError: there is one.

        >>> Recipe(flip=True).check_kind("text", "book.txt")
        Traceback (most recent call last):
        skipway.errors.SkipwayError: flip=True: an option for images, and book.txt holds text; leave it out
        """
        if kind == "text" and self.start == WHITENED:
            raise SkipwayError(
                f"{spell('start', self.start)}: a start for images, and {source} holds text; leave it out"
            )
        plain = {entry.name: entry.default for entry in dataclasses.fields(ResolvedRecipe)}
        for entry in dataclasses.fields(Recipe):
            wanted, value = entry.metadata.get("only"), getattr(self, entry.name)
            if wanted in (None, kind) or value in (entry.default, plain[entry.name]):
                continue
            other, own = ("images", "text") if kind == "text" else ("text", "images")
            raise SkipwayError(
                f"{spell(entry.name, value)}: an option for {other}, and {source} holds {own}; leave it out"
            )

    def text_choices(self) -> dict[str, Any]:
        """The arguments for `skipway.data.text.load_text` besides the source.

        >>> chosen = Recipe(context=64, tokenizer="chars", columns="review").text_choices()
        >>> chosen["context"], chosen["column"], Recipe().text_choices()["column"]
        (64, 'review', None)
        """
        from skipway.data.sources.columns import parse_column

        chosen = {"tokenizer": self.tokenizer or "bytes", "context": self.context or DEFAULT_CONTEXT}
        names = ("holdout", "validation", "seed", "sampling", "split_by", "divider", "encoding", "outside", "cache")
        return {**chosen, "column": parse_column(self.columns), **{name: getattr(self, name) for name in names}}

    def data_choices(self) -> dict[str, Any]:
        """The arguments for `skipway.data.load`, without those that are left open.

        >>> Recipe(augment="trivial + mixup(0.2)").data_choices()["mixup"], "fit" in Recipe().data_choices()
        (0.2, False)
        """
        from skipway.data.sources.columns import parse_columns

        names = ("size", "channels", "seed", "crop", "flip", "unreadable", "workers", "most_unreadable", "allow_empty")
        more = (
            *("grey16", "fit", "crop_share", "resample", "max_megapixels", "subfolders", "outside", "cache"),
            *("holdout", "validation", "inspect"),
        )
        values = {
            **{name: getattr(self, name) for name in (*names, *more)},
            "fold": self.fold_number,
            "mean": self.numbers("mean"),
            "std": self.numbers("std"),
            "columns": parse_columns(self.columns),
            **parse_augmentations(self.augment or "none"),
        }
        return {name: value for name, value in values.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; `from_json` restores the recipe.

        >>> Recipe(data=Path("photos")).to_json()["data"]
        'photos'
        """
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any], source: str) -> Recipe:
        """Build a recipe from `to_json` values, also under earlier names; unknown ones raise, missing ones use the
        default.
        """
        known = [entry.name for entry in dataclasses.fields(cls)]
        fields = rename_fields(values)
        for name in fields:
            if name not in known:
                raise CheckpointError(f"{source}: {suggest('recipe field', name, known)}")
        if fields.get("data") is not None:
            fields["data"] = Path(fields["data"])
        try:
            return cls(**fields)
        except TypeError as error:
            raise CheckpointError(f"{source}: {error}") from error

    def changes(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """The fields in which two recipes differ, as (value here, value in `other`).

        >>> Recipe(epochs=3).changes(Recipe(epochs=5))
        {'epochs': (3, 5)}
        """
        mine, theirs = self.to_json(), other.to_json()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe(Recipe):
    """A recipe that decides everything about the optimization, and how images are read: what a run holds."""

    grey16: Literal["range", "minmax"] = "range"
    fit: Literal["crop", "pad", "squeeze"] = "crop"
    epochs: int = 30
    batch_size: int = 128
    optimizer: str = "sgd"
    warmup: float = 0.05
    label_smoothing: float = 0.0
    augment: str = "none"
    layer_decay: float = 1.0
    freeze: str = "none"

    @classmethod
    def of(cls, recipe: Recipe) -> ResolvedRecipe:
        """The recipe with plain defaults for everything that it leaves open.

        >>> ResolvedRecipe.of(Recipe(epochs=3)).batch_size
        128
        """
        fields = ((entry.name, getattr(recipe, entry.name)) for entry in dataclasses.fields(recipe))
        values: dict[str, Any] = {name: value for name, value in fields if value is not None}
        values.setdefault("warmup", usual_warmup(recipe.schedule_shape))
        return cls(**values)

    @property
    def kind(self) -> Kind:
        """The kind of data that is trained on; a text has a tokenizer."""
        return "image" if self.tokenizer is None else "text"

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        """The optimizer that `optimizer` describes."""
        return parse_optimizer(self.optimizer)

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up: `lr`, or the default of the optimizer, scaled with the batch.

        >>> ResolvedRecipe(batch_size=256).peak_lr
        0.2
        """
        if self.lr is not None:
            return self.lr
        spec = self.optimizer_spec
        return spec.base_lr * (self.batch_size / REFERENCE_BATCH) ** spec.lr_power

    @property
    def decay(self) -> float:
        """Weight decay: `weight_decay`, or the default of the optimizer."""
        return self.optimizer_spec.weight_decay if self.weight_decay is None else self.weight_decay


def read_recipe(path: Path) -> Recipe:
    """Read the recipe from the `config.json` of a run.

    Raises:
        CheckpointError: the file is missing, not JSON, or has no recipe.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("recipe"), dict):
        raise CheckpointError(f"{path} has no recipe: the rule is a JSON object with the key 'recipe'")
    return Recipe.from_json(values["recipe"], str(path))
