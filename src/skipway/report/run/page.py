"""The page of a finished run: its sections, from what the run folder holds and what the network says of the images."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from skipway._version import __version__
from skipway.checkpoint.files import read_json, write_atomically
from skipway.data.sources.splits import SPLITS
from skipway.errors import CheckpointError, printable
from skipway.inference.evaluation import Evaluation, wilson_interval
from skipway.inference.metrics import class_scores, percent
from skipway.inference.predict import from_pretrained
from skipway.report.run.answers import Answers, answers
from skipway.report.run.classes import class_table, confusion_section, sizes_section
from skipway.report.run.curves import curves
from skipway.report.run.depth import gains_section, signal_section
from skipway.report.run.origin import environment_section, recipe_section
from skipway.report.run.pictures import mistakes_section, seen_section
from skipway.report.run.style import STYLE
from skipway.report.run.sureness import sureness_section
from skipway.report.sheet import definitions, document
from skipway.report.summary import chosen_text, data_lines, duration, model_lines
from skipway.tracing.chain import chain

__all__ = ["SECTIONS", "render", "write_report"]


class FinishedRun(Protocol):
    """What the page of a run needs of it; `skipway.training.run.Run` has it all."""

    recipe: Any
    data: Any
    model: nn.Module
    folder: Any
    device: torch.device
    progress: Any
    stop: Any

    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    def autocast(self) -> Any: ...


SECTIONS = {
    "curves": "Training",
    "confusion": "What is taken for what",
    "classes": "Classes",
    "mistakes": "Worst mistakes",
    "seen": "What the network sees",
    "calibration": "How sure it is",
    "depth": "Signal along the depth",
    "data": "Data",
    "recipe": "Recipe",
    "environment": "Machine",
}


def write_report(run: FinishedRun, evaluation: Evaluation, found: Answers | None = None) -> Path | None:
    """Write `report.html` of a run that has ended; None if the run is told to stop before it is done.

    The page is about the weights in `best.safetensors`, which are loaded for it, so it is the same whether they are
    averages, and however the run had them spread over processes.

    Args:
        run: finished, with its best weights written.
        evaluation: of these weights on the test images.
        found: their answers to the test images; None: they are asked once more.

    Raises:
        SkipwayError: the weights or an image cannot be read, or the page cannot be written.
    """
    network = from_pretrained(run.folder.best).to(run.device)
    network = network.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
    if found is None:
        batches = run.data.evaluation_batches("test", batch_size=run.recipe.batch_size, device=run.device)
        found = answers(network, batches, autocast=run.autocast, flip=run.recipe.flip_test, stop=run.stop)
    if found is None or run.stop():
        return None
    content = render(run, evaluation, network, found).encode("utf-8", "backslashreplace")
    write_atomically(run.folder.report, lambda aside: aside.write_bytes(content))
    return run.folder.report


def render(run: FinishedRun, evaluation: Evaluation, network: nn.Module, found: Answers) -> str:
    """The page as text."""
    names = [printable(name) for name in run.data.classes]
    inside = {
        "curves": ['<div class="charts">', *curves_of(run), "</div>"],
        "confusion": confusion_section(evaluation.confusion, names),
        "classes": class_table(evaluation.confusion, names),
        "mistakes": mistakes_section(run.data, found, names),
        "seen": seen_section(run.data, run.recipe.seed, names),
        "calibration": sureness_section(found),
        "depth": depth_section(run, network),
        "data": data_section(run, names),
        "recipe": recipe_section(run.recipe),
        "environment": [environment_section(environment_of(run))],
    }
    title = f"{run.recipe.model} on {printable(run.data.name)}"
    parts = [*headline(run, evaluation, title, network)]
    links = "".join(f'<a href="#{key}">{text}</a>' for key, text in SECTIONS.items())
    parts.append(f"<nav>{links}</nav>")
    for key, text in SECTIONS.items():
        parts += [f'<section id="{key}"><h2>{text}</h2>', *inside[key], "</section>"]
    parts.append(f"<footer>Skipway {escape(__version__)}</footer>")
    return document(f"{title}: {percent(evaluation.accuracy)}", parts, style=STYLE)


def headline(run: FinishedRun, evaluation: Evaluation, title: str, network: nn.Module) -> Iterator[str]:
    """The accuracy with its interval, and the numbers that come with it."""
    low, high = wilson_interval(evaluation.correct, evaluation.total)
    scores = class_scores(evaluation.confusion)
    progress = run.progress
    yield f"<h1>{escape(title)}</h1>"
    yield (
        f'<p class="result"><strong>{percent(evaluation.accuracy)}</strong> of {evaluation.total:,} test images '
        f'<span class="soft">95 % interval {100 * low:.1f} to {percent(high)} (Wilson)</span></p>'
    )
    yield definitions(
        [
            ("balanced accuracy", percent(scores.balanced_accuracy)),
            ("mean F1", percent(scores.macro_f1)),
            ("test loss", f"{evaluation.loss:.4f}"),
            ("weights", f"epoch {progress.best_epoch}"),
            ("validation", validation_text(run)),
            ("epochs", f"{progress.epoch:,}"),
            ("time", duration(run.seconds)),
            ("parameters", f"{sum(parameter.numel() for parameter in network.parameters()):,}"),
            ("connections", f"{len(chain(network)):,}"),
        ]
    )
    chosen = chosen_text(len(run.data.validation), progress.best_accuracy, progress.best_epoch)
    said = f"{chosen[0].upper()}{chosen[1:]}. The test images were looked at once, at the end."
    yield f'<p class="soft">{escape(said)}</p>'


def validation_text(run: FinishedRun) -> str:
    """The best validation accuracy."""
    return percent(max(0.0, run.progress.best_accuracy)) if len(run.data.validation) else "none"


def curves_of(run: FinishedRun) -> Iterator[str]:
    """The charts of the training."""
    yield from curves(run.folder.read_metrics(), run.folder.read_steps(), run.steps_per_epoch, run.progress.best_epoch)


def depth_section(run: FinishedRun, network: nn.Module) -> Iterator[str]:
    """The samples of health, and the gains."""
    yield '<div class="charts">'
    yield from signal_section(run.folder.read_health())
    yield gains_section(network)
    yield "</div>"


def data_section(run: FinishedRun, names: list[str]) -> Iterator[str]:
    """What was found, and how many images each class has."""
    lines = [*data_lines(run.data), *model_lines(run.model, run.recipe, len(chain(run.model)), run.steps_per_epoch)]
    rows = "".join(f"<tr><td>{escape(label)}</td><td>{escape(printable(text))}</td></tr>" for label, text in lines)
    yield f'<table class="plain"><tbody>{rows}</tbody></table>'
    yield '<div class="charts">'
    yield sizes_section({split: getattr(run.data, split).labels for split in SPLITS}, names)
    yield "</div>"


def environment_of(run: FinishedRun) -> dict[str, object]:
    """What `environment.json` holds; empty where it cannot be read, which is no reason to have no page."""
    try:
        values = read_json(run.folder.environment)
    except CheckpointError:
        return {}
    return values if isinstance(values, dict) else {}
