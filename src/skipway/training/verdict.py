"""The verdict before training: what a short look at the network tells about its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor

from skipway.data import Batch
from skipway.diagnosis import diagnose
from skipway.diagnosis.settings import OPTIMIZERS, OptimizerParts, Settings, fresh_copy
from skipway.diagnosis.subject import Subject
from skipway.diagnosis.trial import LookAhead, Trial
from skipway.errors import SkipwayError, counted, duration, spell
from skipway.surgery.classifier import find_classifiers
from skipway.tracing import preserved_state
from skipway.training.run import Run
from skipway.training.trial_pass import forward_fault, keeps_statistics

__all__ = ["verdict_line"]

# what a diagnosis, or some trial steps, cost in forward passes of an image, for each image
DIAGNOSIS_COST, TRIAL_COST = 40, 10
# seconds that they may take, and their share of a time budget
MOST_SECONDS, SHARE = 10.0, 0.02
# a diagnosis needs so many images; smaller sides are multiples of this
FEWEST_IMAGES, SIDE_GRAIN = 8, 32
# passes over the images that the trial steps of a diagnosis may take: 48 steps on an eighth of them
TRIAL_PASSES = 6
# steps that are tried from pretrained weights, and the growth of the loss on other images that is warned of
TRIAL_STEPS, HARM = 6, 1.1
# seconds from which a forward pass is not timed again
SLOW = 1.0


def verdict_line(run: Run, sample: Batch) -> str:
    """What can be told before training, by as many images as the time allows; what it would cost if that is none.

    A fresh network is diagnosed. From pretrained weights some trial steps are taken, and taken back.
    """
    pretrained = run.recipe.initial_weights is not None
    if pretrained and run.recipe.freeze_plan.fits_classifier:
        return f"none from weights: the classifier is fitted to their features first; then {rates_text(run)}"
    allowed = min(MOST_SECONDS, SHARE * (run.recipe.budget or math.inf))
    per_image, cost = seconds_per_image(run, sample), 0.0
    full = run.task.side(run.data)
    for count, side in piece_sizes(len(sample.inputs), full):
        cost = (TRIAL_COST if pretrained else DIAGNOSIS_COST) * count * per_image * (side / full) ** 2
        if cost > allowed or (side < full and forward_fault(run, 2, side)):
            continue
        inputs, labels = sample.inputs[:count], sample.labels[:count]
        if side < full:
            inputs, labels = run.task.shrink(inputs, labels, side)
        told = trial_line(run, inputs, labels) if pretrained else diagnosis_line(run, inputs, labels)
        whole = count == len(sample.inputs) and side == full
        return (
            told
            if whole
            else f"{told} (by {counted(count, run.task.item)} of {run.task.side_text(side)}, for the sake of time)"
        )
    more = rates_text(run) if pretrained else "skipway diagnose gives it"
    return (
        f"not computed: it takes about {duration(cost)} at least, more than the {duration(allowed)} that it may take; "
        f"{more}"
    )


def piece_sizes(images: int, side: int) -> Iterator[tuple[int, int]]:
    """Numbers of images and sides to judge by, the most expensive first.

    >>> list(piece_sizes(32, 224))
    [(32, 224), (16, 224), (8, 224), (8, 96), (8, 32)]
    """
    count = images
    yield count, side
    while count // 2 >= FEWEST_IMAGES:
        count //= 2
        yield count, side
    for part in (2, 4):
        smaller = side // part // SIDE_GRAIN * SIDE_GRAIN
        if smaller:
            yield count, smaller


def seconds_per_image(run: Run, sample: Batch) -> float:
    """Seconds of a forward pass of an image, measured on two of them."""
    seconds = 0.0
    with preserved_state(run.model), torch.no_grad():
        for _ in range(2):  # the first pass of a shape is slower
            began = time.monotonic()
            run.model.eval()(sample.inputs[:2])
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)
            seconds = time.monotonic() - began
            if seconds > SLOW:
                break
    return seconds / min(2, len(sample.inputs))


def rates_text(run: Run) -> str:
    """The learning rates of a run from pretrained weights."""
    rates = [float(group["lr"]) for group in run.optimizer.param_groups]
    spread = (
        f"rates from {min(rates):.2g} to {max(rates):.2g}" if max(rates) > 1.01 * min(rates) else f"rate {rates[0]:.2g}"
    )
    return f"everything that is not frozen is trained at {spread} at most, after {100 * run.recipe.warmup:g} % warm-up"


def trial_line(run: Run, inputs: Tensor, labels: Tensor) -> str:
    """What some steps at the full rates do to pretrained weights; they are taken back."""
    subject = Subject(run.model, inputs, labels, run.loss, training=not keeps_statistics(run), seed=run.recipe.seed)
    same = {id(parameter): parameter for parameter in run.model.parameters()}
    settings = Settings(lr=run.recipe.peak_lr, exact=lambda *_: OptimizerParts([fresh_copy(run.optimizer, same, 1.0)]))
    try:
        ahead = Trial(subject, settings).advance(TRIAL_STEPS).result()
        heads = tuple(f"{name}." for name in find_classifiers(run.model, run.example))
    except SkipwayError as error:
        return f"none: {error}"
    return trial_text(ahead, heads, run.recipe.peak_lr)


def trial_text(ahead: LookAhead, heads: tuple[str, ...], lr: float) -> str:
    """Trial steps in words.

    Args:
        ahead: the steps.
        heads: prefixes of the parameters of the classifier.
        lr: learning rate of the recipe, a tenth of which is advised where the loss grows.
    """
    moved: dict[bool, list[float]] = {True: [], False: []}
    for name, size in ahead.updates.items():
        if math.isfinite(size):
            moved[name.startswith(heads)].append(size)
    trunk, head = (100 * median(moved[key]) if moved[key] else 0.0 for key in (False, True))
    before, after = ahead.unseen
    grows = not after <= HARM * before
    advice = f"; that overwrites what they know: {spell('lr', float(f'{lr / 10:.1g}'))} is gentler" if grows else ""
    return (
        f"none, as the weights are pretrained; of {counted(len(ahead.losses), 'trial step')} without warm-up the first "
        f"moves the weights of the trunk by {trunk:.2g} % and those of the classifier by {head:.2g} %, "
        f"and the loss on other images goes from {before:.3g} to {after:.3g}{advice}"
    )


def diagnosis_line(run: Run, inputs: Tensor, labels: Tensor) -> str:
    """The verdict of a diagnosis of the untrained network in one line; it never stops a run."""
    name = run.recipe.optimizer.partition("(")[0]
    if name not in OPTIMIZERS:
        return f"none: a diagnosis knows {', '.join(OPTIMIZERS)}"
    steps = run.progress.plan.end
    try:
        found = diagnose(
            run.model,
            inputs,
            targets=labels,
            loss=run.task.objective(run),
            optimizer=name,
            lr=run.recipe.peak_lr,
            weight_decay=run.recipe.decay,
            warmup=round(run.recipe.warmup * steps),
            schedule=run.recipe.schedule,
            steps=steps,
            allowance=min(0.03, TRIAL_PASSES / steps),
            remedies=0,
            seed=run.recipe.seed,
        )
    except SkipwayError as error:  # fewer images than a diagnosis needs, say
        return f"none: {error}"
    causes = ", ".join(finding.rule for finding in found.findings)
    return (
        f"{found.verdict}: {'; '.join(found.grounds)}{f' ({causes})' if causes else ''}; more: skipway diagnose --help"
    )
