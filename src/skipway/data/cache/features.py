"""Features of images in the cache folder: rows of numbers, each part with its checksum.

There is one file for each source, split and network: features by other weights replace it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from io import BufferedRandom, BufferedReader
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout

from skipway.checkpoint.files import describe_os_error
from skipway.checkpoint.lock import release_lock
from skipway.data.cache.store import SPARE_BYTES
from skipway.errors import printable

__all__ = ["FeatureTable"]

BYTES = 4


class FeatureTable:
    """Rows float32 (N, D) that are appended in parts, to a file of the cache, or in memory where that is impossible.

    `features-<name>-<key>.bin` holds the rows, and `.jsonl` beside it a line for each part: how many rows it has and
    their SHA-256. A part counts once its line is there and fits, so a killed process, a full disk or a damaged file
    costs the rows from there on, and never gives wrong ones.

    Args:
        folder: of the cache; None keeps the rows in memory.
        name: of source, split and network.
        key: what else the rows depend on; files of the same name with another key are removed.
        count: N, the rows that are needed.
        width: D.
        remark: receives a sentence where the cache cannot be used, or a file is damaged.
    """

    def __init__(
        self, folder: Path | None, name: str, key: str, count: int, width: int, remark: Callable[[str], object]
    ) -> None:
        self.path = None if folder is None else folder / f"features-{name}-{key}.bin"
        self.name = name
        self.count = count
        self.width = width
        self.remark = remark
        self.parts: list[int] = []
        self.memory: list[np.ndarray] = []
        self.file: BufferedReader | BufferedRandom | None = None
        self.sums: IO[str] | None = None
        self.lock: FileLock | None = None

    @property
    def done(self) -> int:
        """Number of rows that are there."""
        return sum(self.parts)

    def __enter__(self) -> FeatureTable:
        if self.path is not None:
            try:
                self.open(self.path)
            except Timeout:
                self.keep_in_memory("another process computes the same features")
            except OSError as error:
                self.keep_in_memory(describe_os_error(error))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let others write it; what a full disk did not take is computed again."""
        for file in (self.file, self.sums):
            if file is not None:
                with suppress(OSError):  # closing writes what is buffered
                    file.close()
        if self.lock is not None:
            release_lock(self.lock)
        self.file, self.sums, self.lock = None, None, None

    def open(self, path: Path) -> None:
        """Read what is there, and where it is not complete prepare to write the rest.

        Raises:
            Timeout: another process writes the table.
            OSError: the cache cannot be written to.
        """
        if path.exists():
            self.file = open(path, "rb")  # noqa: SIM115 - until `close`
            self.parts, _ = self.read_parts(self.file)
        if self.done >= self.count:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"), timeout=0)
        lock.acquire()
        self.lock = lock
        needed, free = (self.count - self.done) * self.width * BYTES, shutil.disk_usage(path.parent).free
        if needed + SPARE_BYTES > free:
            raise OSError(f"they need {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free")
        path.touch()
        file = open(path, "r+b")  # noqa: SIM115 - until `close`
        if self.file is not None:
            self.file.close()
        self.file = file
        self.parts, lines = self.read_parts(file)  # again: another process may have written since
        if len(lines) > len(self.parts):
            self.remark(f"{printable(path)} is damaged behind row {self.done:,}; the rest is computed again")
        file.truncate(self.done * self.width * BYTES)
        file.seek(0, 2)
        self.sums = open(path.with_suffix(".jsonl"), "w", encoding="utf-8")  # noqa: SIM115 - until `close`
        self.sums.writelines(f"{line}\n" for line in lines[: len(self.parts)])
        self.sums.flush()
        self.remove_others(path)

    def read_parts(self, file: IO[bytes]) -> tuple[list[int], list[str]]:
        """The number of rows of each part, as far as checksums fit, and all lines about parts."""
        assert self.path is not None
        try:
            lines = self.path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            lines = []
        file.seek(0)
        parts: list[int] = []
        for line in lines:
            rows = fitting_rows(line, file, self.width)
            if rows is None:
                break
            parts.append(rows)
        return parts, lines

    def remove_others(self, path: Path) -> None:
        """Remove the rows of other weights or images."""
        for other in path.parent.glob(f"features-{self.name}-*"):
            if other.stem != path.stem:
                with suppress(OSError):
                    other.unlink()

    def append(self, rows: np.ndarray) -> None:
        """Add the next rows, float32 (B, D)."""
        rows = np.ascontiguousarray(rows, np.float32)
        if self.file is not None and self.sums is not None:
            try:
                content = rows.tobytes()
                self.file.write(content)
                self.file.flush()
                line = json.dumps({"rows": len(rows), "sha256": hashlib.sha256(content).hexdigest()})
                self.sums.write(f"{line}\n")
                self.sums.flush()
            except OSError as error:
                self.keep_in_memory(describe_os_error(error))
        if self.file is None:
            self.memory.append(rows)
        self.parts.append(len(rows))

    def clear(self) -> None:
        """Forget all rows, and remove their file."""
        self.close()
        self.parts, self.memory = [], []
        if self.path is None:
            return
        try:
            for suffix in (".jsonl", ".bin"):
                self.path.with_suffix(suffix).unlink(missing_ok=True)
        except OSError as error:
            self.keep_in_memory(describe_os_error(error))
        else:
            self.__enter__()

    def keep_in_memory(self, reason: str) -> None:
        """Move what is there to memory, and write no more."""
        self.remark(f"features are not cached: {printable(reason)}")
        if self.file is not None:
            self.memory = [self.mapped(self.done).copy()] if self.parts else []
        self.close()

    def mapped(self, count: int) -> np.ndarray:
        """The first rows of the file, mapped into memory."""
        assert self.file is not None
        # raw: seeking in a buffered file first writes what it holds, which a full disk may just have refused
        raw: Any = self.file.raw
        # copy on write: torch takes writable memory only, and the file stays as it is
        return np.memmap(raw, np.float32, mode="c", shape=(count, self.width))

    def read(self, count: int | None = None) -> np.ndarray:
        """The first rows, float32 (count, D); all that are needed by default."""
        count = self.count if count is None else count
        if self.file is not None and count:
            return self.mapped(count)
        return np.concatenate([np.empty((0, self.width), np.float32), *self.memory])[:count]


def fitting_rows(line: str, file: IO[bytes], width: int) -> int | None:
    """The number of rows that a line states, if those next in the file have its checksum; else None."""
    try:
        entry = json.loads(line)
        rows, checksum = entry["rows"], entry["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(rows, int) or isinstance(rows, bool) or not 0 < rows <= 2**24:
        return None
    content = file.read(rows * width * BYTES)
    fits = len(content) == rows * width * BYTES and hashlib.sha256(content).hexdigest() == checksum
    return rows if fits else None
