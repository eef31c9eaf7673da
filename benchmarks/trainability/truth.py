"""Train every configuration on the embedded digits, and record the outcome.

    python -m benchmarks.trainability.truth [--limit N] [--out FILE]

One JSON line per configuration as it goes; names that the file holds already are skipped, so it can be interrupted.
One thread, one process: two threads on tensors this small wait for each other.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.trainability.configurations import Configuration, configurations
from skipway.data import load

__all__ = ["BATCH", "STEPS", "TRUTH", "batches", "read_truth", "train", "training_images"]

STEPS, BATCH = 300, 64
WINDOW, REACHED = 20, 0.6
"""Reached: a mean training accuracy of 0.6 over 20 batches. Chance is 0.1."""
GRACE, TOO_LARGE, IN_A_ROW = 20, 1e3, 5
"""Diverged: the loss is not finite, or above 1e3 in five steps in a row after step 20."""
TRUTH = Path(__file__).with_name("truth.jsonl")


def training_images() -> tuple[Tensor, Tensor]:
    """The 1,438 digits that are not test images: (N, 1, 8, 8) of mean 0 and standard deviation 1, labels (N,)."""
    train = load(validation=0.0).train
    images = train.images.permute(0, 3, 1, 2).float()
    return (images - images.mean()) / images.std(), train.labels


def batches(images: Tensor, labels: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Full batches without end, in a new order each pass; the incomplete last batch of a pass is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield images[chosen], labels[chosen]


def train(configuration: Configuration, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Train for 300 steps, or until the outcome is clear; return the fields of `truth.jsonl`.

    `seconds` is processor time of the training alone, which does not depend on other work on the machine.
    """
    model = configuration.build()
    optimizer = configuration.make_optimizer(model)
    losses: list[float] = []
    hits: deque[float] = deque(maxlen=WINDOW)
    outcome, large = "stuck", 0
    begin = time.process_time()
    for step, (x, y) in enumerate(batches(images, labels, configuration.seed), 1):
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        hits.append((logits.detach().argmax(1) == y).float().mean().item())
        large = large + 1 if step > GRACE and losses[-1] > TOO_LARGE else 0
        if not math.isfinite(losses[-1]) or large >= IN_A_ROW:
            outcome = "diverged"
        elif len(hits) == WINDOW and sum(hits) / WINDOW >= REACHED:
            outcome = "reached"
        if outcome != "stuck" or step == STEPS:
            break
    seconds = time.process_time() - begin
    return {
        "name": configuration.name,
        **asdict(configuration),
        "outcome": outcome,
        "steps": len(losses),
        "accuracy": round(sum(hits) / len(hits), 4),
        "loss_first": finite(losses[0]),
        "loss_last": finite(losses[-1]),
        "seconds": round(seconds, 2),
        "seconds_per_step": round(seconds / len(losses), 5),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def finite(loss: float) -> float | None:
    """Four digits; None for what JSON has no number for."""
    return float(f"{loss:.4g}") if math.isfinite(loss) else None


def read_truth(path: Path = TRUTH) -> list[dict[str, Any]]:
    """The lines of the file, in the order they were trained in; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(rows: list[dict[str, Any]]) -> str:
    """Family × outcome."""
    lines = [f"{'family':22}{'reached':>9}{'diverged':>9}{'stuck':>9}{'seconds':>9}"]
    for family in (*dict.fromkeys(sorted(row["family"] for row in rows)), "all"):
        chosen = [row for row in rows if family in (row["family"], "all")]
        count = Counter(row["outcome"] for row in chosen)
        mean = sum(row["seconds"] for row in chosen) / max(len(chosen), 1)
        lines.append(f"{family:22}{count['reached']:9}{count['diverged']:9}{count['stuck']:9}{mean:9.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="train no more than the first N")
    parser.add_argument("--out", type=Path, default=TRUTH, help="file of the outcomes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # vanishing signals would otherwise cost a hundred times as much
    images, labels = training_images()
    known = {row["name"] for row in read_truth(arguments.out)}
    for configuration in configurations()[: arguments.limit]:
        if configuration.name in known:
            continue
        row = train(configuration, images, labels)
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(table(read_truth(arguments.out)))


if __name__ == "__main__":
    main()
