"""Control over what glibc does with freed memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

__all__ = ["keep_memory", "trim_memory"]

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""glibc's names of three parameters (malloc.h)."""
ADAPTED = {TRIM_THRESHOLD: 2**26, MMAP_THRESHOLD: 2**25, MMAP_MAX: 65536}
"""What glibc's own thresholds grow to in a process with large tensors. They no longer adapt once one was set."""
MAPPED = {name: ADAPTED[name] for name in (MMAP_THRESHOLD, MMAP_MAX)}
"""Those of them that decide what is mapped: set together, since the threshold stays where it stood once one was set."""
NEVER = {TRIM_THRESHOLD: 2**31 - 1, MMAP_MAX: 0}


class OpenContexts:
    """Number of open `keep_memory` contexts, in all threads."""

    count = 0
    lock = Lock()


@cache
def glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc, else None."""
    found = ctypes.CDLL(None) if sys.platform == "linux" else None
    return found if hasattr(found, "mallopt") and hasattr(found, "gnu_get_libc_version") else None


def set_mallopt(values: dict[int, int]) -> None:
    """Set parameters of glibc's allocator."""
    libc = glibc()
    assert libc is not None
    for name, value in values.items():
        libc.mallopt(name, value)


def trim_memory() -> None:
    """Return free memory to the operating system, if the C library is glibc."""
    if (libc := glibc()) is not None:
        libc.malloc_trim(0)


@contextmanager
def keep_memory(*, release: bool = True) -> Iterator[bool]:
    """Context in which freed memory stays with the process, to be reused.

    glibc returns a freed block of more than 32 MB to the operating system and maps a new one at the next allocation,
    whose pages are then faulted in one by one, zeroed: on a CPU an elementwise operation on a large activation spends
    more time there than computing. The parameters are those of the whole process, `mallopt(M_MMAP_MAX, 0)` and
    `mallopt(M_TRIM_THRESHOLD, max)`; on leaving they are what glibc's own rule leads to in a process with large
    tensors, settings in the environment (MALLOC_…) aside. The process holds its peak memory plus fragmentation. Results
    are unaffected.

    Args:
        release: return free memory to the operating system on leaving; otherwise it stays with the process, up to 2 GiB
            of it in one piece, until a context that releases it is left.

    Yields:
        True on Linux with glibc; elsewhere False, and nothing happens.

    >>> with keep_memory() as kept:
    ...     isinstance(kept, bool)
    True
    """
    if glibc() is None:
        yield False
        return
    with OpenContexts.lock:
        set_mallopt(NEVER)
        OpenContexts.count += 1
    try:
        yield True
    finally:
        with OpenContexts.lock:
            OpenContexts.count -= 1
            if not OpenContexts.count:
                set_mallopt(ADAPTED if release else MAPPED)
                if release:
                    trim_memory()
