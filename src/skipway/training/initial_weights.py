"""The weights that a training starts from: where they are, what inputs they expect, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from skipway.data.data_config import WeightsDescription, find_data_config
from skipway.errors import CheckpointError, SkipwayError, counted, printable, spell, spelling
from skipway.inference.code_file import network_file, with_file
from skipway.inference.network import is_ours
from skipway.inference.published_weights import find_published_weights, is_pretrained
from skipway.recipe import Recipe
from skipway.surgery.classifier import find_classifiers
from skipway.weights import load_state, match, read_source
from skipway.weights.adapt import CHOICES
from skipway.weights.class_rows import arrange_classes
from skipway.weights.stored_config import refuse_other_config
from skipway.zoo import source_of

__all__ = ["adopt_data_config", "load_initial_weights", "resolve_paths"]

# names of parameters that a message lists
MAX_KEYS = 8


def resolve_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute paths."""
    resolved: dict[str, Any] = {}
    if recipe.data is not None and recipe.data.exists():
        resolved["data"] = recipe.data.resolve()
    source = recipe.initial_weights
    if source is not None and not is_pretrained(source) and Path(source).exists():
        resolved["start"] = str(Path(source).resolve())
    file = None if recipe.model is None else network_file(recipe.model)
    if recipe.tokenizer is not None and Path(recipe.tokenizer).is_file():
        resolved["tokenizer"] = str(Path(recipe.tokenizer).resolve())
    if file is not None:
        resolved["model"] = with_file(str(recipe.model), file.resolve())
    return replace(recipe, **resolved)


def adopt_data_config(recipe: Recipe, remark: Callable[[str], None]) -> Recipe:
    """Return the recipe with the inputs that the model and its initial weights expect, where they are not chosen.

    Networks of other libraries take colour images; what weights expect is said.
    """
    if recipe.model is not None and not is_ours(recipe.model):
        for name in ("depth", "width"):
            if getattr(recipe, name) is not None:
                raise SkipwayError(
                    f"{spell(name, getattr(recipe, name))}: a choice for Skipway's own networks, and {recipe.model} is "
                    "none; name another model"
                )
        recipe = replace(recipe, channels=recipe.channels or 3)
    if recipe.initial_weights is None:
        return recipe
    names, model = recipe.weights_names, recipe.model
    if model is not None and not is_ours(model):
        source, model = source_of(model)
        names = source.library or names
    if is_pretrained(recipe.start):
        config = find_published_weights(str(recipe.model)).config
    else:
        config = find_data_config(str(recipe.start), names, model)
    if config is None and recipe.mean is not None and recipe.std is not None:
        return recipe
    if config is None:
        remark(
            "nothing beside the weights states the mean and deviation that they expect, so those of the images are "
            f"taken; {spell('mean', '0.5')} and {spell('std', '0.5')} for example set others"
        )
        return recipe
    values: dict[str, Any] = {
        "mean": Recipe.text_of(config.mean),
        "std": Recipe.text_of(config.std),
        **{name: getattr(config, name) for name in ("crop_share", "resample", "grey16", "fit", "size")},
    }
    taken = {name: value for name, value in values.items() if getattr(recipe, name) is None and value is not None}
    if taken:
        remark(f"as stated by {config.origin}: {', '.join(spell(name, value) for name, value in taken.items())}")
    return replace(recipe, **taken)


def load_initial_weights(
    model: nn.Module, recipe: Recipe, classes: Sequence[str], example: Tensor, remark: Callable[[str], None]
) -> str:
    """Load the weights to start from; in words, what of them was used. Every difference that the recipe does not allow
    is an error.
    """
    adapt = tuple(choice.strip() for choice in recipe.weights_adapt.split(",") if choice.strip())
    names, classifiers = recipe.weights_names, ()
    described = None if is_pretrained(recipe.start) else WeightsDescription(str(recipe.start))
    if not is_ours(str(recipe.model)):  # its names are its library's
        names = "skipway"
    if not is_ours(str(recipe.model)) or (described is not None and described.hidden_layer is not None):
        classifiers = find_classifiers(model, example)
    with spelling(entry="weights_entry", names="weights_names", adapt="weights_adapt"):
        origin = printable(str(recipe.start))
        if described is None:
            published = find_published_weights(str(recipe.model))
            state: Mapping[str, Tensor] = published.state
            origin, known = published.origin, None
        else:
            refuse_other_config(model, str(recipe.start), names)
            state = read_source(str(recipe.start), recipe.weights_entry, remark)
            known = described.classes
        state, remarks = arrange_classes(model, state, names, known, classes, adapt, classifiers)
        for sentence in remarks:
            remark(sentence)
        try:
            report = load_state(model, state, names=names, adapt=adapt, classifiers=classifiers, remark=remark)
        except CheckpointError as error:
            trial = match(model, state, names=names, adapt=CHOICES)
            if trial.fits and "channels" in trial.used and recipe.channels == 1:
                raise CheckpointError(f"{error}\nOr take the images in colour: {spell('channels', 3)}.") from error
            raise
    parts = [
        f"{len(report.tensors)} of {counted(len(model.state_dict()), 'tensor')} from {origin}",
        *(f"{title}: {list_keys(keys)}" for title, keys in report.differences().items()),
    ]
    return "; ".join(parts)


def list_keys(keys: Sequence[str]) -> str:
    """Names of parameters, cut."""
    return ", ".join(map(printable, keys[:MAX_KEYS])) + (
        f" and {len(keys) - MAX_KEYS} more" if len(keys) > MAX_KEYS else ""
    )
