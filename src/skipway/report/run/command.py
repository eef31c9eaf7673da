"""The command line that repeats a run."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from skipway.errors import printable
from skipway.recipe import LENGTHS, Kind, Recipe

__all__ = ["again_command", "train_command"]


def train_command(recipe: Recipe, kind: Kind | None = None, *, exact: bool = False) -> str:
    """Return the command line of a recipe for readers: `skipway train` with every option that has an effect and is not
    the default.

    A path below the current folder is relative to it, and channel statistics have four digits: what repeats a run
    exactly is `again_command`.

    Args:
        recipe: of a run.
        kind: of its data; options for the other kind have no effect. None: options for both.
        exact: channel statistics with all digits.

    >>> train_command(Recipe(depth=8, flip=False, scheme="skipinit(0.1)"))
    "skipway train --no-flip --depth 8 --scheme 'skipinit(0.1)'"
    >>> train_command(Recipe(mean="0.4913996898,0.4821584196"))
    'skipway train --mean 0.4914,0.4822'
    >>> train_command(Recipe(mean="0.4913996898"), exact=True)
    'skipway train --mean 0.4913996898'
    >>> train_command(Recipe(time="1h", epochs=30))
    'skipway train --time 1h'
    >>> train_command(Recipe(fit="crop", context=64), "text")
    'skipway train --context 64'
    """
    words = ["skipway", "train"]
    values = recipe.to_json()
    idle = [*[name for name in LENGTHS if values[name] is not None][1:], *recipe.idle_fields]
    if values["data"] is not None:
        words.append(shown_path(values["data"]))
    for field in dataclasses.fields(Recipe):
        value = values[field.name]
        other = kind is not None and field.metadata.get("only") not in (None, kind)
        if field.name in ("data", *idle) or value == field.default or other:
            continue
        if field.name in ("mean", "std") and not exact:
            value = ",".join(f"{number:.4g}" for number in recipe.numbers(field.name) or ())
        option = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return shlex.join(words)


def again_command(folder: Path) -> str:
    """Return the command line that repeats the run of a folder with every value as it is stored.

    >>> again_command(Path("runs/my photos"))
    "skipway train --config 'runs/my photos'"
    """
    return shlex.join(["skipway", "train", "--config", shown_path(str(folder))])


def shown_path(text: str) -> str:
    """A path below the current folder relative to it; any other, and a name of data, as it is."""
    here = Path.cwd()
    return printable(Path(text).relative_to(here) if Path(text).is_relative_to(here) else text)
