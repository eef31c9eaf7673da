"""Options that the command line omits: from a run folder by `--config` and `--resume`, from a preset by `--preset`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from skipway.errors import SkipwayError, printable

if TYPE_CHECKING:
    from cyclopts import App, Token
    from cyclopts.argument import ArgumentCollection

    from skipway.recipe import Recipe

__all__ = ["check_whole_numbers", "dropped_options", "fill_from_preset", "fill_from_run"]

FOLLOWS = {
    "warmup": ("schedule",),
    "lr": ("optimizer", "batch_size", "start"),
    "weight_decay": ("optimizer",),
    **dict.fromkeys(("layer_decay", "freeze", "grey16", "fit"), ("start",)),
    **dict.fromkeys(("crop", "grow_from"), ("size",)),
    "crop_share": ("size", "crop", "fit", "start", "model"),
    **dict.fromkeys(("weights_names", "weights_entry"), ("start",)),
    "resample": ("start", "model"),
    **dict.fromkeys(("mean", "std"), ("data", "channels", "fit", "grey16", "start", "model")),
    **dict.fromkeys(("channels", "flip"), ("data",)),
    "epochs": ("steps", "time"),
    "steps": ("epochs", "time"),
    "time": ("epochs", "steps"),
}
"""For options of a run the others that they belong to, as in `Preset`: a run stores what it chose by them, too."""

TEXT_FOLLOWS = {**FOLLOWS, "lr": (*FOLLOWS["lr"], "model", "depth", "width"), "tokenizer": ("start",)}
"""The same for a run on text, whose rate depends on the width of the network."""


def fill_from_run(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Set every option that is not on the command line to its value in the run that is resumed or repeated, except for
    those that were chosen for an option which is on it with another value.
    """
    given = {argument.name: argument.tokens[0] for argument in arguments if argument.tokens}
    config = given.get("--config")
    if "--resume" in given:
        if config is not None:
            raise SkipwayError("--resume and --config: a resumed run already has a recipe; give one of the two")
        path = resumed_folder(given)
        if set(given) - {"--resume", "--out", "--quiet"} and not (path / "config.json").exists():
            return  # the first of several identical calls: it starts the run
    elif config is not None:
        path = Path(config.value)
    else:
        return
    from cyclopts.config import Dict

    from skipway.presets import values_beside
    from skipway.recipe import LENGTHS, read_recipe

    file = path / "config.json" if "--resume" in given else recipe_file(path)
    values = {name: value for name, value in read_recipe(file).to_json().items() if value is not None}
    idle = [name for name in LENGTHS if name in values][1:]
    values = {name: value for name, value in values.items() if name not in idle}
    options = dict(zip(fields_of(given), given.values(), strict=True))
    changed = [name for name, token in options.items() if not is_same(token.value, values.get(name))]
    values = values_beside(values, changed, TEXT_FOLLOWS if "tokenizer" in values else FOLLOWS)
    values = {name: value for name, value in values.items() if name not in options}
    Dict(values, source=str(file), use_commands_as_keys=False)(app, commands, arguments)


def is_same(text: str, value: Any) -> bool:
    """Whether a value of the command line is that of a recipe: the same text, number or path.

    >>> is_same("0.10", 0.1), is_same("photos/", str(Path("photos").resolve())), is_same("adamw", "sgd")
    (True, True, False)
    """
    if isinstance(value, str):
        return Path(text).resolve() == Path(value).resolve()
    with suppress(ValueError, TypeError):
        return float(text) == value
    return False


def recipe_file(config: Path) -> Path:
    """The file with the recipe that `--config` names: a run folder, or the file itself."""
    return config / "config.json" if config.is_dir() else config


def dropped_options(config: Path, recipe: Recipe) -> str | None:
    """A sentence about the options of a run that its repetition chooses anew, see `FOLLOWS`; None where there are none.

    Args:
        config: what `--config` names.
        recipe: of the repetition, as `fill_from_run` made it.
    """
    from skipway.recipe import LENGTHS, Recipe, read_recipe
    from skipway.report.run.command import train_command

    stored = read_recipe(recipe_file(config))
    plain = {field.name: field.default for field in fields(Recipe)}
    left: dict[str, Any] = {
        name: old
        for name, (old, new) in stored.changes(recipe).items()
        if name in TEXT_FOLLOWS and name not in LENGTHS and old is not None and new == plain[name]
    }
    kind = "image" if stored.tokenizer is None else "text"
    options = train_command(Recipe(**left), kind, exact=True).removeprefix("skipway train").strip()
    if not options:
        return None
    return (
        f"not taken from {printable(config)}, since they were chosen beside other options than these: {options}; "
        "append what is to stay"
    )


def fill_from_preset(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Set every option that is not on the command line to its value in the preset, except for a run that is resumed,
    which has a recipe.
    """
    given = {argument.name: argument.tokens[0] for argument in arguments if argument.tokens}
    if "--preset" not in given:
        return
    if "--config" in given:
        raise SkipwayError("--preset and --config: each supplies what the command omits; give one of the two")
    if "--resume" in given and (resumed_folder(given) / "config.json").exists():
        return
    from cyclopts.config import Dict

    from skipway.presets import PRESETS

    name = given["--preset"].value
    values = PRESETS[name].beside(fields_of(given))
    Dict(values, source=f"preset {name}", use_commands_as_keys=False)(app, commands, arguments)


def resumed_folder(given: Mapping[str, Token]) -> Path:
    """The folder of the run that is resumed, of the options on the command line.

    Raises:
        SkipwayError: none is given.
    """
    if "--out" not in given:
        raise SkipwayError("--resume needs the folder of the run: skipway train --out FOLDER --resume")
    return Path(given["--out"].value)


def fields_of(options: Iterable[str]) -> list[str]:
    """The fields of `Recipe` that some options of the command line give."""
    return [option.removeprefix("--").replace("-", "_") for option in options]


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
