"""What a monitor has seen of a training: its records, in memory and as JSON lines."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skipway.errors import SkipwayError, counted, printable

__all__ = ["WatchHistory", "read_history"]

MOST_SAMPLES = 512
"""Samples that are held; of more, every second one is dropped. A file keeps all."""
Record = dict[str, Any]


@dataclass
class WatchHistory:
    """The records of a monitor by kind.

    | kind of record | holds |
    |---|---|
    | `start` | model and settings; one for each start of the training |
    | `connections` | names of the connections, or of the modules that stand for them |
    | `steps` | first step, and loss and gradient norm of it and of those after it |
    | `sample` | step, and a row for each connection |
    | `spike` | step, of what, value and score |
    | `warning` | step, rule, connection, text, source |
    | `remark` | text |
    | `deep` | step and a deep reading |
    | `end` | steps, and the share of the time that the monitor took |
    """

    start: Record = field(default_factory=dict)
    connections: Record = field(default_factory=dict)
    first_step: int = 1
    losses: array[float] = field(default_factory=lambda: array("d"))
    norms: array[float] = field(default_factory=lambda: array("d"))
    samples: list[Record] = field(default_factory=list)
    spikes: list[Record] = field(default_factory=list)
    warnings: list[Record] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    deep: list[Record] = field(default_factory=list)
    end: Record = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Take a record in; a start at an earlier step takes back what came after it, as a resumed training does.

        A training that has started again is not at its end.
        """
        kind = record.get("kind")
        if kind == "start":
            self.rewind(int(record.get("step", 0)))
            self.start, self.end = record, {}
        elif kind == "steps":
            first = int(record["first"])
            if not self.losses:
                self.first_step = first
            for values, key in ((self.losses, "loss"), (self.norms, "norm")):
                gap = first - self.first_step - len(values)
                values.extend([math.nan] * max(0, gap))
                values.extend(map(number, record[key]))
        elif kind == "sample":
            rows = {name: {key: number(each) for key, each in row.items()} for name, row in record["rows"].items()}
            self.samples.append({**record, "rows": rows})
            if len(self.samples) > MOST_SAMPLES:
                self.samples = [self.samples[0], *self.samples[2::2]]
        elif kind == "remark":
            self.remarks.append(str(record["text"]))
        elif kind in ("connections", "end"):
            setattr(self, kind, record)
        elif kind in ("spike", "warning", "deep"):
            {"spike": self.spikes, "warning": self.warnings, "deep": self.deep}[kind].append(record)

    def rewind(self, step: int) -> None:
        """Forget what came after a step."""
        keep = max(0, step - self.first_step + 1)
        del self.losses[keep:], self.norms[keep:]
        for name in ("samples", "spikes", "warnings", "deep"):
            setattr(self, name, [each for each in getattr(self, name) if each["step"] <= step])

    @property
    def steps(self) -> int:
        """The last step that was seen."""
        return self.first_step + len(self.losses) - 1


def encoded(record: Record) -> str:
    """A record as one line of standard JSON: numbers that are not finite as text."""
    return json.dumps(json_value(record), allow_nan=False)


def json_value(value: Any) -> Any:
    """A value that JSON knows; floats rounded to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): json_value(each) for key, each in value.items()}
    return [json_value(each) for each in value] if isinstance(value, Iterable) and not isinstance(value, str) else value


def number(value: Any) -> float:
    """A number of a record; NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def read_history(path: str | Path) -> WatchHistory:
    """The records of a file that a monitor wrote, finished or not; an incomplete last line is left out.

    Raises:
        SkipwayError: no such file, or it holds no record of a monitor.
    """
    history, unread, last = WatchHistory(), 0, True
    try:
        for record in records_in(Path(path)):
            unread += not last
            last = record is not None
            if record is not None:
                history.add(record)
    except OSError as problem:
        raise SkipwayError(f"{printable(path)} cannot be read: {problem.strerror}") from problem
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise SkipwayError(f"{printable(path)}: a record of it is not one of a monitor ({problem!r})") from problem
    if not history.start:
        raise SkipwayError(
            f"{printable(path)} holds no record of a monitor; the rule is a file of JSON lines that "
            "skipway.monitor(model, optimizer, sink=FILE) wrote"
        )
    if unread:
        history.remarks.append(f"left out of the file: {counted(unread, 'line')} that cannot be read")
    return history


def records_in(path: Path) -> Iterator[Record | None]:
    """The records of a file of JSON lines; None for a line that is none, as where a training was killed."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            yield record if isinstance(record, dict) else None
