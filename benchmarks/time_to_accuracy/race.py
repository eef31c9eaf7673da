"""The race: each goal by itself, each contestant with the number of epochs that it reaches the goal with."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.time_to_accuracy.contestants import Contestant, take_turns
from skipway.hardware import cpu_count, cpu_name

__all__ = ["environment", "linked_data", "machine", "race"]

PLANS = {0.8: {"skipway": 3, "plain": 5}, 0.9: {"skipway": 12, "plain": 20}}
"""Epochs by goal. Those to 90 % are estimates (benchmarks/time-to-accuracy.md)."""
WIDTHS = {0.8: {"skipway": 64, "plain": 64}, 0.9: {"skipway": 96, "plain": 96}}
"""Channels of the first stage by goal; the second and the third have two and four times as many."""
PLAIN = {"batch_size": 256, "lr": 0.4}
FEW_EPOCHS = 5
"""Of so few, neither contestant shifts its images: that costs 1.5 points after 4 epochs."""


def machine() -> str:
    """What this is measured on."""
    return f"{cpu_name()}, {cpu_count()} cores"


def environment(root: Path, threads: int) -> dict[str, str]:
    """Of the processes; with an empty cache, since reading the images counts."""
    here = Path(__file__).parents[2]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here / "src"), str(here)]),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "SKIPWAY_CACHE": str(root / "cache"),
    }


def linked_data(data: Path, root: Path) -> Path:
    """A folder in which the test images are the validation split."""
    folder = root / "data"
    folder.mkdir()
    for split, name in (("train", "train"), ("val", "test")):
        (folder / split).symlink_to((data / name).resolve(), target_is_directory=True)
    return folder


def planned(given: Namespace, goal: float) -> tuple[dict[str, int], dict[str, int]]:
    """The epochs and the width of each contestant."""

    def with_given(usual: dict[str, int], skipway: int | None, plain: int | None) -> dict[str, int]:
        chosen = {"skipway": skipway, "plain": plain}
        return {**usual, **{name: value for name, value in chosen.items() if value is not None}}

    epochs = with_given(PLANS[goal], given.epochs, given.plain_epochs)
    return epochs, with_given(WIDTHS[goal], given.width, given.plain_width)


def contestants(given: Namespace, goal: float, root: Path) -> list[Contestant]:
    """Both, for one goal."""
    around = environment(root, given.threads)
    plan, widths = planned(given, goal)
    ours = [
        *("-m", "skipway", "train", str(linked_data(given.data, root)), "--holdout", "0.001", "--outside"),
        *("--preset", "fast", "--epochs", str(plan["skipway"]), "--width", str(widths["skipway"]), "--device", "cpu"),
        *("--seed", str(given.seed), "--out", str(root / "ours")),
        *(("--crop", "none") if plan["skipway"] <= FEW_EPOCHS else ()),
    ]
    rows = root / "plain.jsonl"
    values = {"epochs": plan["plain"], "seed": given.seed, "workers": given.threads, "rows": rows, **PLAIN}
    values["width"] = widths["plain"]
    values["shift"] = 0 if plan["plain"] <= FEW_EPOCHS else 4
    options = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    plain = ["-m", "benchmarks.time_to_accuracy", "plain", str(given.data.resolve()), *options]
    return [
        Contestant("skipway", [sys.executable, *ours], root / "ours" / "metrics.jsonl", root / "ours.log", around),
        Contestant("plain", [sys.executable, *plain], rows, root / "plain.log", around),
    ]


def race(given: Namespace) -> dict[str, Any]:
    """All goals, and what came out."""
    until = time.monotonic() + 60 * given.minutes
    goals = {}
    for goal in given.goals:
        with tempfile.TemporaryDirectory() as name:
            both = contestants(given, goal, Path(name))
            take_turns(both, goal, until - time.monotonic())
        ours, plain = (each.time_to(goal) for each in both)
        goals[f"{100 * goal:g} %"] = {
            "skipway": ours and round(ours, 1),
            "plain": plain and round(plain, 1),
            "plain / skipway": ours and plain and round(plain / ours, 2),
            "curves": {each.name: each.results for each in both},
        }
    about = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "threads": given.threads, "seed": given.seed}
    return {
        **about,
        "epochs": {str(goal): planned(given, goal)[0] for goal in given.goals},
        "widths": {str(goal): planned(given, goal)[1] for goal in given.goals},
        "plain": PLAIN,
        "goals": goals,
    }
