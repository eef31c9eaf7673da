"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["give_back", "keep_memory"]

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""glibc's names of two parameters (malloc.h); their defaults are 128 KiB and 65536."""
DEFAULTS = {TRIM_THRESHOLD: 128 * 1024, MMAP_MAX: 65536}
NEVER = {TRIM_THRESHOLD: 2**31 - 1, MMAP_MAX: 0}


class Depth:
    """How many contexts are open."""

    open = 0


@cache
def library() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    found = ctypes.CDLL(None) if sys.platform == "linux" else None
    return found if hasattr(found, "mallopt") and hasattr(found, "gnu_get_libc_version") else None


def put(values: dict[int, int]) -> None:
    libc = library()
    assert libc is not None
    for name, value in values.items():
        libc.mallopt(name, value)


def give_back() -> None:
    """Give free memory back to the system, where the C library is glibc."""
    if (libc := library()) is not None:
        libc.malloc_trim(0)


@contextmanager
def keep_memory(*, release: bool = True) -> Iterator[bool]:
    """Within, memory that was freed stays with the process, to be used again.

    glibc gives a block of more than 32 MB back to the system when it is freed, and asks for a new one at the next
    allocation, whose pages then come one by one, zeroed: on a CPU an elementwise operation on a large activation spends
    more time there than computing. The parameters are those of the whole process, `mallopt(M_MMAP_MAX, 0)` and
    `mallopt(M_TRIM_THRESHOLD, max)`, and are put back on leaving. The process holds the most that it ever used at once,
    and what fragmentation adds. No number changes.

    Args:
        release: give everything that is free back on leaving; else it stays until something else frees memory.

    Yields:
        whether it could be done: on Linux with glibc. Elsewhere nothing happens.

    >>> with keep_memory() as kept:
    ...     isinstance(kept, bool)
    True
    """
    if library() is None:
        yield False
        return
    put(NEVER)
    Depth.open += 1
    try:
        yield True
    finally:
        Depth.open -= 1
        if not Depth.open:
            put(DEFAULTS if release else {MMAP_MAX: DEFAULTS[MMAP_MAX]})
            if release:
                give_back()
