"""`fit` and `TrainedClassifier`: training an image classifier, and using it, in one line of Python each."""

from __future__ import annotations

import dataclasses
import inspect
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipway.checkpoint.files import read_json
from skipway.cli.interrupts import StopSignal
from skipway.cli.progress import choose_reporter
from skipway.cli.train import result_lines, stopped_lines, unused_folder
from skipway.errors import CheckpointError, SkipwayError, counted, printable, suggest
from skipway.inference.metrics import percent
from skipway.inference.predict import NetworkChoices, Predictor, load_channels_last
from skipway.inference.publish import target_kind, write_hub_folder, write_onnx, write_program
from skipway.inference.run_evaluation import RunEvaluation, evaluate_images, evaluate_run
from skipway.presets import PRESETS
from skipway.recipe import Recipe, read_recipe
from skipway.training.loop import train
from skipway.training.run_folder import RunFolder
from skipway.training.task_choice import choose_task

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["TrainedClassifier", "fit"]


class TrainedClassifier(Predictor):
    """The classifier of a finished run of `fit` or `skipway train`, with its folder: predict, evaluate, export.

    Args:
        folder: of the run.
        device: auto, cpu, cuda, cuda:1.
        network: how a network that is not ours is built again, see `from_pretrained`.

    Raises:
        CheckpointError: the folder holds no finished run.

    >>> classifier = TrainedClassifier("runs/photos-1")  # doctest: +SKIP
    >>> classifier.predict("photo.jpg")[0].label  # doctest: +SKIP
    'cat'
    """

    def __init__(self, folder: str | Path, *, device: str = "auto", **network: Unpack[NetworkChoices]) -> None:
        self.files = RunFolder(Path(folder))
        if not self.files.summary.exists():
            raise CheckpointError(
                f"{printable(str(folder))} holds no finished run; train it to the end with sw.fit(out=…, resume=True)"
            )
        super().__init__(load_channels_last(self.files.path, **network), device=device)
        self.network = network
        self.summary: dict[str, Any] = read_json(self.files.summary)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.files.path

    @property
    def report(self) -> Path:
        """The page of the run."""
        return self.files.report

    @property
    def recipe(self) -> Recipe:
        """Every choice of the run; `sw.fit(**dataclasses.asdict(recipe))` repeats it."""
        return read_recipe(self.files.config)

    @property
    def accuracy(self) -> float:
        """Accuracy on the test images, 0 to 1."""
        return self.summary["test_accuracy"]

    def evaluate(self, data: str | Path | None = None) -> RunEvaluation:
        """Evaluate on images in class folders or a list; by default on the test images of the run.

        Raises:
            DataError: unknown classes, no readable image, or images of the run that have changed.
        """
        device = str(self.device)
        if data is None:
            return evaluate_run(self.folder, device=device, **self.network)
        return evaluate_images(self.folder, Path(data), device=device, **self.network)

    def export(self, target: str | Path) -> Path:
        """Write the network with its preprocessing, verify it, and return the path; a warning says where an ONNX file
        could not be verified, since onnxruntime is not installed.

        Args:
            target: FILE.onnx, FILE.pt2 (torch.export), or a folder for the Hugging Face hub.

        Raises:
            SkipwayError: the network cannot be exported; nothing is written.
        """
        target = Path(target)
        kind, writers = target_kind(target), {".onnx": write_onnx, ".pt2": write_program}
        if kind in writers:
            writers[kind](str(self.folder), target, **self.network)
        elif not kind:
            raise SkipwayError(f"target={printable(target)}: the rule is FILE.onnx, FILE.pt2 or a folder")
        else:
            write_hub_folder(str(self.folder), target, **self.network)
        return target

    def __repr__(self) -> str:
        tested = f"{percent(self.accuracy)} of {counted(self.summary['test_images'], 'test image')}"
        return f"TrainedClassifier({printable(str(self.folder))!r}: {len(self.classes)} classes, {tested})"


def fit(
    data: str | Path | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    preset: str | None = None,
    **choices: Any,
) -> TrainedClassifier:
    """Train an image classifier on a folder of images, as `skipway train` does, and return it.

    What is not chosen follows from the case and is printed as options. Random numbers, threads and signal handlers of
    the process are afterwards as before. Ctrl-C saves the state and raises KeyboardInterrupt; `resume=True` goes on.

    Args:
        data: a folder with a folder of images for each class, a list, tar shards, or "hf:NAME"; None for the digits of
            scikit-learn.
        out: the run folder; None for runs/<data>-<number>.
        resume: continue the run in `out`; if there is none, start it.
        overwrite: replace the run in `out`.
        quiet: print nothing.
        preset: named values for what is not chosen, "fast" for small images (`skipway.presets.PRESETS`); a run that is
            resumed has its recipe.
        choices: fields of `Recipe`: `model="timm:convnext_atto"`, `time="10m"`, `start="random"`, `epochs=20`, …

    Raises:
        DataError: the images cannot be used for training.
        CheckpointError: the initial weights, or the run to resume, cannot be used.
        SkipwayError: an unknown choice, or one that is not allowed.

    >>> classifier = fit(epochs=1, out="runs/digits", quiet=True)  # doctest: +SKIP
    >>> classifier.predict("three.png")[0].label  # doctest: +SKIP
    '3'
    """
    began = time.monotonic()
    if not isinstance(out, str | Path | None):
        raise SkipwayError(f"out={out!r}: the rule is the path of a folder")
    recipe = as_recipe(data, choices if preset is None else {**PRESETS[preset].beside(choices), **choices})
    if preset is not None:
        PRESETS[preset].check(preset, recipe.data, recipe.initial_weights)
    if out is None and (resume or overwrite):
        raise SkipwayError(f"{'resume' if resume else 'overwrite'}=True: name the folder of the run, out='runs/…'")
    if (task := choose_task(recipe)).kind != "image":
        raise SkipwayError("fit trains classifiers of images; skipway.train(Recipe(data=…), Path(out)) trains on text")
    folder = unused_folder(recipe.data, task.default_data) if out is None else Path(out)
    main = threading.current_thread() is threading.main_thread()
    with StopSignal() if main else nullcontext() as stopping, choose_reporter(quiet) as reporter:
        outcome = train(
            None if resume and (folder / "config.json").exists() and not choices and data is None else recipe,
            folder,
            resume=resume,
            overwrite=overwrite,
            reporter=reporter,
            stop=stopping.requested if isinstance(stopping, StopSignal) else lambda: False,
            began=began,
        )
        for line in result_lines(outcome, time.monotonic() - began) if outcome.finished else stopped_lines(outcome):
            reporter.message(*line)
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped; sw.fit(out={str(folder)!r}, resume=True) goes on")
    return TrainedClassifier(folder, device=recipe.device, trust_code=True)


def as_recipe(data: Any, choices: dict[str, Any]) -> Recipe:
    """The recipe of a call of `fit`.

    Raises:
        SkipwayError: data in memory, or an unknown choice.
    """
    if data is not None and not isinstance(data, str | Path):
        raise SkipwayError(
            f"data={type(data).__name__}: the rule is a path, or hf:NAME; save images in memory into a folder for each "
            "class first"
        )
    names = [field.name for field in dataclasses.fields(Recipe)]
    for name in choices:
        if name not in names:
            raise SkipwayError(suggest("choice", name, names))
    return Recipe(None if data is None else Path(data), **choices)


def fit_signature() -> inspect.Signature:
    """The signature of `fit` with the fields of `Recipe` in the place of `choices`, for completion and help."""
    own = [each for each in inspect.signature(fit).parameters.values() if each.name != "choices"]
    fields = [field for field in dataclasses.fields(Recipe) if field.name != "data"]
    more = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields
    ]
    return inspect.Signature([*own, *more], return_annotation=TrainedClassifier)


fit.__signature__ = fit_signature()  # type: ignore[attr-defined]
