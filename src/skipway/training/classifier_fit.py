"""The classifier of a run, fitted to the features of its frozen network."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from skipway.checkpoint.files import write_json
from skipway.data.augment import Augmentation
from skipway.data.randomness import draw_key
from skipway.errors import SkipwayError, counted, spell
from skipway.inference.evaluation import Evaluation
from skipway.optim.freeze import FrozenTrunk
from skipway.surgery.classifier import find_classifiers
from skipway.tracing import preserved_state
from skipway.training.clock import seconds_left
from skipway.training.ema import ModelEMA
from skipway.training.features import FeatureSource, compute_features, features_of
from skipway.training.head import Head, HeadLoss, cross_entropy, select_head
from skipway.training.linear_head import linear_heads
from skipway.training.mlp_head import MLPHead, mlp_heads
from skipway.training.records import write_weights
from skipway.training.run import Run
from skipway.training.setup import give_hidden_layer, run_config

__all__ = ["fit_classifier", "record_fit", "withdraw_fit"]

TOLERANCE = 1e-3
"""Largest difference between the network's logits and its classifier on the features, over the largest logit."""
USEFUL_STEPS = 20
"""Steps below which training everything is not begun."""
STEP_COST = 3
"""Time of an optimizer step per image, in evaluations of an image."""


def fit_classifier(run: Run) -> bool:
    """Fit the classifier of the run's network to the features of the training images, in place.

    The features are what goes into the classifier in evaluation mode. They are computed once and kept in the cache, by
    the content of weights and images, so that an interrupted run goes on where it was. The penalty of the classifier,
    and the width of its hidden layer if it has one, are selected on the validation images. Under torchrun the first
    process does all that, and the others wait.

    Returns:
        False if the run was told to stop; the network may have changed then, and the checkpoint has not.

    Raises:
        SkipwayError: no validation images, no augmentation for views, or a network whose logits are not a linear map of
            features.
    """
    plan = run.recipe.freeze_plan
    assert isinstance(plan, FrozenTrunk)
    check_choices(run, plan)
    name = find_linear_classifier(run)
    head = None
    if run.ranks.first:
        head = fit_head(run, plan, name)
        if head is None:
            return False
        run.ranks.meet(finished=True)
    else:
        finished = stopped = False
        while not finished and not stopped:
            finished, stopped = run.ranks.meet(stop=run.stop())
        if stopped:
            return False
    install(run, name, head)
    return True


def withdraw_fit(run: Run) -> None:
    """Where fitting the classifier was a default and the network has none to fit, leave it out and say so."""
    if run.given.freeze is None and run.recipe.freeze_plan.fits_classifier:
        try:
            find_linear_classifier(run)
        except SkipwayError as error:
            run.recipe = replace(run.recipe, freeze="none")
            run.reporter.message("note", f"the classifier is not fitted first: {error}")


def check_choices(run: Run, plan: FrozenTrunk) -> None:
    """Refuse what the fit cannot be combined with."""
    choice = spell("freeze", run.recipe.freeze)
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


def fit_head(run: Run, plan: FrozenTrunk, name: str) -> Head | None:
    """Compute the features and fit the head that is best on the validation images; None if the run was told to stop."""
    source = FeatureSource(run, name, plan.views)
    began = time.monotonic()
    train = compute_features(source, "train")
    validation = None if train is None else compute_features(source, "validation")
    if train is None or validation is None:
        return None
    images, seconds = len(train[1]) + len(validation[1]), time.monotonic() - began
    views = f" ({1 + plan.views} of each for training)" if plan.views else ""
    run.reporter.message(
        "features",
        f"{source.width:,} of each of {counted(images, 'image')}{views}, in {seconds:,.0f} s",
    )
    run.reporter.activity("classifier")
    weights = None if run.class_weights is None else run.class_weights.cpu()
    loss = partial(cross_entropy, weights=weights)
    return select_head(
        heads_of(run, plan, *train, partial(loss, smoothing=run.recipe.label_smoothing)),
        validation,
        loss=loss,
        stop=lambda: run.ranks.meet(stop=run.stop())[1],
    )


def heads_of(run: Run, plan: FrozenTrunk, features: Tensor, labels: Tensor, loss: HeadLoss) -> Iterator[Head]:
    """The heads of the chosen kind, fitted one after the other."""
    classes = len(run.data.classes)
    if plan.head == "mlp":
        return mlp_heads(features, labels, classes, seed=draw_key(run.recipe.seed, "head"), loss=loss)
    return linear_heads(features, labels, classes, loss=loss)


@torch.no_grad()
def install(run: Run, name: str, head: Head | None) -> None:
    """Write the head of the first process into the classifier of every process."""
    device = run.device
    width = torch.tensor(float(head.width) if isinstance(head, MLPHead) else 0.0)
    if run.ranks.all_reduce(width) > 0:
        give_hidden_layer(run, [name, int(width)])
        if run.ranks.first:
            write_json(run.folder.config, run_config(run))
    classifier = run.model.get_submodule(name)
    fitted = classifier.state_dict() if head is None else head.module().state_dict()
    for key, parameter in classifier.named_parameters():
        value = fitted[key].to(device, parameter.dtype)
        parameter.copy_(run.ranks.all_reduce(value.clone() if run.ranks.first else torch.zeros_like(value)))
    if run.ema is not None:
        run.ema = ModelEMA(run.model, run.ema.decay)
    if head is not None:
        run.reporter.message("head", head.describe())


def record_fit(run: Run, evaluation: Evaluation) -> None:
    """Record the fitted classifier as the best so far, before the first epoch; the run ends here if that was all, or if
    no time is left for more.
    """
    progress = run.progress
    progress.head_fitted = True
    progress.best_accuracy, progress.best_epoch = evaluation.accuracy, 0
    progress.best_loss = evaluation.loss if math.isfinite(evaluation.loss) else sys.float_info.max
    write_weights(run, run.folder.best)
    run.reporter.message("fitted", f"{100 * evaluation.accuracy:.1f} % of the validation images are right")
    if not run.recipe.freeze_plan.takes_steps or not has_time_for_steps(run):
        progress.epochs = 0


def has_time_for_steps(run: Run) -> bool:
    """Whether `Recipe.time` leaves time for a useful number of optimizer steps; where it does not, that is said."""
    if run.recipe.budget is None:
        return True
    costs = run.progress.costs
    step = STEP_COST * costs.image * run.recipe.batch_size
    rest = costs.validation(len(run.data.validation)) + costs.ending(len(run.data.test))
    if run.ranks.any(run.ranks.first and seconds_left(run) - rest >= USEFUL_STEPS * step):
        return True
    steps = max(USEFUL_STEPS, run.steps_per_epoch)
    minutes = math.ceil((run.elapsed + rest + steps * step) / 60)
    run.reporter.message(
        "plan",
        f"no time for {USEFUL_STEPS} steps of the whole network in {run.recipe.time}: the run ends with the fitted "
        f"classifier; {steps} steps need about {spell('time', f'{minutes}m')}",
    )
    return False
