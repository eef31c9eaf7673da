"""The processor of this machine. Importable without torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["cpu_count", "cpu_name"]


def cpu_count() -> int:
    """Return the number of CPU cores that this process may use.

    >>> cpu_count() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the name of the CPU as reported by Linux or Python, else its architecture.

    >>> isinstance(cpu_name(), str)
    True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
