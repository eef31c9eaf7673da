"""The command line that repeats a run."""

from __future__ import annotations

import dataclasses
import shlex

from skipway.errors import printable
from skipway.recipe import Recipe

__all__ = ["train_command"]


def train_command(recipe: Recipe) -> str:
    """Return the command line of a recipe: `skipway train` with every option that is not the default.

    >>> train_command(Recipe(depth=8, flip=False, scheme="skipinit(0.1)"))
    "skipway train --no-flip --depth 8 --scheme 'skipinit(0.1)'"
    """
    words = ["skipway", "train"]
    values = recipe.to_json()
    if values["data"] is not None:
        words.append(printable(values["data"]))
    for field in dataclasses.fields(Recipe):
        value = values[field.name]
        if field.name == "data" or value == field.default:
            continue
        option = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return shlex.join(words)
