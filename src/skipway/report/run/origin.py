"""Where a result comes from: the command and the recipe that repeat it, and the machine that it was made on."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from skipway.errors import printable
from skipway.recipe import Recipe

__all__ = ["command_of", "environment_section", "recipe_section"]


def command_of(recipe: Recipe) -> str:
    """The command line that means this recipe.

    >>> command_of(Recipe(depth=8, flip=False, scheme="skipinit(0.1)"))
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


def recipe_section(recipe: Recipe) -> Iterator[str]:
    """The command, and all fields as JSON."""
    yield f"<pre>{escape(command_of(recipe))}</pre>"
    fields = escape(json.dumps(recipe.to_json(), indent=2))
    yield f"<details><summary>Every field of the recipe, as config.json holds it</summary><pre>{fields}</pre></details>"


def environment_section(environment: Mapping[str, Any]) -> str:
    """What the result may depend on besides the recipe."""
    rows = [
        f"<tr><td>{escape(printable(str(name)))}</td><td>{escape(printable(str(value)))}</td></tr>"
        for name, value in environment.items()
        if value is not None
    ]
    return f'<div class="scroll"><table class="plain"><tbody>{"".join(rows)}</tbody></table></div>'
