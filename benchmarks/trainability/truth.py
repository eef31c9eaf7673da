"""Train every configuration, and grade the outcome.

    python -m benchmarks.trainability.truth --cifar cifar10-jpeg.tar.xz --text tinyshakespeare.txt.xz [--limit N]

One JSON line per configuration as it goes; names that the file holds already are skipped, so it can be interrupted, and
`--part 0/2` and `--part 1/2` share the work between two processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.trainability.configurations import FAMILIES, STEPS, Configuration, configurations
from benchmarks.trainability.tasks import FILES, set_data
from skipway.optim.schedules import set_lr

__all__ = [
    "LEARNT",
    "MARGIN",
    "STEPS",
    "TRUTH",
    "grade",
    "planned_step",
    "read_lines",
    "resume",
    "run_steps",
    "steps_of",
    "train",
    "trainable",
]

WINDOW = 50
"""Steps whose losses are averaged."""
LEARNT, MARGIN = 0.5, 0.2
"""Shares of the way from the best constant answer to a good recipe: learnt from one half on, ambiguous from a fifth."""
HELD = 250
"""Steps for which a goal is held before a training is ended early; one in ten goes on to the end to check that."""
GRACE, TOO_LARGE, IN_A_ROW = 20, 1e3, 5
"""Diverged: the loss is not finite, or above a thousand times its first value in five steps in a row after step 20."""
TRUTH = Path(__file__).with_name("truth.jsonl")
CURVES = 400
"""Steps whose losses are kept one by one."""


def train(configuration: Configuration, *, to_the_end: bool | None = None) -> dict[str, Any]:
    """Train for 1,500 steps, or until the outcome is clear; return the fields of `truth.jsonl` and the "curve".

    `seconds` is processor time of the training alone, which does not depend on other work on the machine.
    """
    model = configuration.build()
    optimizers = configuration.make_optimizers(model)
    if to_the_end is None:
        to_the_end = hashlib.sha256(configuration.name.encode()).digest()[1] % 10 == 0
    return run_steps(configuration, model, planned_step(configuration, optimizers), to_the_end=to_the_end)


def planned_step(configuration: Configuration, optimizers: Sequence[torch.optim.Optimizer]) -> Callable[[int], None]:
    """(step) → it is taken by the optimizers, at the rates that the configuration plans for it."""

    def take_step(step: int) -> None:
        for optimizer in optimizers:
            set_lr(optimizer, configuration.rate_factor(step))
            optimizer.step()

    return take_step


def steps_of(configuration: Configuration, model: nn.Module, take_step: Callable[[int], None]) -> Iterator[Tensor]:
    """Train a model on the task of a configuration, without end; after each step yield the loss from before it."""
    task = configuration.task
    for step, (x, y) in enumerate(task.batches(configuration.seed)):
        loss = task.loss(model(x), y)
        model.zero_grad()
        loss.backward()
        take_step(step)
        yield loss


def run_steps(
    configuration: Configuration, model: nn.Module, take_step: Callable[[int], None], *, to_the_end: bool = False
) -> dict[str, Any]:
    """Train a model on the task of a configuration, by steps on given gradients; return the fields of a training."""
    task = configuration.task
    losses: list[float] = []
    crossed, large, diverged = 0, 0, False
    begin = time.process_time()
    for step, loss in enumerate(steps_of(configuration, model, take_step)):
        losses.append(loss.item())
        large = large + 1 if step > GRACE and losses[-1] > TOO_LARGE * max(losses[0], task.constant()) else 0
        diverged = not math.isfinite(losses[-1]) or large >= IN_A_ROW
        gained = task.gained(recent(losses))
        if not crossed and step >= WINDOW and gained >= LEARNT:
            crossed = step + 1
        held = crossed and step >= max(2 * crossed, crossed + HELD) and not to_the_end
        if diverged or (held and gained >= LEARNT) or step + 1 == STEPS:
            break
    seconds = time.process_time() - begin
    gained = task.gained(recent(losses))
    return {
        "name": configuration.name,
        "family": configuration.family,
        "task": task_name(configuration),
        "outcome": grade(gained, crossed, diverged),
        "gained": round(gained, 3),
        "crossed": crossed,
        "steps": len(losses),
        "constant": round(task.constant(), 4),
        "loss_first": finite(losses[0]),
        "loss_last": finite(recent(losses)),
        "seconds_per_step": round(seconds / len(losses), 5),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "curve": [finite(loss) for loss in losses[:CURVES]],
        "rest": [finite(recent(losses[: stop + WINDOW])) for stop in range(CURVES, len(losses) - WINDOW + 1, WINDOW)],
    }


def task_name(configuration: Configuration) -> str:
    """What it learns."""
    return FAMILIES[configuration.family].task


def recent(losses: Sequence[float]) -> float:
    """Mean of the last losses."""
    last = losses[-WINDOW:]
    return sum(last) / len(last)


def grade(gained: float, crossed: int, diverged: bool) -> str:
    """ "learns" (in the first half of the steps), "late", "marginal", "stuck" or "diverged".

    >>> grade(0.8, 200, False), grade(0.6, 1200, False), grade(0.4, 0, False), grade(-1.0, 0, True)
    ('learns', 'late', 'marginal', 'diverged')
    """
    if diverged or gained <= -0.5:
        return "diverged"
    if gained >= LEARNT:
        return "learns" if crossed <= STEPS // 2 else "late"
    return "marginal" if gained >= MARGIN else "stuck"


def finite(loss: float) -> float | None:
    """Four digits; None for what JSON has no number for."""
    return float(f"{loss:.4g}") if math.isfinite(loss) else None


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file by name, in the order in which they were written; none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def trainable() -> list[Configuration]:
    """The configurations whose data are at hand."""
    needed = {"cifar": "cifar", "text": "text"}
    return [c for c in configurations() if needed.get(task_name(c), "") in {"", *FILES}]


def table(rows: list[dict[str, Any]]) -> str:
    """Family × outcome."""
    grades = ("learns", "late", "marginal", "stuck", "diverged")
    lines = [f"{'family':22}" + "".join(f"{each:>10}" for each in grades) + f"{'ms/step':>10}"]
    for family in (*sorted({row["family"] for row in rows}), "all"):
        chosen = [row for row in rows if family in (row["family"], "all")]
        count = Counter(row["outcome"] for row in chosen)
        mean = 1000 * sum(row["seconds_per_step"] for row in chosen) / max(len(chosen), 1)
        lines.append(f"{family:22}" + "".join(f"{count[each]:10}" for each in grades) + f"{mean:10.1f}")
    return "\n".join(lines)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options that say where the real data are, and which share of the work to do."""
    parser.add_argument("--cifar", type=Path, help="the archive of CIFAR-10 as JPEG images")
    parser.add_argument("--text", type=Path, help="a file of text, .xz or not")
    parser.add_argument("--limit", type=int, help="no more than the first N")
    parser.add_argument("--part", default="0/1", help="the share of the work: 0/2 and 1/2 for two processes")


def chosen_part(options: argparse.Namespace) -> list[Configuration]:
    """The configurations of the options."""
    set_data(options.cifar, options.text)
    number, parts = map(int, options.part.split("/"))
    return trainable()[: options.limit][number::parts]


def resume(
    options: argparse.Namespace, work: Callable[[Configuration], dict[str, Any] | None], out: Path | None = None
) -> None:
    """Append a JSON line for each configuration of the options that the file does not hold yet, where there is one.

    One thread: two threads on tensors this small wait for each other. Denormal numbers are flushed to zero, since
    vanishing signals would otherwise cost a hundred times as much.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    out = options.out if out is None else out
    known = read_lines(out)
    for configuration in chosen_part(options):
        line = None if configuration.name in known else work(configuration)
        if line is not None:
            append_line(out, line)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a JSON line to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_options(parser)
    parser.add_argument("--out", type=Path, default=TRUTH, help="file of the outcomes")
    parser.add_argument("--curves", type=Path, help="file of the losses")
    options = parser.parse_args()

    def work(configuration: Configuration) -> dict[str, Any]:
        row = train(configuration)
        curve = {"name": row["name"], "curve": row.pop("curve"), "rest": row.pop("rest")}
        if options.curves is not None:
            append_line(options.curves, curve)
        return row

    resume(options, work)
    print(table(list(read_lines(options.out).values())))


if __name__ == "__main__":
    main()
