"""The choices that a recipe leaves open, made for the case: network, start, data, device and time.

* **From weights**: the classifier is fitted to features first, then AdamW trains everything at small rates that fall
  towards the input. Published weights get 128 pixels on a CPU, more or fewer as the time allows, and on a GPU what they
  were trained at.
* **Photos from random weights**: a small network, ResNet-20 at 64 pixels; on a GPU ResNet-18 at 128, or ResNet-50 at
  224 from 10,000 images; SGD, small batches, TrivialAugment, label smoothing.
* **Images up to 64 pixels from random weights**: ResNet-20 at their own size by SGD, as He 2015 for CIFAR; fewer than
  1,280 in smaller batches.

Averaged weights (`ema`) are never a default: validation chooses the epoch already, and short runs average too few.
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from skipway.data.data_config import WeightsDescription
from skipway.data.options import SMALL_SIDE
from skipway.data.source_reader import SourceSummary
from skipway.errors import CheckpointError, SkipwayError, counted, printable, spell
from skipway.inference.published_weights import PRETRAINED, is_pretrained
from skipway.inference.weight_search import search_weights
from skipway.recipe import REFERENCE_BATCH, WHITENED, Recipe, ResolvedRecipe
from skipway.training.initial_weights import adopt_data_config
from skipway.zoo import ModelRequest, load_model

__all__ = ["TrainingCase", "TrunkSpeed", "adopt_choices", "choices_text", "decide", "fitting_batch", "fitting_size"]

AUTO = "auto"
START_WORDS = (AUTO, "random", WHITENED, PRETRAINED)
# fine-tuning: AdamW with layer-wise decay 0.8 as in "A ConvNet for the 2020s" (Liu 2022, table 5) and, between the
# ends of a network, about the factor of 100 of fastai's `fine_tune` (lr_mult=100, 1e-5 to 1e-3 at a batch of 64). The
# rate is this share of the optimizer's own from random weights, up to its batch of 128 whatever the batch: 2.5e-4 for
# AdamW, what MAE (He 2022, table 9) gives for a batch of 128, and 0.025 for SGD, near the best of Kornblith 2019.
FINE_TUNING_SHARE, LAYER_DECAY = 0.25, 0.8
# side of the central crop that a classifier is fitted to where weights state none: all of the image, since its features
# see no random crops; 7/8, as after those, cost 5 points on 200 images of CIFAR-10 and 1 on 1,000 (docs/log.md)
FITTING_SHARE = 1.0
# epochs of everything after the classifier is fitted (Kumar 2022, https://arxiv.org/abs/2202.10054, fits to the end and
# then tunes briefly); fastai's examples take 3 to 5
TUNING_EPOCHS, TUNING_EPOCHS_GPU, FEWEST_STEPS, MOST_EPOCHS = 5, 10, 100, 50
# sizes on a CPU, smallest last, and the share of the time that all features may take: before steps, and without any
SIZES, PLAIN_SIZE = (224, 192, 160, 128, 96), 128
FEATURE_SHARE, FEATURE_SHARE_ALONE = 1 / 4, 3 / 5
# images from which a GPU is given ResNet-50 at 224, the case of He 2015
MANY_IMAGES = 10_000
# size of chosen images above which ResNet-20, which keeps full resolution in its first stage, costs more than ResNet-18
LARGEST_SMALL_NET = 128
# batches of an epoch below which smaller ones are taken: of photos and fine-tuning, and of small images from random
# weights. 300 images of CIFAR-10 reach 44 % with 128, two steps an epoch, and 53 % with 32; 300 digits lose two points
# from 32 to 16 (docs/log.md)
STEPS_PER_EPOCH, STEPS_PER_SMALL_EPOCH, SMALLEST_BATCH = 50, 10, 32


@dataclass(frozen=True)
class TrunkSpeed:
    """What a network takes and how fast this machine computes its features.

    Args:
        size: side of the images that its weights were trained on.
        is_flexible: whether it takes other sizes.
        seconds: per image of 128 pixels, forward; None where it was not measured.
    """

    size: int
    is_flexible: bool
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingCase:
    """What the defaults depend on.

    Args:
        images: training images, after validation and test images are split off.
        all_images: of all splits.
        classes: their number.
        side: of the images before they are scaled, the largest shorter one.
        size: of the inputs, where that is chosen.
        pretrained: whether training starts from weights.
        has_new_classifier: whether the weights have other classes.
        can_fit_classifier: whether there are validation images, and the network is not sharded.
        gpu: whether it trains on one.
        seconds: the time budget; None without one.
        trunk: of published weights.
        views: augmented ones of each training image whose features are computed, too.
        takes_steps: whether more is trained than a classifier of features.
    """

    images: int
    all_images: int
    classes: int
    side: int
    size: int | None = None
    pretrained: bool = False
    has_new_classifier: bool = False
    can_fit_classifier: bool = True
    gpu: bool = False
    seconds: float | None = None
    trunk: TrunkSpeed | None = None
    views: int = 0
    takes_steps: bool = True

    def defaults(self) -> dict[str, Any]:
        """The fields of a recipe for this case; None in a recipe takes them.

        >>> TrainingCase(images=2000, all_images=2500, classes=10, side=300).defaults()["model"]
        'resnet20'
        """
        if self.pretrained:
            return fine_tuning(self)
        if (self.size or self.side) > SMALL_SIDE:
            return photos_from_scratch(self)
        return {"batch_size": fitting_batch(self.images, STEPS_PER_SMALL_EPOCH)}


def fine_tuning(case: TrainingCase) -> dict[str, Any]:
    """From weights: the classifier first (Kumar 2022), then everything at small rates (see the constants)."""
    batch = fitting_batch(case.images)
    steps = max(1, case.images // batch)
    epochs = max(TUNING_EPOCHS_GPU if case.gpu else TUNING_EPOCHS, math.ceil(FEWEST_STEPS / steps))
    probe = case.has_new_classifier and case.can_fit_classifier
    return {
        "optimizer": "adamw",
        "batch_size": batch,
        "epochs": min(MOST_EPOCHS, epochs),
        "layer_decay": LAYER_DECAY,
        "freeze": "first" if probe else "none",
        **({"crop_share": FITTING_SHARE} if probe else {}),
        **({} if case.trunk is None else {"size": fitting_size(case, case.trunk)}),
    }


def photos_from_scratch(case: TrainingCase) -> dict[str, Any]:
    """Photos from random weights: a small network, since each image costs with the square of its side, and few images
    teach a large one little. TrivialAugment (Müller 2021) and label smoothing 0.1 (Szegedy 2016) as in torchvision's
    and timm's recipes for ResNets; SGD as He 2015.
    """
    if case.gpu and case.images >= MANY_IMAGES:
        network = {"model": "resnet50", "size": 224}
    elif case.gpu or (case.size or 0) > LARGEST_SMALL_NET:
        network = {"model": "resnet18", "size": 128}
    else:
        network = {"model": "resnet20", "size": 64}
    return {**network, "augment": "trivial", "label_smoothing": 0.1, "batch_size": fitting_batch(case.images)}


def fitting_batch(images: int, steps: int = STEPS_PER_EPOCH) -> int:
    """The largest batch of 128, 64 or 32 with which an epoch has so many steps; smaller ones make noise of the
    statistics of batch normalisation.

    >>> [fitting_batch(images) for images in (200, 3000, 10_000)]
    [32, 32, 128]
    """
    return next((batch for batch in (128, 64) if images >= steps * batch), SMALLEST_BATCH)


def fitting_size(case: TrainingCase, trunk: TrunkSpeed) -> int:
    """The image size for published weights: what they were trained at on a GPU; on a CPU the largest at which the
    features of all images take a quarter of the time (three fifths if nothing else is trained), and 128 pixels without
    a time.

    >>> case = TrainingCase(images=900, all_images=1000, classes=2, side=300, pretrained=True, seconds=240.0)
    >>> [fitting_size(case, TrunkSpeed(224, True, seconds)) for seconds in (0.01, 0.03, 0.1)]
    [224, 160, 96]
    """
    if case.gpu or not trunk.is_flexible:
        return trunk.size
    if case.seconds is None or trunk.seconds is None:
        return min(trunk.size, PLAIN_SIZE)
    sizes = [trunk.size, *(size for size in SIZES if size < trunk.size)]
    per_pixel = (case.all_images + case.views * case.images) * trunk.seconds / PLAIN_SIZE**2
    limit = case.seconds * (FEATURE_SHARE if case.takes_steps else FEATURE_SHARE_ALONE)
    return next((size for size in sizes if per_pixel * size**2 <= limit), sizes[-1])


def decide(
    recipe: Recipe, summary: SourceSummary, device: torch.device, world: int, report: Callable[[str, str], None]
) -> Recipe:
    """Return the recipe with the choices that it leaves open, made before the images are decoded.

    Args:
        recipe: as the user gave it.
        summary: of the data.
        device: that will train.
        world: number of processes.
        report: called with a label and a sentence about each choice that is not plain.

    Raises:
        CheckpointError: published weights are asked for, and there are none.
    """
    recipe = choose_start(recipe, summary, world, report)
    recipe = adopt_data_config(recipe, lambda sentence: report("note", sentence))
    case = case_of(recipe, summary, device, world)
    values: dict[str, Any] = {"batch_size": ResolvedRecipe.batch_size, **case.defaults()}
    shares = recipe.accumulate * world
    values["batch_size"] = math.ceil(values["batch_size"] / shares) * shares
    if recipe.batch_size is None and values["batch_size"] < min(REFERENCE_BATCH, case.images) and case.takes_steps:
        images, steps = counted(case.images, "image"), counted(max(1, case.images // REFERENCE_BATCH), "step")
        report(
            "batch",
            f"{values['batch_size']}, since with {REFERENCE_BATCH} an epoch of about {images} would be {steps}; "
            f"{spell('batch_size', 'N')} takes another",
        )
    taken: dict[str, Any] = {name: value for name, value in values.items() if getattr(recipe, name) is None}
    recipe = replace(recipe, **taken)
    if case.pretrained and recipe.lr is None:
        usual = ResolvedRecipe.of(
            replace(recipe, batch_size=max(REFERENCE_BATCH, recipe.batch_size or 0), accumulate=1)
        )
        recipe = replace(recipe, lr=float(f"{FINE_TUNING_SHARE * usual.peak_lr:.3g}"))
    return recipe


def choose_start(recipe: Recipe, summary: SourceSummary, world: int, report: Callable[[str, str], None]) -> Recipe:
    """Return the recipe with `start`, and with `model` where that depends on what weights there are.

    Raises:
        CheckpointError: published weights are asked for without a model, and there are none.
    """
    word = str(recipe.start)
    close = difflib.get_close_matches(word.lower(), START_WORDS, 1, 0.8)
    if recipe.start is not None and close and word not in START_WORDS and not Path(word).exists():
        raise SkipwayError(f"{spell('start', word)}: there is no such file; did you mean {close[0]!r}?")
    is_photo = (recipe.size or summary.side) > SMALL_SIDE
    wanted = recipe.start or (AUTO if is_photo else "random")
    named = recipe.model is not None
    if recipe.start is None and not is_photo and summary.channels == 3:
        report(
            "start",
            f"random weights, as by default for images up to {SMALL_SIDE} pixels; {spell('start', AUTO)} takes "
            "published ones where there are any",
        )
    if wanted != AUTO and not (is_pretrained(wanted) and not named):
        return replace(recipe, start=wanted)
    others = f"{spell('start', 'FILE')} takes others"
    if world > 1 and recipe.start == AUTO:
        raise SkipwayError(
            f"{spell('start', AUTO)}: the rule is one process; name {spell('model', 'timm:NAME')} and "
            f"{spell('start', PRETRAINED)}"
        )
    if world > 1 or (not named and (recipe.depth or recipe.width or recipe.scheme)):
        why = (
            "there are several processes"
            if world > 1
            else "depth, width and scheme are those of Skipway's own networks"
        )
        report("start", f"random weights: {why}; {others}")
        return replace(recipe, start="random")
    found = search_weights(recipe.model)
    if found.model is None and is_pretrained(wanted):
        raise CheckpointError(f"{spell('start', PRETRAINED)}: {found.reason}; {others}")
    if found.model is None:
        small = "" if named else "; a small network is trained"
        report("start", f"random weights: {found.reason}{small}; {others}")
        return replace(recipe, start="random")
    report(
        "start",
        f"{printable(found.model)}: {found.reason}; {spell('model', 'timm:NAME')} or "
        f"{spell('start', 'random')} takes another",
    )
    return replace(recipe, start=PRETRAINED, model=found.model)


def case_of(recipe: Recipe, summary: SourceSummary, device: torch.device, world: int) -> TrainingCase:
    """The case of a recipe whose start and network are chosen."""
    rest = summary.training * (1.0 if summary.has_test else 1 - recipe.holdout)
    pretrained = recipe.initial_weights is not None
    published = is_pretrained(recipe.start)
    known = None if published or not pretrained else WeightsDescription(str(recipe.start)).classes
    gpu = device.type == "cuda"
    timed = not gpu and recipe.budget is not None and world == 1
    return TrainingCase(
        images=max(1, round(rest * (1.0 if summary.has_validation else 1 - recipe.validation))),
        all_images=summary.images,
        classes=len(summary.classes),
        side=summary.side,
        size=recipe.size,
        pretrained=pretrained,
        has_new_classifier=known is None or set(known) != set(summary.classes),
        can_fit_classifier=recipe.sharding == "none" and (summary.has_validation or recipe.validation > 0),
        gpu=gpu,
        seconds=recipe.budget,
        views=getattr(recipe.freeze_plan, "views", 0),
        takes_steps=recipe.freeze_plan.takes_steps,
        trunk=measure_trunk(str(recipe.model), device, timed=timed) if published and recipe.size is None else None,
    )


def measure_trunk(model: str, device: torch.device, *, timed: bool) -> TrunkSpeed:
    """The size that a network's weights were trained at, whether it takes others, and how fast it is."""
    loaded = load_model(model, ModelRequest())
    size = loaded.shape[-1]
    network = loaded.model.to(device).eval()
    images = torch.zeros(4, 3, PLAIN_SIZE, PLAIN_SIZE, device=device)
    times = []
    try:
        with torch.no_grad():
            for _ in range(3 if timed else 1):
                began = time.monotonic()
                network(images)
                times.append(time.monotonic() - began)
    except Exception:  # a network of another library that takes only its own size raises its own errors
        return TrunkSpeed(size, is_flexible=False)
    return TrunkSpeed(size, is_flexible=True, seconds=min(times[1:]) / len(images) if timed else None)


def choices_text(given: Recipe, resolved: ResolvedRecipe) -> str:
    """The choices that were made for the user, as options that repeat them.

    >>> choices_text(Recipe(model="resnet8"), ResolvedRecipe(model="resnet8", epochs=3, time="1m", size=8))
    "size=8 batch_size=128 optimizer='sgd' label_smoothing=0.0 augment='none' layer_decay=1.0 freeze='none'"
    """
    shown = [
        field.name
        for field in fields(Recipe)
        if field.name in CHOSEN_FIELDS
        and field.name not in resolved.idle_fields
        and field.metadata.get("only") in (None, resolved.kind)
        and not (field.name in ("epochs", "steps") and resolved.time is not None)
        and not (field.name == "epochs" and resolved.steps is not None)
    ]
    pairs = ((name, getattr(given, name), getattr(resolved, name)) for name in shown)
    return " ".join(spell(name, value) for name, before, value in pairs if value not in (None, before))


def adopt_choices(recipe: Recipe, stored: Mapping[str, Any]) -> Recipe:
    """Return the recipe with what it leaves open as in another run's recipe.

    >>> adopt_choices(Recipe(epochs=3), {"epochs": 5, "size": 96}).to_json()["size"]
    96
    """
    names = (name for name in CHOSEN_FIELDS if getattr(recipe, name) is None and stored.get(name) is not None)
    taken: dict[str, Any] = {name: stored[name] for name in names}
    return replace(recipe, **taken)


CHOSEN_FIELDS = frozenset(
    {"model", "start", "size", "crop_share", "channels", "freeze", "optimizer", "lr", "weight_decay", "layer_decay"}
    | {"label_smoothing", "augment", "batch_size", "epochs", "tokenizer", "context", "steps", "clip"}
)
