"""Kill a training at random moments and at every named point of a save; resume by the same command; compare.

    python -m benchmarks.faults.kills --count 500

Each case is a process of its own, forked from this one so that torch is imported once, and killed with its whole
process group by SIGKILL. Then the same command is given again, until it ends by itself. The weights have to be those
of the run that nobody disturbed, bit for bit, and so do the metrics but for the times.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from skipway.checkpoint import files as storage
from skipway.checkpoint.files import read_tensors
from skipway.cli import main
from skipway.training.run_folder import RunFolder

__all__ = ["CASES", "Case", "digest", "ended", "forked", "killed_at_point", "killed_at_random", "preload", "run"]

COMMON = ("--epochs", "2", "--batch-size", "128", "--device", "cpu", "--precision", "float32", "--quiet", "--resume")
CASES = {
    "resnet": ("--model", "resnet20", "--depth", "8", "--width", "4", "--scheme", "skipinit + stochasticdepth(0.5)"),
    "vit": (
        *("--model", "vit-tiny-16", "--depth", "1", "--width", "24"),
        *("--size", "16", "--optimizer", "adamw", "--ema", "0.9"),
    ),
    "convnext": ("--model", "convnext-atto", "--depth", "4", "--width", "4", "--size", "32", "--accumulate", "2"),
    "gpt": (*("--model", "gpt-nano", "--depth", "1", "--width", "12", "--context", "16"), "--split-by", "parts"),
    "swin": ("--model", "swin-tiny", "--depth", "8", "--width", "12", "--size", "32", "--clip", "norm(1.0)"),
}
SAVE_EVERY = 4
Case = tuple[str, ...]


def preload() -> None:
    """Import what a training imports on its way, so that forked processes have it: 0.3 s a run instead of 2.8 s."""
    for name in (
        *("torch._dynamo", "skipway.training.loop", "skipway.training.cross_validation", "skipway.diagnosis"),
        *("skipway.diagnosis.diagnosis", "skipway.report.run.page", "skipway.cli.app", "skipway.cli.train"),
        *("skipway.cli.progress", "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PngImagePlugin"),
        *("PIL.BmpImagePlugin", "PIL.PpmImagePlugin"),
    ):
        import_module(name)


def command(case: str, out: Path) -> Case:
    """The one command that starts and continues a run."""
    return ("train", *CASES[case], *COMMON, "--save-every", str(SAVE_EVERY), "--out", str(out))


def forked(arguments: Sequence[str], prepare: Callable[[], None] = lambda: None) -> int:
    """Start a command in a process of its own; returns its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    os.setpgrp()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    status = 70
    try:
        prepare()
        status = main(list(arguments))
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Wait for a process: its exit status, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    """SIGKILL for a process and all that it started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)


def digest(out: Path) -> str:
    """A hash of what a run came to: last and best weights, and its metrics without times."""
    folder = RunFolder(out)
    found = hashlib.sha256()
    for path in (folder.last, folder.best):
        for name, tensor in sorted(read_tensors(path)[0].items()):
            found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    for row in [*folder.read_metrics(), *folder.read_steps()]:
        kept = {
            name: value
            for name, value in row.items()
            if name not in ("seconds", "images_per_second", "tokens_per_second")
        }
        found.update(json.dumps(kept, sort_keys=True).encode())
    return found.hexdigest()


def resumed(case: str, out: Path, tries: int = 3) -> bool:
    """Give the command again until it ends by itself, which it has to do the first time."""
    return ended(forked(command(case, out))) == 0


def killed_at_random(case: str, out: Path, seconds: float, draw: random.Random) -> None:
    """Start, and kill after a random share of the time that a run takes."""
    pid = forked(command(case, out))
    time.sleep(draw.uniform(0.0, seconds))
    kill(pid)
    ended(pid)


def points_of(case: str, root: Path) -> list[str]:
    """The named points that a save passes, in order, as one run of the case reports them."""
    log = root / "points.txt"

    def note() -> None:
        storage.fault_point = lambda point: log.open("a").write(point + "\n")  # type: ignore[assignment]

    ended(forked(command(case, root / "points"), note))
    return list(dict.fromkeys(log.read_text().splitlines()))


def killed_at_point(case: str, out: Path, point: str, time_around: int = 2) -> None:
    """Kill itself at the nth passing of a named point."""

    def arm() -> None:
        left = [time_around]

        def reached(name: str) -> None:
            left[0] -= name == point
            if name == point and left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        storage.fault_point = reached  # type: ignore[assignment]

    ended(forked(command(case, out), arm))


def run(cases: Sequence[str], count: int, seed: int, at_points: bool = True) -> dict[str, int]:
    """All of it: how many kills there were, and how many ended in the same bits."""
    draw = random.Random(seed)
    told = {"kills": 0, "resumed": 0, "equal": 0}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for number, case in enumerate(cases):
            whole = root / f"{case}-whole"
            start = time.monotonic()
            assert ended(forked(command(case, whole))) == 0, f"{case}: the undisturbed run failed"
            seconds, expected = time.monotonic() - start, digest(whole)
            share = count // len(cases) + (number < count % len(cases))
            kills: list[Callable[[Path], None]] = [
                lambda out, case=case, seconds=seconds: killed_at_random(case, out, seconds, draw) for _ in range(share)
            ]
            if at_points and number == 0:
                kills += [
                    lambda out, case=case, point=point: killed_at_point(case, out, point)
                    for point in points_of(case, root)
                ]
            for turn, disturb in enumerate(kills):
                out = root / f"{case}-{turn}"
                disturb(out)
                told["kills"] += 1
                told["resumed"] += (fine := resumed(case, out))
                told["equal"] += fine and digest(out) == expected
                shutil.rmtree(out, ignore_errors=True)
    return told


def start() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    preload()
    print(json.dumps(run(given.cases, given.count, given.seed)))


if __name__ == "__main__":
    start()
