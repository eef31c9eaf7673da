"""The page of a finished run on text, made from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from skipway.errors import duration, printable
from skipway.inference.metrics import looked_at
from skipway.inference.predict import from_pretrained
from skipway.inference.text_evaluation import TextEvaluation
from skipway.report.chart import Figure, Mark, Series, Style
from skipway.report.mixing_matrix import measured_mixing
from skipway.report.page import write_page
from skipway.report.run.command import again_command, train_command
from skipway.report.run.curves import number_of
from skipway.report.run.depth import gain_figures, signal_figures
from skipway.report.run.page import FinishedRun, environment_of
from skipway.report.summary import model_lines
from skipway.report.text_summary import chosen_step_text, text_lines, unigram_entropy
from skipway.tracing.chain import read_chain

__all__ = ["write_text_report"]

SECTIONS = {
    "curves": "Training",
    "samples": "What it writes",
    "depth": "Signal along the depth",
    "data": "Data and model",
    "recipe": "Recipe",
    "environment": "Machine",
}
MIXED_SEQUENCES = 4
"""Training sequences on which the depth mixing of the trained network is measured."""
MOST_SAMPLES = 12
"""Samples that are shown, evenly over the run."""

Rows = Sequence[Mapping[str, Any]]


class Sample(NamedTuple):
    """A text that the network wrote after a step."""

    title: str
    text: str


def write_text_report(run: FinishedRun, evaluation: TextEvaluation) -> Path | None:
    """Write `report.html` of a run on text that has ended; None if the run is told to stop before.

    The page describes the weights in `best.safetensors`, which are loaded for it. The network of `run` is not changed.

    Args:
        run: finished, with its best weights written.
        evaluation: of these weights on the test text.

    Raises:
        SkipwayError: the weights cannot be read, or the page cannot be written.
    """
    network = from_pretrained(run.folder.best).to(run.device)
    if run.stop():
        return None
    return write_page(run.folder.report, "run_text.html.j2", **text_page_values(run, evaluation, network))


def text_page_values(run: FinishedRun, evaluation: TextEvaluation, network: torch.nn.Module) -> dict[str, Any]:
    """Values of the template `run_text.html.j2`."""
    folder, progress, data = run.folder, run.progress, run.data
    metrics, signals = folder.read_metrics(), signal_figures(folder.read_health())
    ids, targets = (each.to(run.device) for each in data.train_batch(0, 0, MIXED_SEQUENCES, seed=run.recipe.seed))
    connections = read_chain(network, ids)
    mixing, no_mixing = measured_mixing(network.eval(), len(connections), ids, targets)
    best = next((row for row in metrics if row["epoch"] == progress.best_epoch), {})
    choice = chosen_step_text(folder, progress.best_epoch)
    test = f"The test text was {looked_at(len(progress.tested_after), 'at the end')}"
    if np.shares_memory(data.test.tokens[:1], data.validation.tokens[:1]):
        test = "They were tested on the validation text, so the result is a little too good"
    lines = [*text_lines(data), *model_lines(run.model, run.recipe, len(connections), run.steps_per_epoch)]
    validation = best.get("validation_bits_per_byte")
    return {
        "title": f"{run.recipe.model} on {printable(data.name)}",
        "command": train_command(run.recipe, "text"),
        "again": again_command(run.folder.path),
        "bits": f"{evaluation.bits_per_byte:.3f}",
        "bytes": f"{evaluation.bytes:,}",
        "tokens": f"{evaluation.total:,}",
        "choice": f"{choice[0].upper()}{choice[1:]}. {test}.",
        "key_numbers": [
            ("loss per token", f"{evaluation.loss:.4f} nats"),
            ("perplexity", f"{evaluation.perplexity:,.2f}"),
            ("next token right", f"{100 * evaluation.accuracy:.1f} %"),
            ("validation", "none" if validation is None else f"{validation:.3f} bits per byte"),
            ("steps", f"{progress.before:,}"),
            ("tokens trained on", f"{progress.before * run.recipe.batch_size * data.context:,}"),
            ("time", duration(run.seconds)),
            ("parameters", f"{sum(parameter.numel() for parameter in network.parameters()):,}"),
            ("connections", f"{len(connections):,}"),
        ],
        "sections": SECTIONS,
        "curves": text_figures(metrics, folder.read_steps(), int(best.get("step", 0)), unigram_entropy(data)),
        "prompt": next((row["prompt"] for row in metrics if "prompt" in row), ""),
        "samples": text_samples(metrics),
        "watched": bool(signals),
        "depth": [*signals, *gain_figures(network)],
        "connected": len(connections) > 0,
        "mixing": mixing,
        "no_mixing": no_mixing,
        "mixed": len(ids),
        "data": [(label, printable(text)) for label, text in lines],
        "fields": json.dumps(run.recipe.to_json(), indent=2),
        "machine": [(printable(str(k)), printable(str(v))) for k, v in environment_of(run).items() if v is not None],
    }


def text_figures(epochs: Rows, steps: Rows, best: int, chance: float) -> list[Figure]:
    """Loss, bits per byte, learning rate and gradient norm by step; those without a value are left out.

    Args:
        epochs: the lines of `metrics.jsonl`.
        steps: the lines of `steps.jsonl`.
        best: the step of the weights with the lowest validation loss.
        chance: the loss of an output that is the same at every token.
    """
    last = max([number_of(row, "step") for row in (*epochs, *steps)] + [1.0])
    span, marks = (0.0, last), (Mark(float(best), f"best: {best:,}"),) if best else ()

    def series(name: str, rows: Rows, column: str, style: Style = "measured") -> Series:
        return Series.of(name, [(number_of(row, "step"), number_of(row, column)) for row in rows], style)

    figures = [
        Figure(
            title="Loss, nats per token",
            x_label="step",
            series=(
                series("single training steps", steps, "loss", "faint"),
                series("training", epochs, "train_loss"),
                series("validation", epochs, "validation_loss"),
                Series.of("same output at every token", [(0.0, chance), (last, chance)], "theory"),
            ),
            span=span,
            marks=marks,
        ),
        Figure(
            title="Bits per byte",
            x_label="step",
            series=(
                series("training", epochs, "train_bits_per_byte"),
                series("validation", epochs, "validation_bits_per_byte"),
            ),
            span=span,
            marks=marks,
        ),
        Figure(title="Learning rate", x_label="step", series=(series("learning rate", steps, "lr"),), span=span),
        Figure(
            title="Gradient norm before clipping",
            x_label="step",
            series=(series("gradient norm", steps, "norm"),),
            log_y=True,
            span=span,
        ),
    ]
    return [figure for figure in figures if figure.drawn]


def text_samples(epochs: Rows) -> list[Sample]:
    """What the network wrote after evaluations, evenly over the run, the last one included."""
    rows = [row for row in epochs if isinstance(row.get("sample"), str)]
    count = min(len(rows), MOST_SAMPLES)
    shown = sorted({round(place * (len(rows) - 1) / max(1, count - 1)) for place in range(count)})
    return [Sample(sample_title(rows[place]), rows[place]["sample"]) for place in shown]


def sample_title(row: Mapping[str, Any]) -> str:
    """When a sample was written."""
    bits = row.get("validation_bits_per_byte")
    return f"step {row['step']:,}" + ("" if bits is None else f", {bits:.3f} bits per byte")
