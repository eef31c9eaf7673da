"""One process at a time in a folder: a lock that the system drops when its holder dies, and who that is in a file."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from skipway.checkpoint.files import decoded_json, open_regular, reason
from skipway.errors import CheckpointError, SkipwayError, printable

try:
    import fcntl
except ImportError:  # Windows: the file alone is the lock
    fcntl: Any = None

__all__ = ["held"]

# file systems without locks say one of these
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
MOST_BYTES = 1 << 14
# handles of locks that this process holds: a forked child closes its copies, or it would hold them after our death
HANDLES: set[int] = set()


@contextmanager
def held(path: Path) -> Iterator[str | None]:
    """Hold the lock file `path`, which says which process on which host holds it since when.

    Gives a sentence where the lock of a process that has died was taken over. The file is removed at the end.

    Raises:
        SkipwayError: another process holds it, or the folder cannot be written to.
    """
    handle, earlier = acquire(path)
    HANDLES.add(handle)
    try:
        content = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(content).encode() + b"\n", 0)
        except OSError as error:
            raise SkipwayError(f"{printable(path)} cannot be written: {reason(error)}") from error
        yield None if earlier is None else f"took over the run of {named(earlier)}, which has ended"
    finally:
        HANDLES.discard(handle)
        with suppress(OSError):  # the folder may have gone
            path.unlink(missing_ok=True)
        os.close(handle)


def acquire(path: Path) -> tuple[int, dict[str, Any] | None]:
    """A handle that holds the lock, and who held it before without giving it back."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise SkipwayError(f"{printable(path)} cannot be written: {reason(error)}") from error
        try:
            system_lock(handle, path)
            earlier = holder(path)
            # whoever held it may have removed the file since it was opened here: then this handle locks nothing
            if is_same(handle, path):
                return handle, earlier
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def system_lock(handle: int, path: Path) -> None:
    """Lock the open file; where the system cannot, judge by who is written in it.

    Raises:
        SkipwayError: another process holds it.
    """
    try:
        if fcntl is None:
            raise OSError(errno.ENOLCK, "no locks")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        earlier = holder(path)
        if error.errno not in NO_LOCKS:
            raise SkipwayError(
                f"{printable(path.parent)} is in use by {named(earlier)}; wait for it, stop it, or choose another "
                "folder"
            ) from error
        if earlier is not None and not has_ended(earlier):
            raise SkipwayError(
                f"{printable(path.parent)} seems to be in use by {named(earlier)}; if that has ended, delete "
                f"{printable(path)}"
            ) from error


def holder(path: Path) -> dict[str, Any] | None:
    """Who is written in a lock file; None where nobody is, or it cannot be made out."""
    try:
        with open(open_regular(path), "rb") as file:
            content = decoded_json(file.read(MOST_BYTES), path)
    except (OSError, CheckpointError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("pid"), int) else None


def has_ended(earlier: dict[str, Any]) -> bool:
    """Whether the process is surely dead: it was on this host, and its number is not in use."""
    if earlier.get("host") != socket.gethostname() or os.name == "nt" or earlier["pid"] <= 0:
        return False
    try:
        os.kill(earlier["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return False


def named(earlier: dict[str, Any] | None) -> str:
    """A process in words.

    >>> named({"pid": 12, "host": "node3", "since": "2026-01-01 12:00:00"})
    'process 12 on node3 (since 2026-01-01 12:00:00)'
    """
    if earlier is None:
        return "another process"
    host, since = (printable(str(earlier.get(name, "?"))) for name in ("host", "since"))
    return f"process {earlier['pid']} on {host} (since {since})"


def is_same(handle: int, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def forget_handles() -> None:
    """In a forked child: give up the copies of the handles."""
    for handle in HANDLES:
        with suppress(OSError):
            os.close(handle)
    HANDLES.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_handles)
