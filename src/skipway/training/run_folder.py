"""What one run leaves behind, and where.

| file | holds |
|---|---|
| `config.json` | the recipe with every choice resolved, how to build the model, preprocessing, versions |
| `split.json` | the files of each part, where the split was made here |
| `metrics.jsonl` | one JSON object per epoch |
| `checkpoint.safetensors` | weights, optimiser state and position: what `--resume` continues from |
| `best.safetensors`, `last.safetensors` | weights alone, with the preprocessing in their header |
| `summary.json` | the result |
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from skipway.errors import CheckpointError, SkipwayError
from skipway.training.storage import write_aside, write_json

__all__ = ["RunFolder"]


class RunFolder:
    """The files of one run. Nothing is touched until `begin`.

    >>> RunFolder(Path("runs/first")).checkpoint.as_posix()
    'runs/first/checkpoint.safetensors'
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.split = path / "split.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoint = path / "checkpoint.safetensors"
        self.best = path / "best.safetensors"
        self.last = path / "last.safetensors"
        self.summary = path / "summary.json"

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything a run writes, whether it is there or not."""
        return (self.config, self.split, self.metrics, self.checkpoint, self.best, self.last, self.summary)

    def check_free(self, *, overwrite: bool) -> None:
        """Refuse a folder that holds something, unless that is a run which may be overwritten.

        Raises:
            SkipwayError: the folder holds a run and `overwrite` is not set, or something that is not a run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise SkipwayError(f"out={self.path}: a file has that name; choose another folder")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not self.config.exists():
            raise SkipwayError(f"out={self.path}: the folder holds something other than a run; choose another folder")
        if not overwrite:
            raise SkipwayError(
                f"out={self.path}: the folder holds a run; continue it with --resume, replace it with --overwrite, "
                "or choose another folder"
            )

    def check_apart(self, data: Path | None) -> None:
        """Refuse a folder inside the data folder, which is never written to."""
        if data is not None and self.path.resolve().is_relative_to(data.resolve()):
            raise SkipwayError(f"out={self.path}: that is inside the data folder; choose a folder outside {data}")

    def begin(self, config: dict[str, Any], split: dict[str, Any] | None) -> None:
        """Make the folder, remove an earlier run's files, write what is known before training."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in self.files:
                file.unlink(missing_ok=True)
            write_json(self.config, config)
            if split is not None:
                write_json(self.split, split)
        except OSError as error:
            raise SkipwayError(f"out={self.path}: cannot be written: {error.strerror}") from error

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one epoch's line."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines of the metrics; a line that a crash cut short is left out."""
        rows: list[dict[str, Any]] = []
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    break
        return rows

    def keep_metrics(self, epochs: int) -> None:
        """Drop the lines behind epoch `epochs`, which a run that continues from there writes again."""
        rows: Iterable[dict[str, Any]] = (row for row in self.read_metrics() if row["epoch"] <= epochs)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_aside(self.metrics, lambda aside: aside.write_text(text, encoding="utf-8"))

    def read_config(self) -> dict[str, Any]:
        """What `begin` wrote.

        Raises:
            CheckpointError: there is no run in the folder, or its config is damaged.
        """
        if not self.config.exists():
            raise CheckpointError(f"{self.path} holds no run to continue; leave --resume out to start one there")
        try:
            return json.loads(self.config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{self.config} is damaged: {error}") from error
