"""Options that the command line omits: from a run folder by `--config` and `--resume`, from a preset by `--preset`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from skipway.errors import SkipwayError

if TYPE_CHECKING:
    from cyclopts import App
    from cyclopts.argument import ArgumentCollection

__all__ = ["check_whole_numbers", "fill_from_preset", "fill_from_run"]


def fill_from_run(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Set every option that is not on the command line to its value in the run that is resumed or repeated."""
    given = {argument.name: argument.tokens[0] for argument in arguments if argument.tokens}
    config, out = given.get("--config"), given.get("--out")
    if "--resume" in given:
        if config is not None:
            raise SkipwayError("--resume and --config: a resumed run already has a recipe; give one of the two")
        if out is None:
            raise SkipwayError("--resume needs the folder of the run: skipway train --out FOLDER --resume")
        path = Path(out.value)
        if set(given) - {"--resume", "--out", "--quiet"} and not (path / "config.json").exists():
            return  # the first of several identical calls: it starts the run
    elif config is not None:
        path = Path(config.value)
    else:
        return
    from cyclopts.config import Dict

    from skipway.recipe import read_recipe

    file = path / "config.json" if path.is_dir() or "--resume" in given else path
    values = {name: value for name, value in read_recipe(file).to_json().items() if value is not None}
    Dict(values, source=str(file), use_commands_as_keys=False)(app, commands, arguments)


def fill_from_preset(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Set every option that is not on the command line to its value in the preset, except for a run that is resumed,
    which has a recipe.
    """
    given = {argument.name: argument.tokens[0] for argument in arguments if argument.tokens}
    if "--preset" not in given:
        return
    if "--config" in given:
        raise SkipwayError("--preset and --config: each supplies what the command omits; give one of the two")
    if "--resume" in given and (Path(given["--out"].value) / "config.json").exists():
        return
    from cyclopts.config import Dict

    from skipway.presets import PRESETS

    name = given["--preset"].value
    fields = [option.removeprefix("--").replace("-", "_") for option in given]
    values = PRESETS[name].beside(fields)
    Dict(values, source=f"preset {name}", use_commands_as_keys=False)(app, commands, arguments)


def check_whole_numbers(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse fractions for options that take whole numbers, which cyclopts would round.

    Raises:
        SkipwayError: there is one.
    """
    for argument in arguments:
        kinds = {argument.hint, *get_args(argument.hint)}
        if int not in kinds or float in kinds or str in kinds:
            continue
        for token in argument.tokens:
            if token.value and re.fullmatch(r"[+-]?\d*\.\d*(e[+-]?\d+)?|[+-]?\d+e-\d+", token.value.lower()):
                raise SkipwayError(f"{argument.name} {token.value}: the rule is a whole number")
