"""Interrupt a training in each of its phases; see how it ends; resume by the same command; compare.

    python -m benchmarks.faults.signals

SIGINT, SIGTERM and SIGUSR1 are raised from inside a phase; with --rotate one of them in each phase, in turn, and all
three in a save. Each case is a process of its own, forked from this one so that torch is imported once. Prints one JSON
object per case, and a line that counts them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.faults.kills import digest, ended, forked, preload

__all__ = ["PHASES", "SIGNALS", "images", "run"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
CLASSES, EACH = 3, 40
Act = Callable[[], object]


def images(root: Path) -> Path:
    """A folder of small images, so that there is something to read."""
    draw = np.random.default_rng(0)
    for kind, number in itertools.product(range(CLASSES), range(EACH)):
        place = root / f"class{kind}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 128, (16, 16, 3), dtype=np.uint8) + np.uint8(40 * kind)
        Image.fromarray(pixels).save(place / f"{number:03}.png")
    return root


def command(data: Path, out: Path) -> list[str]:
    """The one command that starts and continues a run: two epochs of five steps, a checkpoint every second step."""
    return [
        *("train", str(data), "--out", str(out), "--resume", "--quiet", "--device", "cpu", "--precision", "float32"),
        *("--epochs", "2", "--batch-size", "16", "--save-every", "2", "--workers", "0", "--ema", "0.9"),
        *("--depth", "8", "--width", "4", "--scheme", "skipinit + stochasticdepth(0.5)"),
    ]


def act_at(owner: Any, name: str, number: int, act: Act, wanted: Callable[..., bool] = lambda *given: True) -> None:
    """Put a function in the place of `owner.name` that acts before its nth call with `wanted` arguments."""
    call, left = getattr(owner, name), itertools.count(1)

    @wraps(call)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        if wanted(*arguments) and next(left) == number:
            act()
        return call(*arguments, **options)

    setattr(owner, name, wrapped)


def in_reading(act: Act) -> None:
    """While the images are read for the first time, when half of them are."""
    from skipway.data.inspection import InspectTask

    act_at(InspectTask, "__call__", CLASSES * EACH // 2, act)


def in_batch(act: Act) -> None:
    """While a batch of the second epoch is made."""
    from skipway.data.batches import BatchTransform

    act_at(BatchTransform, "__call__", 8, act)


def in_forward(act: Act) -> None:
    """In the forward pass of the eighth step."""
    from skipway.training import step

    act_at(step, "backward", 8, lambda: act_inside(act))


def in_evaluation(act: Act) -> None:
    """In the forward pass on the first validation images."""
    from skipway.training import image_task

    act_at(image_task, "evaluate", 1, lambda: act_inside(act))


def act_inside(act: Act) -> None:
    """Act when a network reaches its next linear layer, which is its classifier."""
    from torch import nn

    act_at(nn.Linear, "forward", 1, act)


def in_save(act: Act) -> None:
    """In the middle of a file of the second checkpoint."""
    from skipway.checkpoint import files as storage

    act_at(storage, "fault_point", 6, act, lambda point: point == "file half written")


def in_test(act: Act) -> None:
    """In the forward pass on the first test images, after the validations of both epochs."""
    from skipway.training import image_task

    act_at(image_task, "evaluate", 3, lambda: act_inside(act))


def in_report(act: Act) -> None:
    """Before the report's network is loaded."""
    from skipway.report.run import page

    act_at(page, "from_pretrained", 1, act)


def in_page(act: Act) -> None:
    """While the page of the report is put together."""
    from skipway.report.run import page

    act_at(page, "training_figures", 1, act)


PHASES: dict[str, Callable[[Act], None]] = {
    "data": in_reading,
    "batch": in_batch,
    "forward": in_forward,
    "evaluation": in_evaluation,
    "save": in_save,
    "test": in_test,
    "report": in_report,
    "page": in_page,
}


def interrupted(data: Path, out: Path, phase: str, number: int, clock: Path) -> tuple[int, float]:
    """Run until the signal ends it: the exit status, and how many seconds after the signal."""

    def send() -> None:
        clock.write_text(str(time.monotonic()))
        os.kill(os.getpid(), number)

    def arm() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        PHASES[phase](send)

    status = ended(forked(command(data, out), arm))
    return status, time.monotonic() - float(clock.read_text())


def cases_of(phases: list[str], rotate: bool) -> list[tuple[str, int]]:
    """The phases with the signals that come in them."""
    every = list(itertools.product(phases, SIGNALS))
    turns = {(phase, SIGNALS[number % len(SIGNALS)]) for number, phase in enumerate(phases)}
    return [case for case in every if not rotate or case[0] == "save" or case in turns]


def run(cases: list[tuple[str, int]]) -> Iterator[dict[str, object]]:
    """All cases, one after the other."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data, whole = images(root / "images"), root / "whole"
        assert ended(forked(command(data, whole))) == 0, "the undisturbed run failed"
        expected = digest(whole)
        for phase, number in cases:
            out = root / f"{phase}-{number}"
            status, seconds = interrupted(data, out, phase, number, root / "clock")
            resumed = ended(forked(command(data, out)))
            left = [str(entry.relative_to(out)) for entry in out.rglob(".*")]
            yield {
                "phase": phase,
                "signal": signal.Signals(number).name,
                "status": status,
                "documented": 128 + number,
                "seconds": round(seconds, 3),
                "resumed": resumed,
                "equal": resumed == 0 and digest(out) == expected,
                "report": (out / "report.html").exists(),
                "left": left,
            }


def start() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=list(PHASES))
    parser.add_argument("--rotate", action="store_true")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    preload()
    told = []
    for case in run(cases_of(given.phases, given.rotate)):
        print(json.dumps(case))
        sys.stdout.flush()
        told.append(case["status"] == case["documented"] and case["equal"] and case["report"] and not case["left"])
    print(json.dumps({"cases": len(told), "as documented, resumed and equal": sum(map(bool, told))}))


if __name__ == "__main__":
    start()
