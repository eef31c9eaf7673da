"""Ctrl-C and termination: the step is finished and saved; at a second Ctrl-C the program ends at once."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Stopping"]


# Slurm sends SIGUSR1 before the time of a job ends, if it is asked to (sbatch --signal)
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]


class Stopping:
    """While it is entered, an interruption is remembered for `requested` to tell.

    Until `requested` is asked for the first time there is nothing to save, and an interruption ends the program at
    once, as a second Ctrl-C does. Other signals may come twice, from torchrun and from the system, and mean the same.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.watched = False
        self.earlier: dict[int, Any] = {}

    @property
    def exit_status(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1, as shells count; 0 if nothing came."""
        return 0 if self.signal is None else 128 + self.signal

    def requested(self) -> bool:
        """Whether the program has been asked to stop."""
        self.watched = True
        return self.signal is not None

    def __enter__(self) -> Stopping:
        for number in SIGNALS:
            self.earlier[number] = signal.signal(number, self.handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal; end at once if there is nothing to save, or at the second Ctrl-C."""
        if not self.watched or (self.signal is not None and number == signal.SIGINT):
            raise KeyboardInterrupt(number)
        if self.signal is None:
            self.signal = number
            sys.stderr.write("\nfinishing this step, then saving; Ctrl-C to end at once\n")
            sys.stderr.flush()
