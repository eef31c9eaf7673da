"""Diagnose every held-out network before training: verdict, odds at each checkpoint, cost, and what its rules say.

    python -m benchmarks.trainability.measurements --cifar cifar10-jpeg.tar.xz --text tinyshakespeare.txt.xz   # resumes

Batches come in another order than in the training. A line of measurements.jsonl next to this file for each
configuration, with a loader of fresh batches and with one batch. Cost is processor time over that of 1,500 steps, whose
mean is measured beside; looks beyond the allowance are taken afterwards, for the curve of accuracy over cost.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import skipway as sw
from benchmarks.trainability.configurations import STEPS, Configuration
from benchmarks.trainability.prefixes import MOST, first_batches, settings_for, trial_of, whole_batch
from benchmarks.trainability.truth import add_data_options, resume
from skipway.diagnosis.odds import CHECKPOINTS, odds

__all__ = ["MEASUREMENTS", "main"]

MEASUREMENTS = Path(__file__).with_name("measurements.jsonl")
TIMED = 20
"""Steps of the training that are timed."""


def step_seconds(configuration: Configuration) -> float:
    """Processor time of a step of the training."""
    model = configuration.build()
    optimizers = configuration.make_optimizers(model)
    begin = 0.0
    for number, (x, y) in enumerate(first_batches(configuration)[: TIMED + 3]):
        if number == 3:
            begin = time.process_time()
        configuration.task.loss(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return (time.process_time() - begin) / TIMED


def measured(configuration: Configuration, fresh: bool, training: float) -> dict[str, Any]:
    """Verdict, odds and cost of a diagnosis, and the odds and the cost of further looks."""
    model = configuration.build()
    given = settings_for(configuration, model)
    batches = first_batches(configuration)
    begin = time.process_time()
    x, y = (batches, None) if fresh else whole_batch(configuration)
    diagnosis = sw.diagnose(model, x, targets=y, **given)
    seconds = time.process_time() - begin
    steps = 0 if diagnosis.measurement.ahead is None else len(diagnosis.measurement.ahead.losses)
    looks, spent = [], 0.0
    trial = trial_of(configuration, fresh).advance(1)
    for checkpoint in CHECKPOINTS:
        if checkpoint > MOST or trial.ended:
            break
        begin = time.process_time()
        trial.advance(checkpoint)
        chance = odds(trial.first_steps())
        spent += time.process_time() - begin
        looks.append([len(trial.losses), round(chance, 4), spent])
    own = next((each[2] for each in looks if each[0] >= steps), spent)
    beside = max(seconds - own, 0.0)
    return {
        "verdict": diagnosis.verdict,
        "odds": round(diagnosis.odds, 4),
        "steps": steps,
        "share": round(seconds / training, 5),
        "beside": round(beside / training, 5),
        "rules": [finding.rule for finding in diagnosis.findings if finding.level != "note"],
        "looks": [[count, chance, round((each + beside) / training, 5)] for count, chance, each in looks],
    }


def both_modes(configuration: Configuration) -> dict[str, Any] | None:
    """One line of the file; None where the configuration is not held out."""
    if not configuration.held_out:
        return None
    training = STEPS * step_seconds(configuration)
    modes = {"fresh": True, "one batch": False}
    line = {mode: measured(configuration, fresh, training) for mode, fresh in modes.items()}
    return {"name": configuration.name, **line}


def main() -> None:
    """Measure what is not yet measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_options(parser)
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)
    resume(parser.parse_args(), both_modes)


if __name__ == "__main__":
    main()
