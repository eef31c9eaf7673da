"""The page of a finished run, made from its folder and the predictions for the test images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from skipway.checkpoint.files import read_json
from skipway.data.sources.splits import SPLITS
from skipway.errors import CheckpointError, duration, printable
from skipway.inference.evaluation import Evaluation, wilson_interval
from skipway.inference.metrics import class_scores, looked_at, percent
from skipway.inference.predict import from_pretrained
from skipway.report.mixing_matrix import measured_mixing
from skipway.report.page import write_page
from skipway.report.run.calibration import calibration_charts
from skipway.report.run.classes import class_sizes, class_table, confused_table, confusion_matrix
from skipway.report.run.command import again_command, train_command
from skipway.report.run.curves import training_figures
from skipway.report.run.depth import gain_figures, signal_figures
from skipway.report.run.findings import ImageFindings, findings_values
from skipway.report.run.pictures import input_pictures, mistake_pictures
from skipway.report.run.predictions import Predictions, collect_predictions
from skipway.report.summary import chance_remark, chosen_text, data_lines, epoch_text, model_lines
from skipway.tracing.chain import read_chain

__all__ = ["SECTIONS", "write_report"]


class FinishedRun(Protocol):
    """The part of `skipway.training.run.Run` that the page needs; training lies above the report."""

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


MIXED_IMAGES = 8
"""Training images on which the depth mixing of the trained network is measured."""
SECTIONS = {
    "curves": "Training",
    "confusion": "Confusion",
    "classes": "Classes",
    "mistakes": "Worst mistakes",
    "findings": "Images by their features",
    "inputs": "Training inputs",
    "calibration": "Calibration",
    "depth": "Signal along the depth",
    "data": "Data and model",
    "recipe": "Recipe",
    "environment": "Machine",
}


def write_report(
    run: FinishedRun,
    evaluation: Evaluation,
    predictions: Predictions | None = None,
    findings: ImageFindings | str = "The features of the images were not looked at.",
) -> Path | None:
    """Write `report.html` of a run that has ended; None if the run is stopped before the page is complete.

    The page describes the weights in `best.safetensors`, which are loaded for it, so that weight averaging and sharding
    make no difference. The network of `run` is not changed.

    Args:
        run: finished, with its best weights written.
        evaluation: of these weights on the test images.
        predictions: of these weights for the test images; None computes them again.
        findings: in the features of the images; or why there are none, in words.

    Raises:
        SkipwayError: the weights or an image cannot be read, or the page cannot be written.
    """
    network = from_pretrained(run.folder.best, trust_code=True).to(run.device)
    network = network.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
    if predictions is None:
        batches = run.data.evaluation_batches("test", batch_size=run.recipe.batch_size, device=run.device)
        predictions = collect_predictions(
            network, batches, autocast=run.autocast, flip=run.recipe.flip_test, stop=run.stop
        )
    if predictions is None or run.stop():
        return None
    return write_page(run.folder.report, "run.html.j2", **page_values(run, evaluation, network, predictions, findings))


def page_values(
    run: FinishedRun,
    evaluation: Evaluation,
    network: nn.Module,
    predictions: Predictions,
    findings: ImageFindings | str,
) -> dict[str, Any]:
    """Values of the template `run.html.j2`."""
    names = [printable(name) for name in run.data.classes]
    scores = class_scores(evaluation.confusion)
    low, high = wilson_interval(evaluation.correct, evaluation.total)
    choice = chosen_text(
        len(run.data.validation), run.progress.best_accuracy, run.progress.best_epoch, run.progress.epoch
    )
    looked = looked_at(len(run.progress.tested_after), "at the end")
    calibration, calibration_text = calibration_charts(predictions)
    signals = signal_figures(run.folder.read_health())
    classes = class_table(scores, names)
    connections = read_chain(network, run.data.preprocessing.example.to(run.device))
    batch = run.data.sample(MIXED_IMAGES, seed=run.recipe.seed, device=run.device)
    mixing, no_mixing = measured_mixing(network.eval(), len(connections), batch.inputs, batch.labels)
    lines = [*data_lines(run.data), *model_lines(run.model, run.recipe, len(connections), run.steps_per_epoch)]
    metrics = run.folder.read_metrics()
    if metrics and (remark := chance_remark(run.recipe, run.data, metrics[-1])) is not None:
        lines.insert(0, ("note", remark))
    splits: dict[str, torch.Tensor] = {split: getattr(run.data, split).labels for split in SPLITS}
    progress, folder = run.progress, run.folder
    steps = folder.read_steps()
    return {
        "title": f"{run.recipe.model} on {printable(run.data.name)}",
        "command": train_command(run.recipe, "image"),
        "again": again_command(run.folder.path),
        "accuracy": percent(evaluation.accuracy),
        "images": f"{evaluation.total:,}",
        "interval": f"{100 * low:.1f} to {percent(high)}",
        "choice": f"{choice[0].upper()}{choice[1:]}. The test images were {looked}.",
        "key_numbers": [
            ("balanced accuracy", percent(scores.balanced_accuracy)),
            ("mean F1", percent(scores.macro_f1)),
            ("test loss", f"{evaluation.loss:.4f}"),
            ("weights", epoch_text(progress.best_epoch, fitted=progress.head_fitted)),
            ("validation", percent(max(0.0, progress.best_accuracy)) if len(run.data.validation) else "none"),
            ("epochs", f"{progress.epoch:,}"),
            ("time", duration(run.seconds)),
            ("parameters", f"{sum(parameter.numel() for parameter in network.parameters()):,}"),
            ("connections", f"{len(connections):,}"),
        ],
        "sections": SECTIONS,
        "curves": training_figures(metrics, steps, progress.best_epoch),
        "matrix": confusion_matrix(evaluation.confusion, names),
        "confused": confused_table(evaluation.confusion, names),
        "classes": classes,
        "omitted_classes": f"{len(names):,}" if len(classes.rows) < len(names) else "",
        "class_means": (
            f"Mean over the classes: recall {percent(scores.balanced_accuracy)} (balanced accuracy), "
            f"F1 {percent(scores.macro_f1)}."
        ),
        "mistakes": mistake_pictures(run.data, predictions, names),
        "findings": findings if isinstance(findings, str) else findings_values(findings, run.data, names),
        "inputs": input_pictures(run.data, run.recipe.seed, names),
        "calibration": calibration,
        "calibration_text": calibration_text,
        "watched": bool(signals),
        "depth": [*signals, *gain_figures(network)],
        "connected": len(connections) > 0,
        "mixing": mixing,
        "no_mixing": no_mixing,
        "mixed_images": len(batch.labels),
        "data": [(label, printable(text)) for label, text in lines],
        "class_sizes": class_sizes(splits, names),
        "fields": json.dumps(run.recipe.to_json(), indent=2),
        "machine": [(printable(str(k)), printable(str(v))) for k, v in environment_of(run).items() if v is not None],
    }


def environment_of(run: FinishedRun) -> dict[str, object]:
    """The content of `environment.json`; empty if it cannot be read, so that the page is written all the same."""
    try:
        values = read_json(run.folder.environment)
    except CheckpointError:
        return {}
    return values if isinstance(values, dict) else {}
