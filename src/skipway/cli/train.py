"""`skipway train`."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from skipway.cli import BEGAN
from skipway.cli.run_options import dropped_options
from skipway.errors import SkipwayError, duration
from skipway.presets import PRESETS
from skipway.recipe import Recipe

if TYPE_CHECKING:
    from skipway.training.cross_validation import CrossValidation
    from skipway.training.run import Outcome

__all__ = ["train"]

Flag = Annotated[bool, Parameter(negative=())]


def train(
    recipe: Annotated[Recipe, Parameter(name="*")] = Recipe(),  # noqa: B008 - frozen
    *,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    folds: int | None = None,
    resume: Flag = False,
    overwrite: Flag = False,
    config: Path | None = None,
    preset: str | None = None,
    quiet: Flag = False,
) -> int:
    """Train a network on images, <class>/* or train/<class>/* with val/ and test/, or on text, a file or a folder.

    The training split is learned from, the validation split chooses the weights, and the test
    split measures them, once, at the end. What a source lacks is split off its training part.
    Without data it trains on the handwritten digits of scikit-learn, and a gpt on the source of
    Python's standard library, without a download.
    Ctrl-C saves the state; --resume continues from it.

    Args:
        recipe: The recipe.
        out: Run folder. [runs/<data>-<number>]
        folds: Cross-validate: one run per fold.
        resume: Resume the run in --out.
        overwrite: Replace the run in --out.
        config: Run folder that supplies omitted options.
        preset: Values for omitted options: fast, for small images.
        quiet: Print only accuracy and run folder.
    """
    if resume and overwrite:
        raise SkipwayError("--resume and --overwrite: a run is either resumed or replaced; give one of the two")
    # Waiting threads should sleep, not spin: on two cores, one of them busy, a step of the small default network took
    # 5.4 s with libgomp's spinning and 0.16 s without. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from skipway.cli.interrupts import StopSignal
    from skipway.cli.progress import choose_reporter

    # under torchrun only rank 0 reports
    quiet_here = quiet or os.environ.get("RANK", "0") != "0"
    with StopSignal() as stopping, choose_reporter(quiet_here) as reporter:
        reporter.activity("starting")
        # torch is loaded here, which may take long
        from skipway.training.cross_validation import cross_validate
        from skipway.training.loop import train as train_network
        from skipway.training.task_choice import choose_task

        if preset is not None:
            PRESETS[preset].check(preset, recipe.data, recipe.initial_weights)
        if config is not None and (dropped := dropped_options(config, recipe)) is not None:
            reporter.message("note", dropped)
        folder = unused_folder(recipe.data, choose_task(recipe).default_data) if out is None else out

        if folds is not None or (resume and is_cross_validation(folder)):
            found = cross_validate(
                recipe,
                folder,
                folds,
                resume=resume,
                overwrite=overwrite,
                reporter=reporter,
                stop=stopping.requested,
                began=BEGAN[0],
            )
            for line in fold_lines(found):
                reporter.message(*line)
            if found.finished and quiet and os.environ.get("RANK", "0") == "0":
                sys.stdout.write(f"{found.accuracy:.4f} {found.folder}\n")
            return stopping.exit_status
        outcome = train_network(
            recipe,
            folder,
            resume=resume,
            overwrite=overwrite,
            reporter=reporter,
            stop=stopping.requested,
            began=BEGAN[0],
        )
    show = reporter.message if not quiet_here else lambda label, text: None
    if not outcome.finished:
        for line in stopped_lines(outcome):
            show(*line)
        return stopping.exit_status
    for line in result_lines(outcome, time.monotonic() - BEGAN[0]):
        show(*line)
    if quiet and os.environ.get("RANK", "0") == "0":
        sys.stdout.write(f"{outcome.task.headline(outcome.evaluation)} {outcome.folder.path}\n")
    # nonzero if interrupted while writing the report: the run is complete, and the same command writes the report
    return stopping.exit_status


def unused_folder(data: Path | None, default: str) -> Path:
    """Return `runs/<data>-<number>` with the lowest unused number; without data it is named by what is learned then."""
    name = default if data is None else data.resolve().name
    number = 1
    while Path("runs", f"{name}-{number}").exists():
        number += 1
    return Path("runs", f"{name}-{number}")


def is_cross_validation(folder: Path) -> bool:
    """Whether a folder holds a cross-validation that `skipway train --folds` began."""
    from skipway.checkpoint.files import read_json

    config = folder / "config.json"
    return config.exists() and "folds" in read_json(config)


def fold_lines(found: CrossValidation) -> list[tuple[str, str]]:
    """The results of a cross-validation together, or how to continue it."""
    from skipway.inference.metrics import percent

    out = shlex.quote(str(found.folder))
    if not found.finished:
        done = f"after {len(found.results)} of {found.folds} folds"
        return [("", ""), ("stopped", done), ("continue", f"skipway train --out {out} --resume")]
    low, high = found.interval
    pooled = f"{percent(found.accuracy)} of {found.images:,} images, each tested in one fold"
    least, most = (pick(result.accuracy for result in found.results) for pick in (min, max))
    return [
        ("", ""),
        ("accuracy", f"{pooled} (95 % interval {100 * low:.1f} to {percent(high)})"),
        (
            "folds",
            f"mean {percent(found.mean)}, standard deviation {percent(found.deviation)}, "
            f"from {percent(least)} to {percent(most)}",
        ),
        (
            "summary",
            f"{found.folder / 'summary.json'}; the runs are in fold-1 to fold-{found.folds} beside it",
        ),
    ]


def result_lines(outcome: Outcome, seconds: float) -> list[tuple[str, str]]:
    """The result, where it is stored, and the next commands."""
    from skipway.report.summary import epoch_text

    folder, out = outcome.folder, shlex.quote(str(outcome.folder.path))
    fitted = outcome.recipe.freeze_plan.fits_classifier
    best, last = (epoch_text(epoch, fitted=fitted) for epoch in (outcome.best_epoch, outcome.epoch))
    return [
        ("", ""),
        *outcome.task.result_lines(outcome),
        ("time", f"{duration(outcome.seconds)} of training; {duration(seconds)} for this command"),
        ("weights", f"{folder.best} ({best}, tested), {folder.last} ({last})"),
        ("report", f"{folder.report}; curves in {folder.metrics}, the recipe in {folder.config}"),
        ("use", outcome.task.use_line(out)),
        continuation(outcome, out),
        ("again", f"skipway train --config {out} --seed {outcome.recipe.seed + 1}"),
    ]


def continuation(outcome: Outcome, out: str) -> tuple[str, str]:
    """The command that goes on from here."""
    if not outcome.recipe.freeze_plan.takes_steps:
        freeze = shlex.quote(outcome.recipe.freeze.replace("all", "first", 1))
        return "tune", f"skipway train --config {out} --freeze {freeze}, to train everything"
    if not outcome.epoch:
        return "longer", f"skipway train --config {out} --time 1h, say; the features are there"
    if outcome.recipe.budget is not None:
        return "longer", f"skipway train --out {out} --resume --time {math.ceil(2 * outcome.recipe.budget)}s"
    if outcome.recipe.steps is not None:
        return "longer", f"skipway train --out {out} --resume --steps {2 * outcome.recipe.steps}"
    return "longer", f"skipway train --out {out} --resume --epochs {2 * outcome.recipe.epochs}"


def stopped_lines(outcome: Outcome) -> list[tuple[str, str]]:
    """The progress of an interrupted run, and how to resume it."""
    out = shlex.quote(str(outcome.folder.path))
    return [
        ("", ""),
        ("stopped", f"after epoch {outcome.epoch}, step {outcome.step}; state in {outcome.folder.checkpoints}"),
        ("continue", f"skipway train --out {out} --resume"),
    ]
