"""The diagnosis of a run's own recipe: its network at the start, its data, its optimizer and schedule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from skipway.diagnosis import Diagnosis
from skipway.diagnosis.batches import Batches
from skipway.diagnosis.diagnosis import PASSES, examine
from skipway.diagnosis.progress import PassCounter
from skipway.diagnosis.settings import settings_of
from skipway.diagnosis.subject import Subject
from skipway.errors import CheckpointError, SkipwayError, printable
from skipway.hardware.device import choose_device, choose_precision
from skipway.recipe import Recipe
from skipway.training.distributed import Ranks
from skipway.training.reporter import SilentReporter
from skipway.training.run import Run
from skipway.training.run_folder import RunFolder
from skipway.training.setup import build_run, load_data
from skipway.training.task_choice import choose_task

__all__ = ["RecipeBatches", "diagnose_run", "is_run", "stored_run"]


class RecipeBatches:
    """The training batches of a run, pass after pass."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for epoch in itertools.count():
            for batch in self.run.task.train_batches(self.run, epoch, 0):
                yield batch.inputs, batch.targets


def is_run(text: str) -> bool:
    """Whether a text is the path of a run folder."""
    config = RunFolder(Path(text)).config
    return config.is_file() and '"recipe"' in config.read_text("utf-8")


def stored_run(path: Path, device: str = "auto") -> Run:
    """Build the run of a folder anew, at its start; the folder is only read.

    Raises:
        CheckpointError: there is no run in the folder, or its files are damaged.
        DataError: its data are gone or have changed.
        SkipwayError: it is a cross-validation, or layers of it are frozen.
    """
    folder = RunFolder(path)
    stored = folder.read_config()
    if "folds" in stored:
        raise SkipwayError(f"{printable(path)} holds a cross-validation; give the folder of one of its folds")
    if not isinstance(stored.get("recipe"), dict):
        raise CheckpointError(f"{printable(folder.config)} is damaged: it holds no recipe")
    recipe = Recipe.from_json(stored["recipe"], str(folder.config))
    chosen_device, task, reporter, ranks = choose_device(device), choose_task(recipe), SilentReporter(), Ranks()
    chosen, data = load_data(task, recipe, reporter, ranks, chosen_device, folder.read_split(), fresh=False)
    resolved = task.resolve(chosen, data, choose_precision(recipe.precision, chosen_device)[0], ranks.world)
    if resolved.freeze != "none":
        raise SkipwayError(
            f"{printable(path)}: it fits a classifier first, or freezes layers, which a diagnosis does not follow; "
            "diagnose its network by name"
        )
    return build_run(task, resolved, data, folder, reporter, chosen_device, ranks, lambda: False)


def diagnose_run(
    path: Path, *, certainty: float = 0.95, allowance: float = 0.03, thorough: bool = False, device: str = "auto"
) -> Diagnosis:
    """Tell from its first steps whether the training of a run folder learns, by its own recipe: network, batches with
    augmentation, loss, optimizer, warm-up, schedule and clipping, in float32. The folder is only read.

    Args:
        path: of the run folder, of images or of text, finished or not.
        certainty, allowance, thorough: as in `skipway.diagnose`.
        device: "auto", "cpu", "cuda" or "cuda:1".

    Raises:
        SkipwayError: as `stored_run` and `skipway.diagnose`.
    """
    run = stored_run(path, device)
    rows = run.folder.read_metrics()
    steps = max([run.progress.plan.end, *(row["step"] for row in rows if isinstance(row.get("step"), int))])
    settings = replace(
        settings_of(run.optimizer, run.model),
        warmup=round(run.recipe.warmup * steps),
        schedule=run.recipe.schedule,
        clip=run.recipe.clipper,
        steps=steps,
    )
    batches = Batches(RecipeBatches(run))
    progress = PassCounter(PASSES + (6 if thorough else 0) + allowance * steps)
    subject = Subject(run.model, *batches.first, run.loss, seed=run.recipe.seed, progress=progress, batches=batches)
    try:
        limits = {"certainty": certainty, "allowance": allowance, "remedies": 6}
        return examine(subject, settings, thorough=thorough, **limits)
    finally:
        progress.finish()
