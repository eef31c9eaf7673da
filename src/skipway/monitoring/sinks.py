"""Where a monitor writes: JSON lines, TensorBoard, Weights & Biases, MLflow, or any function."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from skipway.errors import SkipwayError, printable
from skipway.monitoring.history import encoded

__all__ = ["JsonLines", "Scalars", "Sink", "as_sinks"]

PREFIX = "skipway"


class Sink(Protocol):
    """Takes the records of a monitor, see `skipway.monitoring.history.WatchHistory`."""

    def write(self, record: dict[str, Any]) -> None:
        """Take one record."""


class JsonLines:
    """Appends every record to a file as a line of JSON.

    Args:
        path: of the file; its folder is made. What it holds stays.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if file.tell() and not ends_with_newline(self.path):  # a training was killed while it wrote
                    file.write(b"\n")
        except OSError as problem:
            raise SkipwayError(f"sink={printable(path)} cannot be written: {problem.strerror}") from problem

    def write(self, record: dict[str, Any]) -> None:
        """Append a line."""
        with self.path.open("ab") as file:
            file.write(f"{encoded(record)}\n".encode())


def ends_with_newline(path: Path) -> bool:
    """Whether a file that holds something ends with a whole line."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class Scalars:
    """Hands the numbers of samples, steps and spikes to a logger as a flat table by name, such as
    "skipway/layers.0/ratio"; texts are left to `skipway.monitor(…, on_warning=…)`.

    Args:
        log: takes the table and the step.
    """

    def __init__(self, log: Callable[[dict[str, float], int], Any]) -> None:
        self.log = log

    def write(self, record: dict[str, Any]) -> None:
        """Log a record, if it holds numbers."""
        table: dict[str, float] = {}
        kind, step = record["kind"], record.get("step", 0)
        if kind == "sample":
            table = {f"{name}/{key}": value for name, row in record["rows"].items() for key, value in row.items()}
        elif kind == "steps":
            step = record["first"] + len(record["loss"]) - 1
            table = {"loss": record["loss"][-1], "gradient norm": record["norm"][-1]}
        elif kind == "spike":
            table = {f"spike of {record['what']}": record["score"]}
        table = {f"{PREFIX}/{name.replace(':', '_')}": value for name, value in table.items() if math.isfinite(value)}
        if table:
            self.log(table, step)


def as_sinks(given: Any) -> list[Sink]:
    """The sinks of what a user gives.

    | given | sink |
    |---|---|
    | None | none; the records are kept in memory |
    | a path | a file of JSON lines |
    | an object with `add_scalar(name, value, step)` | TensorBoard's SummaryWriter |
    | an object with `log_metrics(table, step=…)` | MLflow, Lightning's loggers |
    | an object with `log(table, step=…)` | Weights & Biases |
    | a function of a table | called with the numbers, and the step as "step" |
    | an object with `write(record)` | it |
    | a list of those | all |

    Raises:
        SkipwayError: anything else; a file that cannot be written.
    """
    if given is None:
        return []
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [sink for each in given for sink in as_sinks(each)]
    if isinstance(given, str | Path):
        return [JsonLines(given)]
    if isinstance(given, io.IOBase):
        raise SkipwayError(
            f"sink={type(given).__name__}: an open file; give its path, which is opened for every record"
        )
    if hasattr(given, "add_scalar"):
        return [Scalars(lambda table, step: [given.add_scalar(name, value, step) for name, value in table.items()])]
    if hasattr(given, "log_metrics"):
        return [Scalars(lambda table, step: given.log_metrics(table, step=step))]
    if hasattr(given, "log"):
        return [Scalars(lambda table, step: given.log(table, step=step))]
    if hasattr(given, "write"):
        return [given]
    if callable(given):
        return [Scalars(lambda table, step: given({**table, "step": step}))]
    raise SkipwayError(
        f"sink={type(given).__name__}: the rule is a path, a SummaryWriter, an object with log(table, step=…) "
        "or log_metrics(table, step=…), a function of a table, or a list of those"
    )
