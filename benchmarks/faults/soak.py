"""Kill a training again and again until it is done; compare it with the one that nobody disturbed.

    python -m benchmarks.faults.soak --minutes 60 --mean-seconds 60

The training is made as long as is asked for, and begins once without disturbance and once with a punisher: SIGKILL for
the whole process group after times that are drawn from an exponential distribution. After each kill the same command
is given again. What counts: the share of the undisturbed run's speed that is left, and equal bits at the end. Every
start is a new interpreter, which loads torch anew; with --forked it is a fork of this one, which has it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.kills import digest, ended, forked, kill, preload

__all__ = ["soak"]

SAVE_SECONDS = 2.0
CALIBRATION_EPOCHS = 20
MOST_KILLS = 10_000
Begin = Callable[[list[str]], int]


def command(out: Path, epochs: int, save_every: int) -> list[str]:
    """The one command that starts and continues a run; its digits take a fraction of a second per epoch."""
    return [
        *("train", "--out", str(out), "--resume", "--quiet", "--device", "cpu", "--precision", "float32"),
        *("--epochs", str(epochs), "--batch-size", "128", "--save-every", str(save_every), "--ema", "0.99"),
        *("--model", "resnet20", "--depth", "14", "--width", "8", "--scheme", "skipinit + stochasticdepth(0.5)"),
        *("--augment", "erasing"),
    ]


def fresh(arguments: list[str]) -> int:
    """Start a command in a new interpreter, in a process group of its own; returns its number."""
    command = [sys.executable, "-m", "skipway", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    process.returncode = 0  # `ended` waits for it, not this object
    return process.pid


def timed(begin: Begin, arguments: list[str]) -> float:
    """Seconds that a command takes that has to end well."""
    began = time.monotonic()
    assert ended(begin(arguments)) == 0, "an undisturbed run failed"
    return time.monotonic() - began


def waited(pid: int, seconds: float) -> int | None:
    """The exit status of a process that ends within so many seconds, else None, and it runs on."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(0.02, seconds))
    return None


def punished(begin: Begin, arguments: list[str], mean: float, draw: random.Random) -> tuple[int, float]:
    """Give the command, kill it, give it again, until it is done: how many kills, and how long it took in all."""
    began, kills = time.monotonic(), 0
    while kills < MOST_KILLS:
        pid = begin(arguments)
        status = waited(pid, draw.expovariate(1 / mean))
        if status is not None:
            assert status == 0, f"the run ended with status {status} after {kills} kills"
            return kills, time.monotonic() - began
        kill(pid)
        ended(pid)
        kills += 1
    raise AssertionError("the run makes no progress")


def soak(begin: Begin, minutes: float, mean: float, seed: int) -> dict[str, object]:
    """Calibrate, run undisturbed, run punished; each of the latter takes about `minutes`."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        least = timed(begin, command(root / "short", 1, 1000))
        per_epoch = (timed(begin, command(root / "long", 1 + CALIBRATION_EPOCHS, 1000)) - least) / CALIBRATION_EPOCHS
        # of 1,437 digits, batches of 128 make 11 steps; every epoch saves, so a step count within it adds little
        steps = 11
        save_every = max(1, round(SAVE_SECONDS / (per_epoch / steps)))
        epochs = max(2, round(60 * minutes / per_epoch))
        whole = timed(begin, command(root / "whole", epochs, save_every))
        kills, disturbed = punished(begin, command(root / "punished", epochs, save_every), mean, random.Random(seed))
        return {
            "epochs": epochs,
            "mean_seconds_between_kills": mean,
            "kills": kills,
            "undisturbed_seconds": round(whole, 1),
            "disturbed_seconds": round(disturbed, 1),
            "progress_share": round(whole / disturbed, 3),
            "equal": digest(root / "punished") == digest(root / "whole"),
        }


def start() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the undisturbed run [60]")
    parser.add_argument("--mean-seconds", type=float, default=60.0, help="between kills, on average [60]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills [0]")
    parser.add_argument("--forked", action="store_true", help="start from here, with torch loaded")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    preload()
    print(json.dumps(soak(forked if given.forked else fresh, given.minutes, given.mean_seconds, given.seed)))
    sys.stdout.flush()


if __name__ == "__main__":
    start()
