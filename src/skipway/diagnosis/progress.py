"""Progress of a diagnosis on a terminal: the share of the passes that are done, and the time that is left."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

__all__ = ["PassCounter"]

QUIET = 2.0
"""Seconds before the first line: most diagnoses are done by then."""
INTERVAL = 0.5
"""Seconds between two lines."""


@dataclass
class PassCounter:
    """A line on a terminal that says how far a diagnosis is and how long it will take; elsewhere nothing.

    Args:
        expected: forward-backward passes that it takes.
        stream: where the line is written; None: standard error.
    """

    expected: float
    stream: TextIO | None = None
    began: float = field(default_factory=time.monotonic)
    written: float = 0.0

    @property
    def output(self) -> TextIO:
        """Where the line is written."""
        return sys.stderr if self.stream is None else self.stream

    def report(self, passes: float) -> None:
        """Write the line anew, if it is time."""
        spent = time.monotonic() - self.began
        if passes > 0 and spent > QUIET and spent - self.written > INTERVAL and self.output.isatty():
            self.output.write(f"\r\x1b[K{self.line(passes, spent)}")
            self.output.flush()
            self.written = spent

    def line(self, passes: float, spent: float) -> str:
        """The line after some passes and seconds.

        >>> PassCounter(10).line(2.5, 30)
        'diagnosing: 25 % after 30 s, about 90 s more'
        """
        done = min(passes / self.expected, 0.99)
        return f"diagnosing: {done:.0%} after {spent:.0f} s, about {spent / done - spent:.0f} s more".replace("%", " %")

    def finish(self) -> None:
        """Remove the line."""
        if self.written:
            self.output.write("\r\x1b[K")
            self.output.flush()
