"""Diagnose every untrained configuration: the verdict, and the indicators on which it rests.

    python -m benchmarks.trainability.measurements      # resumes: names that the file holds already are skipped

The 128 images are drawn in another order than in training. Appends a line for each configuration to
measurements.jsonl next to this file.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.trainability.configurations import Configuration, configurations
from benchmarks.trainability.truth import BATCH, STEPS, batches, training_images
from skipway.diagnosis.diagnosis import examine
from skipway.diagnosis.indicators import read_indicators
from skipway.diagnosis.settings import Settings
from skipway.diagnosis.subject import Subject

__all__ = ["IMAGES", "main", "measured", "read_measurements", "settings_for"]

FILE = Path(__file__).with_name("measurements.jsonl")
IMAGES = 128
OTHER_ORDER = 1000
"""Added to the seed, so that the diagnosis does not see the first images of the training."""


def settings_for(configuration: Configuration) -> Settings:
    """Settings of the training that the diagnosis is asked about."""
    return Settings(
        optimizer=configuration.optimizer,
        lr=configuration.lr,
        steps=STEPS,
        exact=lambda model, lr: configuration.make_optimizer(model),
    )


def subject_for(configuration: Configuration, images: torch.Tensor, labels: torch.Tensor) -> Subject:
    """The untrained network with its batch."""
    stream = batches(images, labels, configuration.seed + OTHER_ORDER)
    pairs = [next(stream) for _ in range(-(-IMAGES // BATCH))]
    shown = torch.cat([pair[0] for pair in pairs])[:IMAGES]
    return Subject(configuration.build(), shown, torch.cat([pair[1] for pair in pairs])[:IMAGES])


def measured(configuration: Configuration, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """One line of the file."""
    subject = subject_for(configuration, images, labels)
    settings = settings_for(configuration)
    start = time.process_time()
    diagnosis = examine(subject, settings)
    seconds = time.process_time() - start
    measured = diagnosis.measurement
    indicators = {name: float(f"{value:.6g}") for name, value in asdict(read_indicators(measured, settings)).items()}
    return {
        "name": configuration.name,
        "verdict": diagnosis.verdict,
        "rules": [finding.rule for finding in diagnosis.findings if finding.level != "note"],
        **indicators,
        "passes": round(measured.passes, 2),
        "seconds": round(seconds, 3),
    }


def read_measurements() -> dict[str, dict[str, Any]]:
    """The lines of the file, by name."""
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def main() -> None:
    """Measure what is not yet measured."""
    torch.set_num_threads(1)
    images, labels = training_images()
    done = read_measurements()
    with FILE.open("a", encoding="utf-8") as file:
        for configuration in configurations():
            if configuration.name not in done:
                file.write(json.dumps(measured(configuration, images, labels)) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
