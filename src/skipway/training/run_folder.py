"""What one run leaves behind, and where.

| file | holds |
|---|---|
| `config.json` | the recipe with every choice resolved, how to build the model, preprocessing, versions |
| `environment.json` | machine, versions and settings of each session |
| `split.json` | the files of the training, validation and test split, where one of them was split off here |
| `metrics.jsonl`, `steps.jsonl` | one JSON object per epoch, and per so many steps |
| `health.jsonl` | samples of how every connection fares |
| `checkpoints/` | weights, optimiser state and progress at a few steps, with hashes: what `--resume` continues from |
| `checkpoint.safetensors` | the same in one file, as earlier versions wrote it |
| `best.safetensors` | weights of the epoch with the best validation accuracy; the test result is theirs |
| `last.safetensors` | weights of the last epoch; both with preprocessing and epoch in their header |
| `tensorboard/` | the curves once more, where that was asked for |
| `bundle/` | what a step that diverged was made of, to run it again |
| `summary.json`, `report.html` | the result, and a page to read |
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
    """The files of one run. Nothing is touched until `begin`.

    >>> RunFolder(Path("runs/first")).checkpoint.as_posix()
    'runs/first/checkpoint.safetensors'
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
        self.checkpoint = path / "checkpoint.safetensors"
        self.best = path / "best.safetensors"
        self.last = path / "last.safetensors"
        self.bundle = path / "bundle"
        self.board = path / "tensorboard"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.lock_file = path / ".lock"
        self.holder = path / "lock.json"

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything a run leaves behind, files and folders, whether it is there or not."""
        return (
            *(self.config, self.environment, self.split, self.metrics, self.steps, self.checkpoints, self.checkpoint),
            *(self.health, self.board, self.best, self.last, self.bundle, self.summary, self.report),
        )

    @contextmanager
    def lock(self) -> Iterator[str | None]:
        """Keep every other run out of the folder, which is made if need be, and unmade if nothing came into it.

        Gives a sentence where a run that was killed had left its lock behind, else None.

        Raises:
            SkipwayError: another run works in the folder, or it cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SkipwayError(f"out={printable(self.path)}: cannot be made: {describe_os_error(error)}") from error
        try:
            with hold_lock(self.lock_file, self.holder) as note:
                yield note
        finally:
            with suppress(OSError):  # holds something, as it should
                self.path.rmdir()

    def check_free(self, *, overwrite: bool) -> None:
        """Refuse a folder that holds something, unless that is a run which may be overwritten.

        Raises:
            SkipwayError: the folder holds a run and `overwrite` is not set, or something that is not a run.
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
        """Whether a run that died before it began has left this: its lock, or a file that was being written."""
        return (
            entry == self.holder
            or entry.name.startswith(self.lock_file.name)
            or (entry.name.startswith(".") and entry.name.endswith(".aside"))
        )

    def check_apart(self, data: Path | None) -> None:
        """Refuse a folder inside the data folder, which is never written to."""
        if data is not None and self.path.resolve().is_relative_to(data.resolve()):
            raise SkipwayError(
                f"out={printable(self.path)}: that is inside the data folder; choose a folder outside {data}"
            )

    def begin(self, config: dict[str, Any], split: dict[str, Any] | None) -> None:
        """Make the folder, remove an earlier run's files, write what is known before training."""
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
        """Add one epoch's line."""
        append_rows(self.metrics, [row])

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines of the metrics; a line that a crash cut short is left out."""
        return read_rows(self.metrics)

    def keep_metrics(self, epochs: int) -> None:
        """Drop the lines behind epoch `epochs`, which a run that continues from there writes again."""
        keep_rows(self.metrics, "epoch", epochs)

    def append_steps(self, rows: list[dict[str, Any]]) -> None:
        """Add lines to the metrics of steps; each has a `step`, counted from the start of training."""
        append_rows(self.steps, rows)

    def read_steps(self) -> list[dict[str, Any]]:
        """All complete lines of the metrics of steps."""
        return read_rows(self.steps)

    def keep_steps(self, step: int) -> None:
        """Drop the lines behind step `step`, which a run that continues from there writes again."""
        keep_rows(self.steps, "step", step)

    def append_health(self, row: dict[str, Any]) -> None:
        """Add a sample of how the connections fare."""
        append_rows(self.health, [row])

    def read_health(self) -> list[dict[str, Any]]:
        """All complete samples."""
        return read_rows(self.health)

    def write_bundle(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Keep the batch of a step that went wrong, and what is known of it."""
        self.bundle.mkdir(exist_ok=True)
        write_tensors(self.bundle / "batch.safetensors", tensors, {})
        write_json(self.bundle / "about.json", about)

    def read_config(self) -> dict[str, Any]:
        """What `begin` wrote.

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
    """Add one line of JSON for each row and force them to the disk."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise SkipwayError(f"{printable(path)} cannot be written: {describe_os_error(error)}") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines up to the first that is not whole."""
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
    """Drop the rows whose `count` is greater than `last` or no number, and a row that a crash cut short."""
    rows = [row for row in read_rows(path) if isinstance(row.get(count), int) and row[count] <= last]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise SkipwayError(f"{printable(path)} cannot be written: {describe_os_error(error)}") from error
