"""The machine that this process runs on; without torch, for those who only want to name it or share it out."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["cores", "processor"]


def cores() -> int:
    """CPU cores that this process may use.

    >>> cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The CPU's name, as Linux or else Python knows it; its architecture where neither does.

    >>> isinstance(processor(), str)
    True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
