"""Cross-validation of a recipe: one run for each fold of the training images, and the results together."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipway._version import __version__
from skipway.checkpoint.files import read_json, write_json
from skipway.checkpoint.store import remove_path
from skipway.errors import CheckpointError, SkipwayError, counted, duration, printable, spell
from skipway.inference.evaluation import wilson_interval
from skipway.inference.metrics import percent
from skipway.recipe import Recipe
from skipway.training.defaults import adopt_choices
from skipway.training.distributed import join_ranks
from skipway.training.initial_weights import resolve_paths
from skipway.training.loop import train
from skipway.training.reporter import Reporter, SilentReporter, StepReport
from skipway.training.resume import resume_recipe
from skipway.training.run import LENGTH_FIELDS
from skipway.training.run_folder import RunFolder
from skipway.training.task_choice import choose_task

__all__ = ["CrossValidation", "FoldResult", "cross_validate"]


@dataclass(frozen=True, kw_only=True)
class FoldResult:
    """The test result of one fold.

    Args:
        number: of the fold, from 1.
        correct: images of the fold that the network classifies correctly.
        images: in the fold.
        best_epoch: the epoch, from 1, whose weights were tested.
    """

    number: int
    correct: int
    images: int
    best_epoch: int

    @property
    def accuracy(self) -> float:
        """Fraction of the images classified correctly, 0 to 1."""
        return self.correct / max(1, self.images)


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """The results of the folds that are done.

    Args:
        folder: of the cross-validation; fold k is the run in `fold-k`.
        folds: their number.
        results: of the folds that are done.

    >>> results = tuple(FoldResult(number=n, correct=c, images=20, best_epoch=1) for n, c in ((1, 18), (2, 16)))
    >>> found = CrossValidation(folder=Path("runs/cv"), folds=2, results=results)
    >>> found.accuracy, round(found.mean, 4), round(found.deviation, 4)
    (0.85, 0.85, 0.0707)
    >>> print(found)
    85.0 % of 40 images (95 % interval 70.9 to 92.9 %); 2 of 2 folds: mean 85.0 %, standard deviation 7.1 %
    """

    folder: Path
    folds: int
    results: tuple[FoldResult, ...]

    @property
    def finished(self) -> bool:
        """Whether all folds are done."""
        return len(self.results) == self.folds

    @property
    def correct(self) -> int:
        """Images of all folds that are classified correctly by the network that was not trained on them."""
        return sum(result.correct for result in self.results)

    @property
    def images(self) -> int:
        """Images of all folds that are done."""
        return sum(result.images for result in self.results)

    @property
    def accuracy(self) -> float:
        """Pooled accuracy: the fraction of all images classified correctly, 0 to 1."""
        return self.correct / max(1, self.images)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the pooled accuracy, as if one network had classified one sample of all images."""
        return wilson_interval(self.correct, self.images)

    @property
    def mean(self) -> float:
        """Mean of the folds' accuracies; nan without a fold."""
        return statistics.fmean(result.accuracy for result in self.results) if self.results else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation of the folds' accuracies, with n - 1; nan with fewer than two folds."""
        return statistics.stdev(result.accuracy for result in self.results) if len(self.results) > 1 else math.nan

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{percent(self.accuracy)} of {counted(self.images, 'image')} (95 % interval {100 * low:.1f} to "
            f"{percent(high)}); {len(self.results)} of {self.folds} folds: mean {percent(self.mean)}, standard "
            f"deviation {percent(self.deviation)}"
        )

    def to_json(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        return {
            "folds": self.folds,
            "test_accuracy": self.accuracy,
            "test_correct": self.correct,
            "test_images": self.images,
            "test_interval": list(self.interval),
            "mean_accuracy": self.mean,
            "standard_deviation": self.deviation,
            "results": [{**dataclasses.asdict(result), "accuracy": result.accuracy} for result in self.results],
        }


class FoldReporter(SilentReporter):
    """Passes the reports of a fold to another reporter, except those that are the same for all folds."""

    def __init__(self, reporter: Reporter, *, first: bool) -> None:
        self.reporter = reporter
        self.quiet = reporter.quiet or not first

    def message(self, label: str, text: str) -> None:
        self.reporter.message(label, text)

    def activity(self, label: str, done: int = 0, total: int = 0) -> None:
        self.reporter.activity(label, done, total)

    def step(self, report: StepReport) -> None:
        self.reporter.step(report)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        self.reporter.epoch(row, epochs)


def cross_validate(
    recipe: Recipe | None,
    out: Path,
    folds: int | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    stop: Callable[[], bool] = lambda: False,
    began: float | None = None,
) -> CrossValidation:
    """Train `recipe` once for each fold of the training images and test every network on the fold it has not seen.

    Every class is divided evenly over the folds, by `Recipe.seed` and the names of the images; copies stay together.
    A test split that the source has itself is left alone. The validation split, which chooses the epoch, is the
    source's own, or split off the images outside the fold. Each fold gets an equal part of `Recipe.time`.

    Args:
        recipe: how each network is trained; None with `resume` takes the one in `out`.
        out: the folder; fold k becomes the run `out/fold-k`, and `out/summary.json` holds the results together.
        folds: their number, 2 or more and at most the number of images of the smallest class; None: 5, or as begun.
        resume: continue in `out`: folds that are done are not repeated. Where there is nothing yet, begin.
        overwrite: replace the cross-validation in `out`.
        reporter: where to report; None reports nowhere.
        stop: asked after every step; once it returns True the state is saved and the call returns.
        began: when the command began, on the clock of `time.monotonic`, from which `Recipe.time` counts; None: now.

    Raises:
        DataError: a class has fewer images than there are folds, or the images cannot be trained on.
        SkipwayError: the folder is taken, or holds another number of folds.
        CheckpointError: a run that is to continue cannot be used.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     quick = Recipe(depth=8, width=4, epochs=1, device="cpu")
    ...     found = cross_validate(quick, Path(folder, "cv"), folds=2)
    >>> found.images, sorted(result.images for result in found.results)
    (1797, [898, 899])
    """
    began = time.monotonic() if began is None else began
    folder = RunFolder(out)
    recipe, folds = resolve_folds(recipe, folder, folds, resume=resume, overwrite=overwrite)
    if choose_task(recipe).kind == "text":
        raise SkipwayError(
            f"{spell('folds', folds)}: the rule is images in classes, and this is text; train with several seeds"
        )
    with join_ranks(recipe.device) as ranks:
        if ranks.first:
            prepare_folder(folder, recipe, folds, overwrite=overwrite)
        ranks.barrier()
        share, end = (recipe.budget or 0.0) / folds, None
        if share:
            if reporter is not None:
                told = f"{spell('time', recipe.time)}: {duration(share)} for each of {counted(folds, 'fold')}"
                reporter.message("plan", told)
            recipe = dataclasses.replace(recipe, time=f"{share:.8g}s")
        results: list[FoldResult] = []
        for number in range(1, folds + 1):
            own = RunFolder(out / f"fold-{number}")
            if number > 1:  # the first fold chose for all
                recipe = adopt_choices(recipe, RunFolder(out / "fold-1").read_config()["recipe"])
            mine = dataclasses.replace(recipe, fold=f"{number}/{folds}")
            try:
                if not is_done(own, mine):
                    now, left = time.monotonic(), folds - number + 1
                    end = began + left * share if end is None else end
                    # by the start of the command, and by folds that took longer
                    lost = max(0.0, share - (end - now) / left)
                    if not train_fold(mine, own, reporter, stop, now - lost):
                        break
            except SkipwayError:
                if ranks.first and number == 1 and not own.path.exists():  # refused before anything was trained
                    remove_path(folder.config)
                    out.rmdir()
                raise
            results.append(read_result(own, number))
            if reporter is not None:
                told = f"{percent(results[-1].accuracy)} of {counted(results[-1].images, 'test image')}"
                reporter.message("fold", f"{number} of {folds}: {told}")
        found = CrossValidation(folder=out, folds=folds, results=tuple(results))
        if found.finished and ranks.first:
            write_json(folder.summary, found.to_json())
        return found


def resolve_folds(
    recipe: Recipe | None, folder: RunFolder, folds: int | None, *, resume: bool, overwrite: bool
) -> tuple[Recipe, int]:
    """The recipe and the number of folds: as begun in the folder, else as given.

    Raises:
        SkipwayError: the folder is taken, holds a single run or another number of folds, or an impossible number.
    """
    stored = folder.read_config() if resume and (recipe is None or folder.config.exists()) else None
    if stored is not None:
        begun = stored.get("folds")
        if not isinstance(begun, int):
            raise SkipwayError(
                f"out={printable(folder.path)}: the folder holds a single run, which is resumed without folds"
            )
        if folds not in (None, begun):
            raise SkipwayError(
                f"folds={folds}: the cross-validation in {printable(folder.path)} has {begun}; leave that out"
            )
        recipe, folds = resume_recipe(stored, folder.config, recipe), begun
    elif recipe is None:
        raise SkipwayError("recipe=None: a new cross-validation needs one; only resume=True finds it in the folder")
    else:
        folder.check_free(overwrite=overwrite)
    folds = 5 if folds is None else folds
    if folds < 2:
        raise SkipwayError(f"folds={folds}: the rule is folds >= 2")
    if recipe.fold is not None:
        raise SkipwayError(f"fold={recipe.fold!r}: one fold is a single run, folds={folds} are all of them; give one")
    folder.check_apart(recipe.data)
    return recipe, folds


def prepare_folder(folder: RunFolder, recipe: Recipe, folds: int, *, overwrite: bool) -> None:
    """Make the folder and write what the cross-validation is; with `overwrite` remove the one that was there.

    The results of an earlier end go in any case: they are written again when all folds are done.
    """
    for path in (folder.summary, *(folder.path.glob("fold-*") if overwrite else ())):
        remove_path(path)
    folder.path.mkdir(parents=True, exist_ok=True)
    values = {"skipway": __version__, "folds": folds, "recipe": resolve_paths(recipe).to_json()}
    write_json(folder.config, values)


def train_fold(
    recipe: Recipe, folder: RunFolder, reporter: Reporter | None, stop: Callable[[], bool], began: float
) -> bool:
    """Train and test one fold; False if told to stop before its end."""
    inner = None
    if reporter is not None:
        number, _, folds = str(recipe.fold).partition("/")
        reporter.message("fold", f"{number} of {folds}, in {folder.path}")
        inner = FoldReporter(reporter, first=number == "1")
    return train(recipe, folder.path, resume=True, reporter=inner, stop=stop, began=began).finished


def is_done(folder: RunFolder, recipe: Recipe) -> bool:
    """Whether a fold has been trained for the length of the recipe and tested.

    Raises:
        SkipwayError: it was trained by another recipe.
    """
    if not folder.summary.exists() or not folder.config.exists():
        return False
    stored = folder.read_config()
    wanted = resume_recipe(stored, folder.config, recipe)
    return all(getattr(wanted, name) == stored["recipe"].get(name) for name in LENGTH_FIELDS)


def read_result(folder: RunFolder, number: int) -> FoldResult:
    """The result of a fold, from its `summary.json`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    values = read_json(folder.summary)
    names = {"correct": "test_correct", "images": "test_images", "best_epoch": "best_epoch"}
    if not isinstance(values, dict) or not all(isinstance(values.get(name), int) for name in names.values()):
        raise CheckpointError(f"{printable(folder.summary)} is damaged: remove it and resume to test the fold again")
    return FoldResult(number=number, **{field: values[name] for field, name in names.items()})
