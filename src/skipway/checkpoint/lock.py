"""One process at a time in a run folder: a `filelock` lock, and beside it a file that names the holder.

The operating system releases the lock when its holder dies, also while a forked data worker lives on. A file system
without such locks gets a marker file instead, which counts only while its process exists.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from skipway.checkpoint.files import describe_os_error, read_json, write_json
from skipway.errors import CheckpointError, SkipwayError, printable

__all__ = ["describe_holder", "hold_lock", "read_holder", "release_lock"]

# what a file system without locks answers
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def hold_lock(path: Path, holder_file: Path) -> Iterator[str | None]:
    """Hold the lock file `path`, and name this process, its host and the time in `holder_file`; both go at the end.

    Yields a sentence if the previous holder died without releasing the lock, else None.

    Raises:
        SkipwayError: another process holds the lock, or the folder cannot be written to.
    """
    lock = acquire_lock(path, holder_file)
    try:
        previous = read_holder(holder_file)
        write_holder(holder_file)
        yield None if previous is None else f"took over the run of {describe_holder(previous)}, which has ended"
    finally:
        with suppress(OSError):  # the folder may be gone
            holder_file.unlink(missing_ok=True)
        release_lock(lock)


def release_lock(lock: BaseFileLock) -> None:
    """Remove the file of a lock, then release it: a process that waits for it sees that the file is gone, and opens a
    new one. What a file system refuses is left.
    """
    with suppress(OSError):  # the folder may be gone
        Path(lock.lock_file).unlink(missing_ok=True)
    with suppress(OSError):
        lock.release(force=True)


def acquire_lock(path: Path, holder_file: Path) -> BaseFileLock:
    """The lock of the operating system; where the file system has none, a marker file beside it."""
    lock: BaseFileLock = FileLock(path, timeout=0)
    way_out = "stop it"
    try:
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            with suppress(OSError):
                path.unlink(missing_ok=True)  # which cannot be locked
            marker = path.with_name(f"{path.name}.pid")
            lock = SoftFileLock(marker, timeout=0)
            way_out = f"delete {printable(marker)} if it has ended"
            lock.acquire()
    except Timeout as error:
        raise SkipwayError(
            f"{printable(path.parent)} is in use by {describe_holder(read_holder(holder_file))}; wait for it, "
            f"{way_out}, or choose another folder"
        ) from error
    except OSError as error:
        raise SkipwayError(f"{printable(path)} cannot be written: {describe_os_error(error)}") from error
    return lock


def write_holder(path: Path) -> None:
    """Name this process, its host and the time."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        write_json(path, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    except OSError as error:
        raise SkipwayError(f"{printable(path)} cannot be written: {describe_os_error(error)}") from error


def read_holder(path: Path) -> dict[str, Any] | None:
    """The process that a holder file names; None if there is no such file or it is damaged."""
    try:
        content = read_json(path)
    except CheckpointError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("pid"), int) else None


def describe_holder(holder: dict[str, Any] | None) -> str:
    """A process in words.

    >>> describe_holder({"pid": 12, "host": "node3", "since": "2026-01-01 12:00:00"})
    'process 12 on node3 (since 2026-01-01 12:00:00)'
    """
    if holder is None:
        return "another process"
    host, since = (printable(str(holder.get(name, "?"))) for name in ("host", "since"))
    return f"process {holder['pid']} on {host} (since {since})"
