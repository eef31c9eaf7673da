"""`skipway train`."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from skipway.errors import SkipwayError
from skipway.recipe import Recipe

if TYPE_CHECKING:
    from skipway.training.run import Outcome

__all__ = ["train"]

BEGAN = time.monotonic()
Flag = Annotated[bool, Parameter(negative=())]


def train(
    recipe: Annotated[Recipe, Parameter(name="*")] = Recipe(),  # noqa: B008 - frozen
    *,
    out: Path | None = None,
    resume: Flag = False,
    overwrite: Flag = False,
    config: Path | None = None,
    quiet: Flag = False,
) -> int:
    """Train a network on a folder of images: train/<class>/* with test/<class>/*, or <class>/*.

    Without a folder it trains on scikit-learn's handwritten digits: no network, no download.
    Ctrl-C saves the state; --resume continues from it.

    Args:
        recipe: What to train, and how.
        out: Run folder. [runs/<data>-<number>]
        resume: Continue the run in --out.
        overwrite: Replace the run in --out.
        config: Run whose options hold where none is given.
        quiet: Print one line: accuracy and run folder.
    """
    if resume and overwrite:
        raise SkipwayError("--resume and --overwrite: a run is continued or replaced; give one of the two")
    folder = fresh_folder(recipe.data) if out is None else out
    # Threads that wait should sleep and not spin: on two cores of which another program used one, a step of the small
    # default net took 5.4 s with libgomp's spinning and 0.16 s without. Has to be set before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from skipway.cli.interrupts import Stopping
    from skipway.cli.progress import choose_screen
    from skipway.training.loop import train as train_network

    # of torchrun's processes the first speaks for all
    quiet_here = quiet or os.environ.get("RANK", "0") != "0"
    with Stopping() as stopping, choose_screen(quiet_here) as screen:
        outcome = train_network(
            recipe, folder, resume=resume, overwrite=overwrite, screen=screen, stop=stopping.requested
        )
    show = screen.say if not quiet_here else lambda label, text: None
    if not outcome.finished or outcome.evaluation is None:
        for line in stopped_lines(outcome):
            show(*line)
        return stopping.exit_status
    for line in result_lines(outcome, time.monotonic() - BEGAN):
        show(*line)
    if quiet and os.environ.get("RANK", "0") == "0":
        sys.stdout.write(f"{outcome.evaluation.accuracy:.4f} {outcome.folder.path}\n")
    # told to stop while the report was written: the run is complete, and the same command writes the report
    return stopping.exit_status


def fresh_folder(data: Path | None) -> Path:
    """`runs/<data>-<number>` with the first number that is free."""
    name = "digits" if data is None else data.resolve().name
    number = 1
    while Path("runs", f"{name}-{number}").exists():
        number += 1
    return Path("runs", f"{name}-{number}")


def result_lines(outcome: Outcome, seconds: float) -> list[tuple[str, str]]:
    """The result, where it is, and what to type next."""
    from skipway.report.summary import accuracy_text, duration, mistakes_text

    evaluation, folder, out = outcome.evaluation, outcome.folder, shlex.quote(str(outcome.folder.path))
    assert evaluation is not None
    return [
        ("", ""),
        ("accuracy", accuracy_text(evaluation, outcome.best_accuracy, outcome.best_epoch)),
        ("mistakes", mistakes_text(evaluation, outcome.classes)),
        ("time", f"{duration(outcome.seconds)} of training; this command took {duration(seconds)}"),
        ("weights", f"{folder.last} (last epoch), {folder.best} (epoch {outcome.best_epoch})"),
        ("report", f"{folder.report}; curves in {folder.metrics}, the recipe in {folder.config}"),
        ("use", f"skipway predict {out} photo.jpg"),
        ("longer", f"skipway train --out {out} --resume --epochs {2 * outcome.recipe.epochs}"),
        ("again", f"skipway train --config {out} --seed {outcome.recipe.seed + 1}"),
    ]


def stopped_lines(outcome: Outcome) -> list[tuple[str, str]]:
    """Where the run stands, and how to continue."""
    out = shlex.quote(str(outcome.folder.path))
    return [
        ("", ""),
        ("stopped", f"after epoch {outcome.epoch}, step {outcome.step}; state in {outcome.folder.checkpoints}"),
        ("continue", f"skipway train --out {out} --resume"),
    ]
