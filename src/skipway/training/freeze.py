"""Layers of a run that do not learn: frozen before an epoch, by `Recipe.freeze`."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError, counted, spell
from skipway.optim.freeze import FrozenBlocks
from skipway.optim.groups import layer_indices
from skipway.tracing import preserved_state
from skipway.training.run import Run
from skipway.training.setup import wrap_network
from skipway.training.trial_pass import keeps_statistics, normalisers

__all__ = ["check_freeze", "freeze_layers"]


def check_freeze(run: Run) -> None:
    """Refuse to freeze more blocks than the network has."""
    plan = run.recipe.freeze_plan
    if isinstance(plan, FrozenBlocks):
        blocks = max(layer_indices(run.model, run.example).values()) - 1
        if plan.count > blocks:
            raise SkipwayError(
                f"{spell('freeze', run.recipe.freeze)}: {run.recipe.model} has {counted(blocks, 'block')}; the rule "
                "is at most as many"
            )


def freeze_layers(run: Run) -> None:
    """Let the layers learn that the plan of the recipe does not freeze in this epoch, in place.

    Frozen modules are in evaluation mode. What is frozen from the images on needs no gradient, so that autograd keeps
    nothing of it.
    """
    plan = run.recipe.freeze_plan
    if keeps_statistics(run):
        for _, module in normalisers(run.model):
            module.eval()
    if plan.frozen_layers(0, 1) == 0:
        return
    layers = layer_indices(run.model, run.example)
    frozen = plan.frozen_layers(run.progress.epoch, max(layers.values()))
    changed = False
    for name, parameter in run.model.named_parameters():
        learns = layers[name] >= frozen
        changed |= parameter.requires_grad != learns
        parameter.requires_grad_(learns)
    if frozen:
        for module in frozen_modules(run.model, run.example):
            module.eval()
    if changed:
        wrap_network(run)


def frozen_modules(model: nn.Module, example: Tensor) -> list[nn.Module]:
    """The modules without a parameter that learns: those that have frozen ones, and those that run before the first
    module that learns. A dropout before the classifier is not frozen.
    """
    called: list[nn.Module] = []
    with ExitStack() as stack, preserved_state(model), torch.no_grad():
        for module in model.modules():
            handle = module.register_forward_pre_hook(partial(lambda own, *_: called.append(own), module))
            stack.callback(handle.remove)
        model.eval()(example)
    owners = {id(module) for module in model.modules() if any(p.requires_grad for p in module.parameters(False))}
    first = next((number for number, module in enumerate(called) if id(module) in owners), len(called))
    early = {id(module) for module in called[:first]}
    return [
        module
        for module in model.modules()
        if not any(parameter.requires_grad for parameter in module.parameters())
        and (id(module) in early or any(True for _ in module.parameters()))
    ]
