"""Ctrl-C and termination: the current step is finished and saved; a second Ctrl-C exits immediately."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopSignal"]


# Slurm sends SIGUSR1 before the time limit of a job, if requested (sbatch --signal)
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]


class StopSignal:
    """Context that records a stop signal for `requested` instead of raising.

    Until `requested` is first called there is nothing to save, and a signal raises KeyboardInterrupt immediately, as a
    second Ctrl-C does. Other signals may arrive twice, from torchrun and from the system; the second changes nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.is_polled = False
        self.earlier: dict[int, Any] = {}

    @property
    def exit_status(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1, as shells count; 0 without a signal."""
        return 0 if self.signal is None else 128 + self.signal

    def requested(self) -> bool:
        """Whether a stop signal has arrived."""
        self.is_polled = True
        return self.signal is not None

    def __enter__(self) -> StopSignal:
        for number in SIGNALS:
            self.earlier[number] = signal.signal(number, self.handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record the signal; raise if there is nothing to save yet, or at the second Ctrl-C."""
        if not self.is_polled or (self.signal is not None and number == signal.SIGINT):
            raise KeyboardInterrupt(number)
        if self.signal is None:
            self.signal = number
            sys.stderr.write("\nfinishing this step, then saving; press Ctrl-C again to exit immediately\n")
            sys.stderr.flush()
