"""The first steps of every training, as a diagnosis takes them: on fresh batches, and on parts of one batch.

    python -m benchmarks.trainability.prefixes PREFIXES.jsonl --cifar cifar10-jpeg.tar.xz --text tinyshakespeare.txt.xz

Batches come in another order than in the training. Resumes. `fit` reads the file, which is too large to be kept.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.trainability.configurations import STEPS, Configuration
from benchmarks.trainability.truth import add_data_options, resume
from skipway.diagnosis.batches import Batches
from skipway.diagnosis.odds import CHECKPOINTS
from skipway.diagnosis.settings import settings_of
from skipway.diagnosis.subject import Subject
from skipway.diagnosis.trial import Trial

__all__ = ["OTHER_ORDER", "first_batches", "main", "settings_for", "whole_batch"]

OTHER_ORDER, MOST = 1000, 150
"""Added to the seed, so that other batches are seen than in the training; most trial steps."""


def settings_for(configuration: Configuration, model: torch.nn.Module) -> dict[str, Any]:
    """Arguments of a diagnosis that describe the training."""
    optimizers = configuration.make_optimizers(model)
    return {
        "optimizer": optimizers,
        "schedule": configuration.rate_factor,
        "steps": STEPS,
        "loss": configuration.task.loss,
    }


def first_batches(configuration: Configuration) -> list[tuple[Tensor, Tensor]]:
    """Batches in another order than in the training, as many as the longest trial takes."""
    return list(itertools.islice(configuration.task.batches(configuration.seed + OTHER_ORDER), CHECKPOINTS[-1] + 1))


def whole_batch(configuration: Configuration) -> tuple[Tensor, Tensor]:
    """128 samples, or 64 texts."""
    size = 64 if configuration.task.size == 16 else 128
    taken = first_batches(configuration)[: size // configuration.task.size]
    return torch.cat([x for x, _ in taken]), torch.cat([y for _, y in taken])


def trial_of(configuration: Configuration, fresh: bool) -> Trial:
    """Trial steps of the training on an untrained network, not yet taken."""
    model = configuration.build()
    given = settings_for(configuration, model)
    settings = replace(settings_of(given["optimizer"], model), schedule=given["schedule"], steps=STEPS)
    batches = first_batches(configuration)
    x, y = batches[0] if fresh else whole_batch(configuration)
    subject = Subject(model, x, y, given["loss"], batches=Batches(batches) if fresh else None)
    return Trial(subject, settings)


def recorded(configuration: Configuration, fresh: bool) -> dict[str, Any]:
    """All that the odds see, at each checkpoint."""
    trial = trial_of(configuration, fresh).advance(1)
    for step in itertools.takewhile(lambda step: step <= MOST, CHECKPOINTS):
        trial.advance(step)
        if trial.ended:
            break
    return {
        "losses": list(map(rounded, trial.losses)),
        "information": [None if value is None else rounded(value) for value in trial.information],
        "pauses": [{name: rounded(value) for name, value in asdict(pause).items()} for pause in trial.pauses],
    }


def rounded(value: float) -> float | None:
    """Five digits; None for what JSON has no number for."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def both_modes(configuration: Configuration) -> dict[str, Any]:
    """One line of the file."""
    modes = {"fresh": True, "one batch": False}
    return {"name": configuration.name, **{mode: recorded(configuration, fresh) for mode, fresh in modes.items()}}


def main() -> None:
    """Record what is not yet recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    add_data_options(parser)
    resume(parser.parse_args(), both_modes)


if __name__ == "__main__":
    main()
