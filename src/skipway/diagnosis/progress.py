"""Progress of a diagnosis: what goes on, the share of its passes that are done, and the time that is left."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, TextIO

__all__ = ["PassCounter", "progress_shown"]

Place = Literal["terminal", "anywhere", "nowhere"]
SHOWN: ContextVar[tuple[Place, str]] = ContextVar("SHOWN", default=("terminal", ""))

QUIET = 2.0
"""Seconds before the first line on a terminal: most diagnoses are done by then."""
INTERVAL = 0.5
"""Seconds between two lines on a terminal."""
PLAIN_INTERVAL = 5.0
"""Seconds between two plain lines, and before the first one, where another stage has begun."""
PLAIN_SILENCE = 30.0
"""Seconds between two plain lines of one stage."""


@contextmanager
def progress_shown(where: Place, name: str = "") -> Iterator[None]:
    """Context that decides where diagnoses show their progress.

    Args:
        where: "terminal", a line that is rewritten, and nothing elsewhere; "anywhere", also plain lines in pipes and
            files; "nowhere".
        name: what is diagnosed, in front of each line, where that is one of several.
    """
    token = SHOWN.set((where, name))
    try:
        yield
    finally:
        SHOWN.reset(token)


@dataclass
class PassCounter:
    """Says how far a diagnosis is and how long it will take: on a terminal in a line that is rewritten, elsewhere in
    plain lines now and then, where `progress_shown` asks for them.

    Args:
        expected: forward-backward passes that it takes.
        stream: where the lines are written; None: standard error.
    """

    expected: float
    stream: TextIO | None = None
    began: float = field(default_factory=time.monotonic)
    written: float = 0.0
    """When the last line was written; 0: there is none to remove."""
    stage: str = "diagnosing"
    counted: bool = True
    """Whether the passes of the stage are those that were expected."""
    told: str = ""
    """The stage of the last line."""

    @property
    def output(self) -> TextIO:
        """Where the lines are written."""
        return sys.stderr if self.stream is None else self.stream

    def begin(self, stage: str, *, counted: bool = False) -> None:
        """Tell what goes on from here on; of a stage whose passes are counted the time begins anew."""
        self.stage, self.counted = stage, counted
        self.told = ""
        if counted:
            self.began = time.monotonic()

    def report(self, passes: float) -> None:
        """Write a line, if it is time."""
        where, name = SHOWN.get()
        now = time.monotonic()
        live = self.output.isatty()
        if passes <= 0 or where == "nowhere" or (where == "terminal" and not live):
            return
        silence = INTERVAL if live else PLAIN_SILENCE if self.told == self.stage else PLAIN_INTERVAL
        if now - self.began < (QUIET if live else PLAIN_INTERVAL) or now - self.written < silence:
            return
        line = (f"{name}: " if name else "") + self.line(passes, now - self.began)
        width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be removed
        self.output.write(f"\r\x1b[K{line[:width]}" if live else f"{line}\n")
        self.output.flush()
        self.written, self.told = now, self.stage

    def line(self, passes: float, spent: float) -> str:
        """The line after some passes and seconds.

        >>> counter = PassCounter(10)
        >>> counter.line(2.5, 30)
        'diagnosing: 25 % after 30 s, about 90 s more'
        >>> counter.begin("remedy 1 of at most 6: clip")
        >>> counter.line(1, 50)
        'remedy 1 of at most 6: clip (after 50 s)'
        """
        if not self.counted:
            return f"{self.stage} (after {spent:.0f} s)"
        done = min(passes / self.expected, 0.99)
        return f"{self.stage}: {done:.0%} after {spent:.0f} s, about {spent / done - spent:.0f} s more".replace(
            "%", " %"
        )

    def finish(self) -> None:
        """Remove the line from a terminal."""
        if self.written and self.output.isatty():
            self.output.write("\r\x1b[K")
            self.output.flush()
            self.written = 0.0
