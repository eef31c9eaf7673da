"""The explicit choices of loading: what may differ between a file and a model when the caller says so, and no more.

Each choice is a function from what does not fit to what it would change; nothing else of a file is ever adapted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from skipway.errors import CheckpointError, spell, suggest
from skipway.nn import Classifier, Residual
from skipway.tracing.chain import chain
from skipway.weights.keymap import KeyMap
from skipway.weights.prefixes import own_name, own_state

__all__ = ["CHOICES", "Change", "Misfit", "classifier_parameters", "read_choices"]


@dataclass(frozen=True)
class Misfit:
    """The mismatches between a file and a model.

    Args:
        model: the network.
        keymap: the names that the file uses.
        fitting: our keys that fit.
        misshapen: our key → the file's tensor, of another shape.
        missing: our keys that the file lacks.
        unexpected: their keys that match none of ours.
        taken: their keys that match one of ours.
        classifiers: paths of classifiers in a network that is not ours.
    """

    model: nn.Module
    keymap: KeyMap
    fitting: frozenset[str]
    misshapen: Mapping[str, Tensor]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    taken: frozenset[str]
    classifiers: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Change:
    """The changes that an adaptation makes.

    Args:
        fresh: our keys that keep the value they have.
        resampled: our key → its tensor in the model's shape.
        left_out: their keys that are not loaded.
    """

    fresh: list[str] = field(default_factory=list)
    resampled: dict[str, Tensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.fresh or self.resampled or self.left_out)


def classifier_parameters(model: nn.Module, others: Container[str]) -> Iterator[tuple[Any, list[str]]]:
    """Each classifier with the names of its parameters: those of ours, and others by their paths."""
    found = {own_name(name): module for name, module in model.named_modules()}  # of a wrapper what is inside
    for name, module in found.items():
        if isinstance(module, Classifier) or name in others:
            yield module, [own_name(f"{name}.{leaf}".removeprefix(".")) for leaf, _ in module.named_parameters()]


def adapt_classes(misfit: Misfit) -> Change:
    """The classifier keeps its fresh start where the file's has another number of classes, or the file has none."""
    change = Change()
    for own, keys in classifier_parameters(misfit.model, misfit.classifiers):
        found = misfit.misshapen.get(keys[0])
        other = found is not None and found.flatten(1).shape[1:] == own.weight.flatten(1).shape[1:]
        if other or all(key in misfit.missing for key in keys):
            change.fresh.extend(key for key in keys if key in misfit.misshapen or key in misfit.missing)
    return change


def adapt_size(misfit: Misfit) -> Change:
    """Tables of positions are resampled, by the modules that own them: `resampled(name, tensor)`, None if it cannot."""
    change = Change()
    for ours, found in misfit.misshapen.items():
        path, _, leaf = ours.rpartition(".")
        owner = misfit.model.get_submodule(path)
        resample = getattr(owner, "resampled", None)
        table = resample(leaf, found) if callable(resample) else None
        if table is not None and table.shape == getattr(owner, leaf).shape:
            change.resampled[ours] = table
    return change


def adapt_channels(misfit: Misfit) -> Change:
    """The first map takes images of C channels instead of the file's I: summed for C = 1, else W[:, c mod I] · I/C.

    A grey image copied to I channels gives the same output through the old map as the grey image through the sum, and
    the scale I/C keeps the size of the output (timm, `adapt_input_conv`).
    """
    change = Change()
    own = own_state(misfit.model)
    first = next((key for key, tensor in own.items() if tensor.ndim == 4), None)
    if first not in misfit.misshapen or misfit.misshapen[first].ndim != 4:
        return change
    found, wanted = misfit.misshapen[first], own[first]
    old, new = found.shape[1], wanted.shape[1]
    if old != new and found.shape[0] == wanted.shape[0] and found.shape[2:] == wanted.shape[2:]:
        channels = [channel % old for channel in range(new)]
        change.resampled[first] = found.sum(1, keepdim=True) if new == 1 else found[:, channels] * (old / new)
    return change


def adapt_depth(misfit: Misfit) -> Change:
    """Connections that the file lacks keep their start, those that the model lacks are left out; some have to fit."""
    change = Change()
    if not any(isinstance(module, Residual) for module in misfit.model.modules()):
        return change
    names = {own_name(connection.name) for connection in chain(misfit.model)}
    parameters = [own_name(name) for name, _ in misfit.model.named_parameters()]
    inside = {name: [key for key in parameters if key.startswith(f"{name}.")] for name in names}
    if not any(key in misfit.fitting for keys in inside.values() for key in keys):
        return change
    for name, keys in inside.items():
        if keys and all(key in misfit.missing for key in keys):
            change.fresh.extend(key for key in misfit.missing if key.startswith(f"{name}."))
    numberless = {numberless_name(name) for name in names}
    for theirs in misfit.unexpected:
        candidates = (ours for row in misfit.keymap.rules if (ours := row.to_ours(theirs)) is not None)
        if any(belongs_to_missing_connection(ours, names, numberless) for ours in candidates):
            change.left_out.append(theirs)
    return change


def adapt_unexpected(misfit: Misfit) -> Change:
    """Names in modules that the model lacks altogether, a loss or metrics, are left out where all of the model fits.

    What stands beside parameters of the model is a part of another network, and stays unexpected.
    """
    if misfit.missing or misfit.misshapen:
        return Change()
    modules = {key.partition(".")[0] for key in misfit.taken}
    return Change(left_out=[key for key in misfit.unexpected if key.partition(".")[0] not in modules])


def belongs_to_missing_connection(ours: str, names: set[str], numberless: set[str]) -> bool:
    """True if a key belongs to a connection that the model lacks while it has others of the same kind."""
    parts = ours.split(".")
    owners = (".".join(parts[:length]) for length in range(1, len(parts)))
    return any(owner not in names and numberless_name(owner) in numberless for owner in owners)


def numberless_name(name: str) -> str:
    """A path without its numbers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


CHOICES: dict[str, Callable[[Misfit], Change]] = {
    "classes": adapt_classes,
    "size": adapt_size,
    "channels": adapt_channels,
    "depth": adapt_depth,
    "unexpected": adapt_unexpected,
}


def read_choices(adapt: Iterable[str]) -> frozenset[str]:
    """The choices that a caller made.

    Raises:
        CheckpointError: an unknown one.
    """
    made = frozenset([adapt] if isinstance(adapt, str) else adapt)
    for choice in sorted(made - CHOICES.keys()):
        raise CheckpointError(f"{spell('adapt', choice)}: {suggest('choice', choice, CHOICES)}")
    return made
