"""The race: each goal by itself, each contestant with the number of epochs that it reaches the goal with."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.time_to_accuracy.contestants import Contestant, take_turns
from skipway.hardware import cpu_count, cpu_name

__all__ = ["PLANS", "Plan", "environment", "linked_data", "machine", "race"]


class Plan(NamedTuple):
    """What a contestant trains to a goal.

    Args:
        network: of `skipway train --model`, or of the plain script.
        epochs: of its one cycle.
        width: channels of the first stage; the second and the third have two and four times as many.
    """

    network: str
    epochs: int
    width: int = 64


PLANS: dict[float, dict[str, Plan]] = {
    0.8: {"skipway": Plan("resnet-patch8", 3), "plain": Plan("strided", 5)},
    0.9: {"skipway": Plan("resnet-pool11", 26), "plain": Plan("pooled", 26)},
}
"""By goal. To 90 % the plain script's is the one that got there; ours, which ended at 89.8 % with 22 epochs, is an
estimate (benchmarks/time-to-accuracy.md).
"""
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


def planned(given: Namespace, goal: float) -> dict[str, Plan]:
    """The plan of each contestant, with what the command changes of it."""

    def changed(plan: Plan, **values: int | str | None) -> Plan:
        return plan._replace(**{name: value for name, value in values.items() if value is not None})

    usual = PLANS[goal]
    return {
        "skipway": changed(usual["skipway"], network=given.model, epochs=given.epochs, width=given.width),
        "plain": changed(
            usual["plain"], network=given.plain_network, epochs=given.plain_epochs, width=given.plain_width
        ),
    }


def contestants(given: Namespace, goal: float, root: Path) -> list[Contestant]:
    """Both, for one goal."""
    around = environment(root, given.threads)
    plan, other = planned(given, goal).values()
    ours = [
        *("-m", "skipway", "train", str(linked_data(given.data, root)), "--holdout", "0.001", "--outside"),
        *("--preset", "fast", "--model", plan.network, "--epochs", str(plan.epochs), "--width", str(plan.width)),
        *("--device", "cpu", "--seed", str(given.seed), "--out", str(root / "ours")),
        *(("--crop", "none") if plan.epochs <= FEW_EPOCHS else ()),
    ]
    rows = root / "plain.jsonl"
    values = {"seed": given.seed, "workers": given.threads, "rows": rows, **PLAIN, **other._asdict()}
    values["shift"] = 0 if other.epochs <= FEW_EPOCHS else 4
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
        "plans": {
            str(goal): {name: plan._asdict() for name, plan in planned(given, goal).items()} for goal in given.goals
        },
        "plain": PLAIN,
        "goals": goals,
    }
