"""What is said before the first step: what was found, what will be trained, and whether it looks as if it will."""

from __future__ import annotations

import time
from typing import Any

import torch

from skipway.data import Batch
from skipway.errors import SkipwayError
from skipway.probes.signal_check import check_signal
from skipway.report.summary import data_lines, model_lines, signal_lines
from skipway.tracing.chain import chain
from skipway.training.run import Run

__all__ = ["introduce"]

# images that the untrained network is diagnosed on
DIAGNOSED = 32
# what a diagnosis costs in forward passes of its batch, about, and how long it may take
DIAGNOSIS_COST, DIAGNOSIS_SECONDS = 40, 4.0


def introduce(run: Run, reason: str, stored: dict[str, Any] | None) -> None:
    """Say what was found and what will be done, and whether the network looks as if it will train."""
    if run.screen.quiet:
        return
    for line in data_lines(run.data):
        run.screen.say(*line)
    # a network that is spread runs only in all processes together, and this is said in the first
    flops = flops_of(run) if run.recipe.sharding == "none" or run.ranks.world == 1 else 0.0
    for line in model_lines(run.model, run.recipe, len(chain(run.model)), run.steps, flops):
        run.screen.say(*line)
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    reason = reason if stored is None else "as before"
    many = f", {run.ranks.world} processes" if run.ranks.world > 1 else ""
    run.screen.say(
        "device", f"{run.device}, {name}, {run.recipe.precision} ({reason}), torch {torch.__version__}{many}"
    )
    if stored is not None:
        run.screen.say("resume", f"after epoch {run.position.epoch}, step {run.position.step}")
        earlier = stored["recipe"]["epochs"]
        if earlier != run.recipe.epochs:
            run.screen.say("note", f"{earlier} epochs were planned: the schedule now spans all {run.recipe.epochs}")
        return
    if run.ranks.world == 1:
        sample = run.data.sample(DIAGNOSED, seed=run.recipe.seed, device=run.device)
        start = time.monotonic()
        for line in signal_lines(check_signal(run.model, sample.inputs)):
            run.screen.say(*line)
        if (time.monotonic() - start) * DIAGNOSIS_COST < DIAGNOSIS_SECONDS:
            run.screen.say("verdict", verdict_text(run, sample))


def flops_of(run: Run) -> float:
    """Floating-point operations of one image's forward pass, two for each multiplication with addition."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    side = run.data.size
    was = run.model.training
    with counter, torch.no_grad():
        run.model.eval()(torch.zeros(1, run.data.channels, side, side, device=run.device))
    run.model.train(was)
    return counter.get_total_flops()


def verdict_text(run: Run, sample: Batch) -> str:
    """What a diagnosis of the untrained network says, in a line; right in 84 % of cases, it never stops a run."""
    from skipway.diagnosis import diagnose
    from skipway.diagnosis.settings import OPTIMIZERS

    name = run.recipe.optimizer.partition("(")[0]
    if name not in OPTIMIZERS:
        return f"none: a diagnosis knows {', '.join(OPTIMIZERS)}"
    steps = run.recipe.epochs * run.steps
    try:
        found = diagnose(
            run.model,
            sample.inputs,
            targets=sample.labels,
            optimizer=name,
            lr=run.recipe.peak_lr,
            weight_decay=run.recipe.decay,
            warmup=round(run.recipe.warmup * steps),
            steps=steps,
            seed=run.recipe.seed,
        )
    except SkipwayError as error:  # fewer images than a diagnosis needs, say
        return f"none: {error}"
    conditions = f": {'; '.join(found.conditions)}" if found.conditions else ""
    causes = ", ".join(finding.rule for finding in found.findings)
    return f"{found.verdict}{conditions}{f' ({causes})' if causes else ''}; more: skipway diagnose --help"
