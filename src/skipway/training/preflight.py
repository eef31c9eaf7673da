"""The report before the first step: data, model, device, signal, and a diagnosis of the untrained network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from skipway.errors import counted, printable, spell
from skipway.inference.modes import eval_mode
from skipway.optim.schedules import usual_warmup
from skipway.probes.signal_check import check_signal
from skipway.recipe import LENGTHS, ResolvedRecipe
from skipway.report.summary import model_lines, signal_lines
from skipway.training.defaults import choices_text
from skipway.training.residual_warmup import warmup_lines
from skipway.training.run import Run
from skipway.training.trial_pass import statistics_remarks
from skipway.training.verdict import verdict_line

__all__ = ["report_preflight"]

# number of items for the diagnosis of the untrained network
DIAGNOSIS_ITEMS = 32


def report_preflight(run: Run, reason: str, stored: dict[str, Any] | None) -> None:
    """Report data, model and device, and the diagnosis of a fresh run."""
    if run.reporter.quiet:
        return
    run.reporter.message("run", printable(run.folder.path))
    for line in run.task.data_lines(run.data):
        run.reporter.message(*line)
    # a sharded network runs only on all ranks together, and only rank 0 reports
    flops = count_flops(run) if run.recipe.sharding == "none" or run.ranks.world == 1 else 0.0
    for line in model_lines(run.model, run.recipe, len(run.connections), run.steps_per_epoch, flops, run.task.item):
        run.reporter.message(*line)
    threads = counted(torch.get_num_threads(), "thread")
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else threads
    reason = reason if stored is None else "as before"
    many = f", {run.ranks.world} processes" if run.ranks.world > 1 else ""
    run.reporter.message(
        "device", f"{run.device}, {name}, {run.recipe.precision} ({reason}), torch {torch.__version__}{many}"
    )
    for line in run.memory_lines:
        run.reporter.message(*line)
    for line in warmup_lines(run):
        run.reporter.message(*line)
    options = choices_text(run.given, run.recipe)
    if stored is None and options:
        run.reporter.message("options", options)
    if stored is not None:
        run.reporter.message("resume", f"after epoch {run.progress.epoch}, step {run.progress.step}")
        earlier, epochs = stored["recipe"]["epochs"], run.recipe.epochs
        decisive = next(name for name in LENGTHS if getattr(run.recipe, name) is not None)
        if earlier != epochs:
            change = f"the number of epochs changed from {earlier} to {epochs}; the schedule spans all of them"
            value = spell(decisive, getattr(run.recipe, decisive))
            idle = f"{spell('epochs', epochs)} has no effect: {value} sets the length"
            run.reporter.message("note", change if decisive == "epochs" else idle)
        return
    for sentence in (*schedule_remarks(run.recipe), *run.task.remarks(run)):
        run.reporter.message("note", sentence)
    if run.ranks.world == 1:
        sample = run.task.sample(run, DIAGNOSIS_ITEMS)
        for sentence in (*run.task.sample_remarks(run, sample), *statistics_remarks(run)):
            run.reporter.message("note", sentence)
        for line in signal_lines(check_signal(run.model, sample.inputs)):
            run.reporter.message(*line)
        if run.recipe.freeze_plan.takes_steps:  # a fitted classifier needs no steps
            run.reporter.activity("diagnosis")
            run.reporter.message("verdict", verdict_line(run, sample))


def schedule_remarks(recipe: ResolvedRecipe) -> Iterator[str]:
    """A remark where a warm-up precedes a schedule that rises by itself."""
    if recipe.warmup and not usual_warmup(recipe.schedule_shape):
        yield (
            f"{spell('schedule', recipe.schedule)} rises by itself, so after {spell('warmup', recipe.warmup)} the "
            "learning rate falls and rises once more; without that warm-up it rises once"
        )


def count_flops(run: Run) -> float:
    """Floating-point operations of the forward pass of one item; a multiply-add counts as two."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), eval_mode(run.model):
        run.model(run.task.blank(run.data, 1, run.task.side(run.data)).to(run.device))
    return counter.get_total_flops()
