"""Ctrl-C and termination: the step is finished and saved; asked a second time, the program ends at once."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Stopping"]


class Stopping:
    """While it is entered, an interruption is remembered for `requested` to tell.

    Until `requested` is asked for the first time there is nothing to save, and an interruption ends the program as
    usual.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.watched = False
        self.earlier: dict[int, Any] = {}

    @property
    def exit_status(self) -> int:
        """130 after Ctrl-C, 143 after a termination signal, as shells count; 0 if nothing came."""
        return 0 if self.signal is None else 128 + self.signal

    def requested(self) -> bool:
        """Whether the program has been asked to stop."""
        self.watched = True
        return self.signal is not None

    def __enter__(self) -> Stopping:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.earlier[number] = signal.signal(number, self.handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal; end at once if there is nothing to save or it is the second."""
        if not self.watched or self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        sys.stderr.write("\nfinishing this step, then saving; once more to end at once\n")
        sys.stderr.flush()
