"""Lines printed before and after training as (label, text) pairs, the same on a terminal and in a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from skipway.data import Data
from skipway.errors import counted, printable, spell
from skipway.inference.evaluation import Evaluation, wilson_interval
from skipway.inference.metrics import percent
from skipway.probes.signal_check import StageSignal
from skipway.recipe import ResolvedRecipe
from skipway.schemes.scheme import Scheme, short_spec

__all__ = [
    "CHANCE",
    "CHANCE_STEPS",
    "accuracy_text",
    "chance_loss",
    "chance_remark",
    "chosen_text",
    "data_lines",
    "epoch_text",
    "mistakes_text",
    "model_lines",
    "signal_lines",
]

Line = tuple[str, str]

CHANCE_STEPS, CHANCE = 200, 0.99
"""Steps after which a training loss above this share of that of a constant output is remarked upon."""


def data_lines(data: Data) -> Iterator[Line]:
    """Describe the data: images, classes, splits, damaged files, remarks."""
    counts = torch.bincount(data.train.labels, minlength=len(data.classes))
    smallest = int(counts.argmin())
    total = len(data.splits.samples)
    yield (
        "data",
        f"{data.name}: {counted(total, 'image')}, {counted(len(data.classes), 'class', 'classes')}, "
        f"input {data.size}x{data.size} {'grey' if data.channels == 1 else 'colour'}; "
        f"smallest class {printable(data.classes[smallest])!r} with {int(counts[smallest]):,} to train on",
    )
    yield "split", split_text(data)
    inventory = data.inventory
    if left_out := sum(inventory.left_out.values()):
        yield "files", f"{inventory.total:,} in all: {inventory.total - left_out:,} read, {left_out:,} left out"
    if data.unreadable:
        yield "damaged", f"{counted(len(data.unreadable), 'image')} left out:"
        for file, reason in data.unreadable[:3]:
            yield "", f"  {printable(file)}: {reason}"
        if len(data.unreadable) > 3:
            yield "", f"  and {len(data.unreadable) - 3:,} more, all in config.json"
    for remark in data.remarks:
        yield "note", remark


def split_text(data: Data) -> str:
    """Describe the size of each split, in the order in which they are split off, with the option that controls it."""
    off, fold = data.splits.split_off, data.splits.fold
    test = f"{len(data.test):,} to test on"
    if fold is not None:
        test += f" (fold {fold.number} of {fold.count} of the training images)"
    elif "test" in off:
        test += f" ({100 * off['test']:g} %, --holdout)"
    validation = f"{len(data.validation):,} to validate on"
    if not len(data.validation):
        validation = "none to validate on, so the last epoch counts as the best (--validation)"
    elif "validation" in off:
        rest = len(data.train) + len(data.validation)
        validation = (
            f"{len(data.validation):,} of the other {rest:,} to validate on "
            f"({100 * off['validation']:g} %, --validation)"
        )
    return f"{test}, {validation}, {len(data.train):,} to train on{'' if off else '; as the source has them'}"


def model_lines(
    model: nn.Module, recipe: ResolvedRecipe, connections: int, steps: int, flops: float = 0.0, item: str = "image"
) -> Iterator[Line]:
    """Describe the network and the recipe of a run."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    config = getattr(model, "config", None)
    scheme = getattr(config, "scheme", None)
    named = short_spec(scheme) if isinstance(scheme, Scheme) else recipe.scheme
    depth = f", depth {recipe.depth}" if recipe.depth else ""
    work = f"{count_text(flops)}FLOP per {item}, " if flops else ""
    yield (
        "model",
        f"{recipe.model}{depth}: {counted(parameters, 'parameter')}, {work}"
        f"{counted(connections, 'residual connection')}, scheme {named}",
    )
    if not recipe.freeze_plan.takes_steps:
        smooth = f", label smoothing {recipe.label_smoothing:g}" if recipe.label_smoothing else ""
        weighted = ", classes weighted by 1 / images" if recipe.class_weights != "none" else ""
        yield "recipe", f"no steps: {recipe.freeze_plan.describe()}{smooth}{weighted}, seed {recipe.seed}"
        return
    warm = f" after {100 * recipe.warmup:g} % warm-up" if recipe.warmup else ""
    length = f"{counted(recipe.epochs, 'epoch')} of {counted(steps, 'step')}"
    if recipe.time is not None:
        length = f"{recipe.time} in epochs of {counted(steps, 'step')}"
    elif recipe.steps is not None:
        length = f"{counted(recipe.steps, 'step')} of {steps:,} in a pass over the data"
    yield (
        "recipe",
        f"{recipe.optimizer}, learning rate {recipe.peak_lr:.3g}, weight decay {recipe.decay:g}, batch "
        f"{recipe.batch_size}, {length}, {recipe.schedule}{warm}, seed {recipe.seed}",
    )
    others = extras(recipe)
    if others:
        yield "", others


def count_text(number: float) -> str:
    """Format a large number with its metric prefix.

    >>> count_text(4.1e9), count_text(81e6)
    ('4.1 G', '81 M')
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.2g} {prefix}" if number < 10 * factor else f"{number / factor:.0f} {prefix}"
    return f"{number:.0f} "


def extras(recipe: ResolvedRecipe) -> str:
    """Describe the fields of a recipe that differ from their defaults."""
    shown = [
        (recipe.augment != "none", f"augmentation {recipe.augment}"),
        (recipe.ema is not None, f"weights averaged, {recipe.ema}"),
        (recipe.clip is not None, f"gradients clipped, {recipe.clip}"),
        (recipe.accumulate > 1, f"batches in {recipe.accumulate} parts"),
        (recipe.layer_decay < 1, f"layer decay {recipe.layer_decay:g}"),
        (recipe.freeze != "none", recipe.freeze_plan.describe()),
        (recipe.class_weights != "none", "classes weighted by 1 / images"),
        (recipe.grow_from is not None, f"images grow from {recipe.grow_from} pixels"),
        (recipe.label_smoothing > 0, f"label smoothing {recipe.label_smoothing:g}"),
        (recipe.patience is not None, f"patience {counted(recipe.patience or 0, 'epoch')}"),
    ]
    return ", ".join(text for holds, text in shown if holds)


def signal_lines(rows: list[StageSignal]) -> Iterator[Line]:
    """Describe the signal of the first batch in each stage."""
    label = "signal"
    for row in rows:
        warning = f"  {row.warning.upper()}" if row.warning else ""
        ratio = "" if math.isnan(row.ratio) else f", branch/stream {row.ratio:.3g}"
        yield (
            label,
            f"{row.name}: {counted(row.connections, 'connection')}, "
            f"std {row.std_in:.3g} -> {row.std_out:.3g}{ratio}{warning}",
        )
        label = ""


def chance_loss(labels: Tensor, classes: int, *, smoothing: float = 0.0, balanced: bool = False) -> float:
    """The least cross-entropy of an output that is the same for all images: the entropy of the mean target.

    >>> labels = torch.tensor([0, 0, 0, 1])
    >>> round(chance_loss(labels, 2), 4), round(chance_loss(labels, 2, balanced=True), 4)
    (0.5623, 0.6931)
    """
    counts = torch.bincount(labels, minlength=classes).double()
    shares = (counts > 0).double() / classes if balanced else counts / counts.sum()
    return float(torch.special.entr((1 - smoothing) * shares + smoothing / classes).sum())


def chance_remark(recipe: ResolvedRecipe, data: Data, row: Mapping[str, Any]) -> str | None:
    """A sentence where the training loss of an epoch, a row of the metrics, shows that nothing is learned."""
    balanced = recipe.class_weights != "none"
    chance = chance_loss(data.train.labels, len(data.classes), smoothing=recipe.label_smoothing, balanced=balanced)
    if row["step"] < CHANCE_STEPS or not row["train_loss"] >= CHANCE * chance:
        return None
    return (
        f"after {counted(row['step'], 'step')} the training loss is {row['train_loss']:.4g}, and {chance:.4g} is "
        "that of an output that is the same for all images: nothing is learned; "
        f"{spell('lr', recipe.peak_lr)} may be far off, or the labels are those of other images"
    )


def accuracy_text(evaluation: Evaluation) -> str:
    """Format the test accuracy with its 95 % interval."""
    low, high = wilson_interval(evaluation.correct, evaluation.total)
    return (
        f"{percent(evaluation.accuracy)} of {counted(evaluation.total, 'test image')} "
        f"(95 % interval {100 * low:.1f} to {percent(high)})"
    )


def epoch_text(epoch: int, *, fitted: bool) -> str:
    """Which weights those of an epoch are; before the first epoch a classifier may have been fitted to features.

    >>> epoch_text(3, fitted=True), epoch_text(0, fitted=True), epoch_text(0, fitted=False)
    ('epoch 3', 'classifier fitted to features', 'epoch 0')
    """
    return f"epoch {epoch}" if epoch or not fitted else "classifier fitted to features"


def chosen_text(validation_images: int, accuracy: float, epoch: int, epochs: int) -> str:
    """Describe which weights were tested, and how they were chosen, after so many epochs.

    >>> chosen_text(143, 0.972, 7, 9)
    'weights of epoch 7, the best on 143 validation images (97.2 %)'
    >>> chosen_text(143, 0.972, 0, 9)
    'the classifier fitted to features, right for 97.2 % of 143 validation images; none of 9 epochs was better'
    """
    if not validation_images:
        return f"weights of epoch {epoch}, the last, as there are no validation images"
    if not epoch:
        images = counted(validation_images, "validation image")
        more = f"; none of {counted(epochs, 'epoch')} was better" if epochs else ""
        return f"the classifier fitted to features, right for {percent(accuracy)} of {images}{more}"
    return (
        f"weights of epoch {epoch}, the best on {counted(validation_images, 'validation image')} ({percent(accuracy)})"
    )


def mistakes_text(evaluation: Evaluation, classes: tuple[str, ...]) -> str:
    """Describe the worst class and the most frequent mistake."""
    number, share, images = evaluation.worst_class()
    text = f"worst class {printable(classes[number])!r}, {percent(share)} of {images:,}"
    confusion = evaluation.top_confusion()
    if confusion is not None:
        true, taken, count = confusion
        often = counted(count, "time")
        text += f"; most often {printable(classes[true])!r} is taken for {printable(classes[taken])!r} ({often})"
    return text
