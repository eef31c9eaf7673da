"""The files of a run.

| file | holds |
|---|---|
| `config.json` | the recipe with every choice resolved, how to build the model, preprocessing, versions |
| `environment.json` | hardware, versions and settings |
| `split.json` | the files of the training, validation and test split, where one of them was split off here |
| `metrics.jsonl`, `steps.jsonl` | one JSON object per epoch, and per so many steps |
| `health.jsonl` | measurements of every residual connection |
| `checkpoints/` | weights, optimizer state and progress at a few steps, with hashes: what `--resume` continues from |
| `best.safetensors` | weights of the epoch with the best validation accuracy, ties by loss; the test result is theirs |
| `last.safetensors` | weights of the last epoch; both with preprocessing and epoch in their header |
| `tensorboard/` | the curves for TensorBoard, with `tensorboard=True` |
| `bundle/` | the batch of a step that diverged, to repeat it |
| `summary.json`, `report.html` | the result, and a page to read |
| `findings.csv` | likely wrong labels, near-duplicates between splits, outliers |
| `lock.json`, `.lock` | the process that works in the folder, and its lock; gone when it ends |
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipway.checkpoint import store as checkpoints
from skipway.checkpoint.files import describe_os_error, read_json, write_atomically, write_json, write_tensors
from skipway.checkpoint.lock import hold_lock
from skipway.data.split import read_split
from skipway.errors import CheckpointError, SkipwayError, printable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RunFolder"]


class RunFolder:
    """The files of one run. Nothing is written before `begin`.

    >>> RunFolder(Path("runs/first")).best.as_posix()
    'runs/first/best.safetensors'
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.environment = path / "environment.json"
        self.split = path / "split.json"
        self.metrics = path / "metrics.jsonl"
        self.steps = path / "steps.jsonl"
        self.health = path / "health.jsonl"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best.safetensors"
        self.last = path / "last.safetensors"
        self.bundle = path / "bundle"
        self.board = path / "tensorboard"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.findings = path / "findings.csv"
        self.lock_file = path / ".lock"
        self.holder = path / "lock.json"

    @property
    def files(self) -> tuple[Path, ...]:
        """All files and folders that a run may write, whether they exist or not."""
        return (
            *(self.config, self.environment, self.split, self.metrics, self.steps, self.checkpoints),
            *(self.health, self.board, self.best, self.last, self.bundle, self.summary, self.report),
            self.findings,
        )

    @contextmanager
    def lock(self) -> Iterator[str | None]:
        """Lock the folder against other runs; it is created if necessary, and removed at the end if it is empty.

        Yields a sentence if a killed run had left its lock, else None.

        Raises:
            SkipwayError: another run uses the folder, or it cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SkipwayError(f"out={printable(self.path)}: cannot be created: {describe_os_error(error)}") from error
        try:
            with hold_lock(self.lock_file, self.holder) as note:
                yield note
        finally:
            with suppress(OSError):  # holds something, as it should
                self.path.rmdir()

    def check_free(self, *, overwrite: bool) -> None:
        """Raise unless the folder is free, or holds a run that may be overwritten.

        Raises:
            SkipwayError: the folder holds a run and `overwrite` is False, or other files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise SkipwayError(f"out={printable(self.path)}: a file has that name; choose another folder")
        if not self.path.is_dir() or all(self.leftover(entry) for entry in self.path.iterdir()):
            return
        if not self.config.exists():
            raise SkipwayError(
                f"out={printable(self.path)}: the folder holds something other than a run; choose another folder"
            )
        if not overwrite:
            raise SkipwayError(
                f"out={printable(self.path)}: the folder holds a run; continue it with --resume, replace it "
                "with --overwrite, or choose another folder"
            )

    def leftover(self, entry: Path) -> bool:
        """Whether an interrupted run left this entry before it began: its lock, or a temporary file."""
        return (
            entry == self.holder
            or entry.name.startswith(self.lock_file.name)
            or (entry.name.startswith(".") and entry.name.endswith(".aside"))
        )

    def check_apart(self, data: Path | None) -> None:
        """Raise if the folder is inside the data folder, which is never written to."""
        if data is not None and self.path.resolve().is_relative_to(data.resolve()):
            raise SkipwayError(
                f"out={printable(self.path)}: that is inside the data folder; choose a folder outside {data}"
            )

    def begin(self, config: dict[str, Any], split: dict[str, Any] | None) -> None:
        """Create the folder, remove the files of an earlier run, and write `config.json` and `split.json`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in self.files:
                checkpoints.remove_path(file)
            write_json(self.config, config)
            if split is not None:
                write_json(self.split, split)
        except OSError as error:
            raise SkipwayError(f"out={printable(self.path)}: cannot be written: {describe_os_error(error)}") from error

    def read_split(self) -> dict[str, Any] | None:
        """What `begin` wrote about the splits; None: the source has them all.

        Raises:
            CheckpointError: the file is damaged.
        """
        return read_split(self.split)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append the row of an epoch."""
        append_rows(self.metrics, [row])

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read all complete rows of the metrics; a row that a crash truncated is skipped."""
        return read_rows(self.metrics)

    def keep_metrics(self, epochs: int) -> None:
        """Drop the rows after epoch `epochs`, which a resumed run writes again."""
        keep_rows(self.metrics, "epoch", epochs)

    def append_steps(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to the step metrics; each has a `step`, counted from the start of the run."""
        append_rows(self.steps, rows)

    def read_steps(self) -> list[dict[str, Any]]:
        """Read all complete rows of the step metrics."""
        return read_rows(self.steps)

    def keep_steps(self, step: int) -> None:
        """Drop the rows after step `step`, which a resumed run writes again."""
        keep_rows(self.steps, "step", step)

    def append_health(self, row: dict[str, Any]) -> None:
        """Append a measurement of the connections."""
        append_rows(self.health, [row])

    def read_health(self) -> list[dict[str, Any]]:
        """Read all complete measurements."""
        return read_rows(self.health)

    def keep_rows_until(self, epoch: int, step: int) -> None:
        """Drop the rows after a checkpoint, which a run that goes on from it writes again."""
        self.keep_metrics(epoch)
        self.keep_steps(step)
        keep_rows(self.health, "step", step)

    def remove_result(self) -> None:
        """Remove what the end of a run writes, since the run goes on."""
        for path in (self.summary, self.report, self.findings):
            checkpoints.remove_path(path)

    def write_bundle(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Write the batch of a failed step, and its description."""
        self.bundle.mkdir(exist_ok=True)
        write_tensors(self.bundle / "batch.safetensors", tensors, {})
        write_json(self.bundle / "about.json", about)

    def read_config(self) -> dict[str, Any]:
        """Read `config.json`.

        Raises:
            CheckpointError: there is no run in the folder, or its config is damaged.
        """
        if not self.config.exists():
            raise CheckpointError(
                f"{printable(self.path)} holds no run to continue; leave --resume out to start one there"
            )
        config = read_json(self.config)
        if not isinstance(config, dict):
            raise CheckpointError(f"{printable(self.config)} is damaged: it holds no JSON object")
        return config


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append one line of JSON per row, and flush to the disk."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise SkipwayError(f"{printable(path)} cannot be written: {describe_os_error(error)}") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines up to the first incomplete one."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(row, dict):
                break
            rows.append(row)
    return rows


def keep_rows(path: Path, count: str, last: int) -> None:
    """Drop the rows whose `count` is greater than `last` or not an integer, and a truncated last row."""
    if not path.exists():
        return
    rows = [row for row in read_rows(path) if isinstance(row.get(count), int) and row[count] <= last]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise SkipwayError(f"{printable(path)} cannot be written: {describe_os_error(error)}") from error
