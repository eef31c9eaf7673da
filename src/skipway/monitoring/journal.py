"""What a monitor writes: the history in memory, the sinks, warnings and remarks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from skipway.errors import first_line
from skipway.monitoring.history import Record, WatchHistory
from skipway.monitoring.rules import EarlyWarning, Evidence, WarningLog
from skipway.monitoring.sinks import Sink

__all__ = ["FETCHED", "WatchJournal"]

FETCHED = 16
"""Steps whose numbers are fetched from a GPU, or written, at once."""


@dataclass
class WatchJournal:
    """Takes records into the history and hands them to the sinks, in the first process alone.

    Args:
        sinks: one that fails is dropped, and that is said.
        on_warning: is called with each early warning; None: Python's `warnings`.
        rank: of this process.
    """

    sinks: list[Sink]
    on_warning: Callable[[EarlyWarning], Any] | None = None
    rank: int = 0
    history: WatchHistory = field(default_factory=WatchHistory)
    rules: WarningLog = field(default_factory=WarningLog)
    fault: str = ""
    """Where the first value that was not finite came from, once there was one."""
    unwritten: list[tuple[int, float, float]] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    def add_step(self, step: int, loss: float, norm: float) -> None:
        """Take in loss and gradient norm of a step; sinks get them in packs."""
        self.history.add({"kind": "steps", "first": step, "loss": [loss], "norm": [norm]})
        self.unwritten.append((step, loss, norm))
        if len(self.unwritten) >= FETCHED:
            self.write_steps()

    def write_steps(self) -> None:
        """Hand the numbers of the last steps to the sinks."""
        steps, self.unwritten = self.unwritten, []
        if steps:
            columns = {"loss": [each[1] for each in steps], "norm": [each[2] for each in steps]}
            self.send({"kind": "steps", "first": steps[0][0], **columns})

    def write(self, kind: str, **record: Any) -> None:
        """Take in a record."""
        self.history.add({"kind": kind, **record})
        self.send({"kind": kind, **record})

    def warn(self, step: int, evidence: Evidence) -> None:
        """Apply the rules."""
        for rule, connection, text in self.rules.find(step, evidence):
            if rule.note:
                self.remark(f"step {step}: {text}")
                continue
            place = f"; {self.fault}" if rule.name == "not finite" and self.fault else ""
            self.tell(EarlyWarning(step, rule.name, connection, text + place, rule.source))

    def tell(self, warning: EarlyWarning) -> None:
        """Record a warning and hand it on."""
        record = {"step": warning.step, "rule": warning.rule, "connection": warning.connection}
        self.write("warning", **record, text=warning.text, source=warning.source)
        if self.rank == 0:
            if self.on_warning is None:
                warnings.warn(str(warning), stacklevel=2)
            else:
                self.on_warning(warning)

    def remark(self, text: str, *, aloud: bool = False) -> None:
        """Record a remark, once; aloud also with Python's `warnings`."""
        if text in self.said:
            return
        self.said.add(text)
        self.write("remark", text=text)
        if aloud:
            warnings.warn(text, stacklevel=2)

    def send(self, record: Record) -> None:
        """Hand a record to the sinks."""
        for sink in () if self.rank else tuple(self.sinks):
            try:
                sink.write(record)
            except Exception as problem:  # a full disk or a lost server must not end a training
                self.sinks.remove(sink)
                text = f"a sink is left out from here on: {type(problem).__name__}: {first_line(problem)}"
                self.remark(text, aloud=True)
