"""Remarks before the first step about options that act on each other, and about what the images themselves tell."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from skipway.data import Batch, Data
from skipway.data.image_dataset import MemoryDataset
from skipway.errors import counted, spell
from skipway.optim.freeze import FreezePlan, FrozenEpochs, FrozenTrunk
from skipway.recipe import LENGTHS, Recipe
from skipway.training.defaults import SMALLEST_BATCH
from skipway.training.run import Run

__all__ = ["image_remarks", "length_remarks", "option_remarks"]

# share of the values' range that the images use, from which it is remarked
NARROW = 1 / 8
# training images that are compared with their mirror images, per class, and fewest of a class
MIRRORED, FEWEST_MIRRORED = 200, 4
# a class whose mirror image is this much closer to another class than to itself has a direction
CLOSER = 0.5
# below it, the 95 % Wilson interval is wider than 20 percentage points at an accuracy of 90 %
FEW_VALIDATION_IMAGES = 30
FEW_STEPS = 100
# share of one class from which always naming it is a good way to a high accuracy
DOMINANT = 0.75


def option_remarks(run: Run) -> Iterator[str]:
    """Remarks about few images to validate on and few steps, about options without effect, and about pairs of options
    that act on each other.
    """
    recipe, data = run.recipe, run.data
    yield from short_supplies(run)
    yield from unused_options(run)
    plan = recipe.freeze_plan
    mixes = data.augmentation.mixes and plan.takes_steps
    if mixes and recipe.batch_size // run.ranks.world < 2:
        yield (
            f"{spell('augment', recipe.augment)} mixes the images of a batch in pairs, and "
            f"{spell('batch_size', recipe.batch_size)} makes none: nothing is mixed"
        )
    elif mixes:
        yield "training loss and accuracy are those of mixed images; the validation images are not mixed"
    if recipe.label_smoothing:
        floor = smoothing_floor(recipe.label_smoothing, len(data.classes))
        yield (
            f"{spell('label_smoothing', recipe.label_smoothing)}: the training loss is at least {floor:.2f}, the "
            "validation loss is without it"
        )
    if recipe.class_weights != "none" and len(data.validation):
        counts = torch.bincount(data.validation.labels, minlength=len(data.classes))
        share = float(counts.max() / counts.sum())
        if share >= DOMINANT:
            yield (
                f"classes are weighted in the loss, but the epoch is chosen by the accuracy over all validation "
                f"images, {100 * share:.0f} % of which are {data.classes[int(counts.argmax())]!r}"
            )
    epochs = run.progress.epochs
    if isinstance(plan, FrozenEpochs) and plan.epochs >= epochs and recipe.time is None:
        yield f"{spell('freeze', recipe.freeze)} of {counted(epochs, 'epoch')}: only the classifier is trained"
    if plan != FreezePlan() and recipe.initial_weights is None:
        yield f"{spell('freeze', recipe.freeze)} without initial weights trains a classifier of random features"


def short_supplies(run: Run) -> Iterator[str]:
    """Remarks about few validation images and few optimizer steps."""
    splits, images, steps = run.data.splits, len(run.data.validation), run.progress.plan.end
    if 0 < images < FEW_VALIDATION_IMAGES:
        folds = "; --folds 5 uses every image" if splits.fold is None and "test" in splits.split_off else ""
        yield (
            f"only {counted(images, 'image')} to validate on: the choice of the epoch is little more than chance{folds}"
        )
    chosen = run.given.epochs is None and run.given.steps is None and run.given.batch_size is None
    if run.recipe.time is None and run.recipe.freeze_plan.takes_steps and steps < FEW_STEPS and not chosen:
        smaller = "a smaller --batch-size or " if run.recipe.batch_size > SMALLEST_BATCH else ""
        longer = f"{smaller}more --epochs" if run.recipe.steps is None else "more --steps"
        yield f"only {counted(steps, 'step')} in all: {longer} gives more"


def unused_options(run: Run) -> Iterator[str]:
    """Remarks about options that the data or other options leave without effect."""
    recipe, given, data = run.recipe, run.given, run.data
    default = Recipe()
    off = data.splits.split_off
    folds = data.splits.fold is not None
    none = "there are no initial weights"
    idle: Mapping[str, tuple[bool, str]] = {
        "holdout": ("test" not in off or folds, "a fold is the test split" if folds else "the data have a test split"),
        "validation": ("validation" not in off and recipe.validation > 0, "the data have a validation split"),
        "weights_names": (recipe.initial_weights is None, none),
        "weights_entry": (recipe.initial_weights is None, none),
        "weights_adapt": (recipe.initial_weights is None, none),
    }
    yield from length_remarks(given)
    for name, (unused, why) in idle.items():
        value = getattr(given, name)
        if unused and value != getattr(default, name):
            yield f"{spell(name, value)} has no effect: {why}"
    plan, choice = recipe.freeze_plan, spell("freeze", recipe.freeze)
    idle_fields = [name for name in recipe.idle_fields if getattr(given, name) != getattr(default, name)]
    if idle_fields:
        texts = ", ".join(spell(name, getattr(given, name)) for name in idle_fields)
        yield f"{texts}: without effect, since {choice} takes no steps"
    if isinstance(plan, FrozenTrunk) and plan.views and data.augmentation.mixes:
        yield f"the views of {choice} are augmented and not mixed"
    if recipe.flip_test and not recipe.flip:
        yield f"{spell('flip_test', True)} evaluates mirrored images, and none was mirrored in training"


def length_remarks(given: Recipe) -> Iterator[str]:
    """Remarks about lengths that have no effect beside others."""
    lengths = [name for name in LENGTHS if getattr(given, name) is not None]
    for name in lengths[1:]:
        value = spell(lengths[0], getattr(given, lengths[0]))
        yield f"{spell(name, getattr(given, name))} has no effect: {value} sets the length"


def smoothing_floor(smoothing: float, classes: int) -> float:
    """The least cross-entropy to smoothed targets: their entropy.

    >>> round(smoothing_floor(0.1, 2), 4)
    0.1985
    """
    rest = smoothing / classes
    shares = [1 - smoothing + rest, *[rest] * (classes - 1)]
    return -sum(share * math.log(share) for share in shares if share)


def image_remarks(data: Data, sample: Batch) -> Iterator[str]:
    """Remarks about the range of values that training images use, and about mirroring them."""
    mean, std = (
        torch.tensor(values, device=sample.inputs.device).view(1, -1, 1, 1) for values in (data.mean, data.std)
    )
    values = (sample.inputs * std + mean).mul(255).flatten().sort().values
    low, high = (float(values[int(share * (len(values) - 1))]) for share in (0.001, 0.999))
    if high - low < NARROW * 255:
        deep = f"; for 16-bit images {spell('grey16', 'minmax')} uses all of it"
        yield (
            f"the values of {counted(len(sample.inputs), 'training image')} lie between {low:.0f} and {high:.0f} of "
            f"255{deep if data.preprocessing.grey16 == 'range' and data.channels == 1 else ''}"
        )
    if data.augmentation.flip:
        yield from mirror_remarks(data)


def mirror_remarks(data: Data) -> Iterator[str]:
    """A remark where a mirrored image of one class is another class: by the names, or by comparing the images."""
    named = [name for name in data.classes if {"left", "right"} & set(re.split(r"[\W\d_]+", name.lower()))]
    off = spell("flip", False)
    if named:
        yield f"training images are mirrored, and the class {named[0]!r} names a side; {off} leaves them as they are"
        return
    means = class_means(data)
    for first, mine in means.items():
        own = (mine.flip(-1) - mine).norm()
        for second, theirs in means.items():
            if second != first and (mine.flip(-1) - theirs).norm() < CLOSER * own:
                yield (
                    f"training images are mirrored, and mirrored images of {data.classes[first]!r} look like those of "
                    f"{data.classes[second]!r}; {off} leaves them as they are"
                )
                return


def class_means(data: Data) -> dict[int, Tensor]:
    """The mean image of each class over some training images, (C, H, W); empty where images are decoded per batch."""
    if not isinstance(data.train, MemoryDataset):
        return {}
    found = {}
    for label in range(len(data.classes)):
        numbers = (data.train.labels == label).nonzero().flatten()[:MIRRORED]
        if len(numbers) >= FEWEST_MIRRORED:
            images = next(iter(data.train.fetch([numbers], torch.device("cpu"), None)))
            found[label] = images.float().mean(0).permute(2, 0, 1)
    return found
