"""Linear probing: the classifier of a run is fitted to the features of its frozen network."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import nn

from skipway.data.augment import Augmentation
from skipway.errors import SkipwayError, counted, spell
from skipway.optim.freeze import FrozenTrunk
from skipway.surgery.classifier import find_classifiers
from skipway.tracing import preserved_state
from skipway.training.ema import ModelEMA
from skipway.training.features import FeatureSource, compute_features, features_of
from skipway.training.linear_head import LinearHead, select_linear_head
from skipway.training.records import write_weights
from skipway.training.run import Run

__all__ = ["fit_classifier", "withdraw_probe"]

TOLERANCE = 1e-3
"""Largest difference between the network's logits and its classifier on the features, over the largest logit."""


def fit_classifier(run: Run) -> bool:
    """Fit the classifier of the run's network to the features of the training images, in place.

    The features are what goes into the classifier in evaluation mode. They are computed once and kept in the cache, by
    the content of weights and images, so that an interrupted run goes on where it was. The penalty of the regression
    is selected on the validation images (`skipway.training.linear_head`). With `freeze="all"` the run is finished
    then; with "first" everything is trained from there, and kept only where validation improves (Kumar et al.
    2022, https://arxiv.org/abs/2202.10054).

    Returns:
        False if the run was told to stop.

    Raises:
        SkipwayError: several processes, no validation images, mixed images, or a network whose logits are not a linear
            map of features.
    """
    plan = run.recipe.freeze_plan
    assert isinstance(plan, FrozenTrunk)
    check_choices(run, plan)
    source = FeatureSource(run, find_linear_classifier(run), plan.views)
    began = time.monotonic()
    train = compute_features(source, "train")
    validation = None if train is None else compute_features(source, "validation")
    if train is None or validation is None:
        return False
    images, seconds = len(train[1]) + len(validation[1]), time.monotonic() - began
    views = f" ({1 + plan.views} of each for training)" if plan.views else ""
    run.reporter.message(
        "features",
        f"{source.classifier.in_features:,} of each of {counted(images, 'image')}{views}, in {seconds:,.0f} s",
    )
    install(run, source.classifier, select_linear_head(train, validation, len(run.data.classes)))
    return True


def withdraw_probe(run: Run) -> None:
    """Where fitting the classifier was a default and the network has none to fit, leave it out and say so."""
    if run.given.freeze is None and run.recipe.freeze_plan.fits_classifier:
        try:
            find_linear_classifier(run)
        except SkipwayError as error:
            run.recipe = replace(run.recipe, freeze="none")
            run.reporter.message("note", f"the classifier is not fitted first: {error}")


def check_choices(run: Run, plan: FrozenTrunk) -> None:
    """Refuse what linear probing cannot be combined with."""
    choice = spell("freeze", run.recipe.freeze)
    if run.ranks.world > 1:
        raise SkipwayError(f"{choice}: the rule is one process; run it without torchrun")
    if not len(run.data.validation):
        raise SkipwayError(
            f"{choice}: validation images select its penalty, and there are none; set validation above 0"
        )
    vary = replace(run.data.augmentation, mixup=0.0, cutmix=0.0)
    if plan.views and vary == Augmentation(pad=vary.pad):
        raise SkipwayError(f"{choice}: nothing augments the images; choose {spell('augment', 'trivial')}, say")


def find_linear_classifier(run: Run) -> str:
    """The name of the one linear map that makes the logits.

    Raises:
        SkipwayError: there are several, it is no `nn.Linear` with a bias, or something follows it.
    """
    names = find_classifiers(run.model, run.example)
    modules = [run.model.get_submodule(name) for name in names]
    way_out = f"{spell('freeze', str(run.recipe.epochs))} trains the classifier by steps"
    if len(modules) != 1 or not isinstance(modules[0], nn.Linear) or modules[0].bias is None:
        kinds = ", ".join(f"{name} ({type(module).__name__})" for name, module in zip(names, modules, strict=True))
        raise SkipwayError(
            f"{spell('freeze', run.recipe.freeze)}: the rule is a network with one linear classifier "
            f"with a bias, and {run.recipe.model} has {kinds or 'none'}; {way_out}"
        )
    batch = run.data.sample(2, seed=0, device=run.device)
    with preserved_state(run.model), torch.no_grad():
        features, logits = features_of(run.model.eval(), modules[0], batch.inputs)
        gap = (modules[0](features) - logits).abs().max() if features.ndim == 2 else torch.tensor(math.inf)
    if not gap <= TOLERANCE * logits.abs().max():
        raise SkipwayError(
            f"{spell('freeze', run.recipe.freeze)}: something follows {names[0]} in {run.recipe.model}, so "
            f"that its logits are not a linear map of features; {way_out}"
        )
    return names[0]


def install(run: Run, classifier: nn.Linear, head: LinearHead) -> None:
    """Write a fitted head into the classifier, record it as the best so far, and end the run if that was all."""
    with torch.no_grad():
        classifier.weight.copy_(head.weight)
        classifier.bias.copy_(head.bias)
    if run.ema is not None:
        run.ema = ModelEMA(run.model, run.ema.decay)
    progress = run.progress
    progress.head_fitted = True
    progress.best_accuracy, progress.best_loss, progress.best_epoch = head.accuracy, head.loss, 0
    if not run.recipe.freeze_plan.takes_steps:
        progress.epochs = 0
    write_weights(run, run.folder.best)
    run.reporter.message(
        "head",
        f"fitted with penalty {head.penalty:.2g}, right for {100 * head.accuracy:.1f} % of the validation images",
    )
