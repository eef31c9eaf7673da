"""A training that is raced: a process that runs only in its turns, and a clock that runs only then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Contestant", "take_turns"]

POLL_SECONDS = 0.02


@dataclass
class Contestant:
    """A training in a process group of its own that runs only in its turns.

    Args:
        name: for the table.
        command: what to start.
        rows: the file that gets a line of JSON for each epoch.
        log: where its output goes.
        environment: of the command.
        metric: what the lines are read for.
        seconds: that it has run so far.
        results: (seconds, metric) at the end of each epoch.
    """

    name: str
    command: list[str]
    rows: Path
    log: Path
    environment: dict[str, str]
    metric: str = "validation_accuracy"
    seconds: float = 0.0
    results: list[tuple[float, float]] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    def turn(self, most: float) -> bool:
        """Run until an epoch is done, for so many seconds at most; False once it has ended or time is up."""
        began = time.monotonic()
        if self.process is None:
            log = self.log.open("wb")
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        else:
            os.killpg(self.process.pid, signal.SIGCONT)
        ended = late = False
        while len(found := self.read()) == len(self.results) and not ended and not late:
            time.sleep(POLL_SECONDS)
            ended, late = self.process.poll() is not None, time.monotonic() - began > most
        if not ended:
            os.killpg(self.process.pid, signal.SIGSTOP)
        self.seconds += time.monotonic() - began
        if len(found) > len(self.results):
            self.results.append((self.seconds, found[-1][self.metric]))
            print(
                f"{self.name:14} {len(self.results):3}  {self.seconds:8.1f} s  {self.metric} {self.results[-1][1]:.4f}"
            )
            sys.stdout.flush()
            return True
        if ended and self.process.returncode:
            raise SystemExit(f"{self.name} failed:\n{self.log.read_text()[-2000:]}")
        return False

    def read(self) -> list[dict[str, Any]]:
        """The complete lines so far."""
        if not self.rows.exists():
            return []
        return [json.loads(line) for line in self.rows.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def end(self) -> None:
        """Kill it and all that it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def time_to(self, goal: float) -> float | None:
        """Seconds until the first epoch that ends with this accuracy."""
        return next((seconds for seconds, accuracy in self.results if accuracy >= goal), None)

    def reached(self, goal: float) -> bool:
        """Whether there was one."""
        return self.time_to(goal) is not None


def take_turns(contestants: list[Contestant], goal: float, seconds: float) -> None:
    """Run all, epoch by epoch in turns, until each has reached the goal or ended, for so many seconds at most."""
    until = time.monotonic() + seconds
    running = list(contestants)
    try:
        while running and time.monotonic() < until:
            for each in list(running):
                left = until - time.monotonic()
                if left <= 0 or not each.turn(left) or each.reached(goal):
                    running.remove(each)
    finally:
        for each in contestants:
            each.end()
