"""Resume a run: which recipe changes are allowed, and what a checkpoint restores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from skipway.checkpoint.files import write_json
from skipway.checkpoint.state import load_model_state, load_optimizer_state
from skipway.errors import CheckpointError, SkipwayError, counted, spell
from skipway.inference.code_file import network_file
from skipway.inference.reference_outputs import find_change, refuse_change
from skipway.recipe import LENGTHS, Recipe
from skipway.training.budget import Plan
from skipway.training.clock import limit_validation, reopen_plan
from skipway.training.initial_weights import resolve_paths
from skipway.training.records import finish_saving, read_tests, save_checkpoint
from skipway.training.residual_warmup import continue_warmup
from skipway.training.run import LENGTH_FIELDS, Progress, Run
from skipway.training.setup import give_hidden_layer, model_config

__all__ = ["change_plan", "load_newest_checkpoint", "resume_recipe", "resume_run"]

# fields that may change when a run resumes; all others decide the weights (whether the files of a data folder that was
# moved are the same is checked separately)
CHANGEABLE = frozenset(
    {
        *LENGTH_FIELDS,
        "data",
        "device",
        "workers",
        "cache",
        "sharding",
        "save_every",
        "health",
        "diverged",
        "memory",
        "tensorboard",
    }
)


def resume_recipe(config: dict[str, Any], source: Path, given: Recipe | None) -> Recipe:
    """Return the stored recipe with those changes of `given` that do not affect the result of the run.

    A field of `given` that is None or "auto", or a batch larger than the training split, does not count as a change.

    Args:
        config: content of `config.json`.
        source: path of that file, for error messages.
        given: the requested recipe; None for the stored one.

    Raises:
        SkipwayError: `given` changes a field that affects the result.
        CheckpointError: `config` has no valid recipe.
    """
    stored = Recipe.from_json(config["recipe"], str(source))
    if given is None:
        return stored
    given = resolve_paths(given)
    if given.batch_size is not None and given.batch_size > config.get("data", {}).get("train", given.batch_size):
        given = replace(given, batch_size=stored.batch_size)
    changes = {
        name: (old, new) for name, (old, new) in stored.changes(given).items() if new is not None and new != "auto"
    }
    number, decisive = next(
        (each for each in enumerate(LENGTHS) if getattr(stored, each[1]) is not None), (len(LENGTHS), "")
    )
    idle = [name for name in LENGTHS[number + 1 :] if name in changes]
    if idle and not any(name in changes for name in LENGTHS[: number + 1]):
        more = "a longer time continues it" if decisive == "time" else "more steps continue it"
        raise SkipwayError(
            f"{spell(idle[0], getattr(given, idle[0]))}: the length of this run follows from "
            f"{spell(decisive, getattr(stored, decisive))}; {more}"
        )
    free = CHANGEABLE | ({"model"} if is_moved(stored.model, given.model) else set())
    fixed = {name: change for name, change in changes.items() if name not in free}
    if fixed:
        text = ", ".join(f"{name} from {old} to {new}" for name, (old, new) in fixed.items())
        raise SkipwayError(f"a resumed run cannot change {text}; omit that, or start a new run with --config and --out")
    return replace(stored, **{name: getattr(given, name) for name in changes})


def is_moved(before: str | None, after: str | None) -> bool:
    """Whether both are made by files, so that one may be the other at another place: whether it computes the same is
    checked with the weights.
    """
    return all(name is not None and network_file(name) is not None for name in (before, after))


def resume_run(run: Run, stored: dict[str, Any]) -> None:
    """Load the newest valid checkpoint into the run, in place, after checking that the data are the same.

    Raises:
        CheckpointError: the outputs would be others, or no checkpoint can be used.
        DataError: files were added, removed or renamed.
    """
    run.task.check_unchanged(run, stored)
    length = load_newest_checkpoint(run)
    loaded = replace(run.progress)
    known = loaded.tested_after or [run.global_step]
    run.progress.tested_after = sorted({*loaded.tested_after, *read_tests(run.folder, known[-1])})
    change_plan(run, stored["recipe"] if length is None else length)
    run.earlier_seconds = run.progress.seconds
    if run.ranks.first:
        run.folder.keep_rows_until(run.progress.epoch, run.global_step)
    if run.progress != loaded:  # whoever goes back goes on with this plan, and knows of these tests
        save_checkpoint(run)
        finish_saving(run)
    if run.ranks.first:
        write_json(run.folder.config, {**stored, "recipe": run.recipe.to_json(), "model": model_config(run)})


def change_plan(run: Run, before: dict[str, Any]) -> None:
    """Plan the rest of a run anew where its length or patience is not what the loaded plan was made for, in place.

    A run that ends with the fitted classifier stays at its end.

    Raises:
        SkipwayError: the run has already been trained for longer; nothing is changed then.
    """
    progress, recipe = run.progress, run.recipe
    if progress.head_fitted and not recipe.freeze_plan.takes_steps:
        for name, value in run.length.items():
            if value != before.get(name):
                run.reporter.message(
                    "note",
                    f"{spell(name, value)} has no effect: with {spell('freeze', recipe.freeze)} the run ended when "
                    f"the classifier was fitted; a new run with {spell('freeze', 'first')} trains the whole network",
                )
        return
    if recipe.time is None and recipe.steps is not None:
        if recipe.steps != before.get("steps"):
            refuse_shorter(run, "steps", recipe.steps, run.global_step, counted(run.global_step, "step"))
            progress.plan_steps(recipe.steps, run.steps_per_epoch)
            progress.stopped_early = False
    elif recipe.time is None and recipe.epochs != before["epochs"]:
        epochs = run.global_step / run.steps_per_epoch
        refuse_shorter(run, "epochs", recipe.epochs, epochs, f"{epochs:.4g} epochs")
        progress.epochs, progress.stopped_early = recipe.epochs, False
        progress.plan = Plan(end=recipe.epochs * run.steps_per_epoch, length=run.steps_per_epoch)
    if recipe.time is not None and recipe.time != before["time"]:
        reopen_plan(run)
    if recipe.patience is not None and recipe.patience != before.get("patience"):
        progress.stopped_early = progress.epoch - progress.best_epoch >= recipe.patience


def refuse_shorter(run: Run, name: str, wanted: int, done: float, done_text: str) -> None:
    """Refuse to end a run before where it stands."""
    if wanted < done:
        raise SkipwayError(
            f"{spell(name, wanted)}: the run in {run.folder.path} has been trained for {done_text}; the rule is as "
            "many or more, or a new run with --config and --out"
        )


def load_newest_checkpoint(run: Run) -> dict[str, Any] | None:
    """Load the newest valid checkpoint: weights, optimizer, EMA, gradient scaler and progress, in place.

    Returns:
        `Run.length` when it was written; None for a checkpoint of an earlier version.
    """
    snapshot, damaged = run.checkpoints.newest()
    for sentence in damaged:
        run.reporter.message("damaged", sentence)
    state = snapshot.state
    progress = Progress.from_json(state["progress"])
    if progress.head is not None and progress.head != run.progress.head:  # a retry has it already
        give_hidden_layer(run, progress.head)
    run.progress = progress
    limit_validation(run, progress.validation_images)
    load_model_state(run.model, snapshot.tensors["model"])
    continue_warmup(run)
    refuse_change(
        find_change(run.model, model_config(run), state.get("reference")),
        str(run.folder.path),
        f"start a new run from {spell('start', str(run.folder.last))}",
    )
    load_optimizer_state(run.model, run.optimizer, snapshot.tensors["optimizer"])
    if run.ema is not None:
        if "ema" not in snapshot.tensors:
            raise CheckpointError("the checkpoint has no averaged weights, but the recipe sets ema")
        run.ema.load(dict(snapshot.tensors["ema"]))
    if state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    if state["world"] != run.ranks.world:
        was, now = state["world"], run.ranks.world
        run.reporter.message(
            "note",
            f"written by {counted(was, 'process', 'processes')}, resumed by {now}: equal up to rounding, "
            "not bit for bit",
        )
    return state.get("length")
