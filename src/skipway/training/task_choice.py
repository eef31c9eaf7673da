"""Which task a recipe asks for: by its network, and by the content of its data."""

from __future__ import annotations

from dataclasses import fields

from skipway.data.source_kind import source_kind
from skipway.errors import DataError, SkipwayError, printable, spell
from skipway.inference.decoder_folder import find_decoder_folder
from skipway.inference.network import is_ours
from skipway.models import find_config
from skipway.recipe import Kind, Recipe
from skipway.training.image_task import ImageClassification
from skipway.training.task import Task
from skipway.training.text_task import LanguageModelling

__all__ = ["choose_task"]

TASKS: dict[str, Task] = {task.kind: task for task in (ImageClassification(), LanguageModelling())}
# networks that messages offer, and what data are called in them
OFFERED = {"image": "resnet20", "text": "gpt-micro"}
WORDS = {"image": "images", "text": "text"}


def choose_task(recipe: Recipe) -> Task:
    """The task of a recipe: that of its network, where it is one of ours, else that of its data; images without both.

    Raises:
        DataError: the data are of another kind than the network, or of both kinds and no network is named.
        SkipwayError: a field of the recipe is meant for another kind of data.
    """
    wanted = network_kind(recipe)
    found = None if recipe.data is None else source_kind(recipe.data)
    name = "the data" if recipe.data is None else printable(recipe.data.name)
    if found == "mixed" and wanted is None:
        ways = " and ".join(f"{spell('model', OFFERED[kind])} trains on its {WORDS[kind]}" for kind in OFFERED)
        raise DataError(f"{name} holds images, or other files, and more texts: {ways}")
    if found not in (None, "mixed", wanted) and wanted is not None:
        raise DataError(
            f"{name} holds {WORDS[str(found)]}, and {spell('model', recipe.model)} takes {WORDS[wanted]}; "
            f"{spell('model', OFFERED[str(found)])} trains on it"
        )
    kind = wanted or found or next((each for each in TASKS if asks_for(recipe, each)), "image")
    recipe.check_kind(TASKS[kind].kind, name if recipe.data is not None else TASKS[kind].default_data)
    return TASKS[kind]


def network_kind(recipe: Recipe) -> Kind | None:
    """What the network of a recipe takes, where it is named and one of ours, or a decoder to start from."""
    if recipe.model is None and recipe.initial_weights is not None:
        return None if find_decoder_folder(recipe.initial_weights) is None else "text"
    if recipe.model is None or not is_ours(recipe.model):
        return None
    try:
        _, config = find_config(recipe.model, recipe.depth)
    except SkipwayError:  # said when it is built
        return None
    return "text" if hasattr(config, "vocab") else "image"


def asks_for(recipe: Recipe, kind: str) -> bool:
    """Whether a field is chosen that only has a meaning for this kind of data."""
    return any(
        entry.metadata.get("only") == kind and getattr(recipe, entry.name) != entry.default for entry in fields(Recipe)
    )
