"""The processor of this machine. Importable without torch."""

from __future__ import annotations

import platform

from skipway.hardware.limits import read_text

__all__ = ["cpu_name"]


def cpu_name() -> str:
    """Return the name of the CPU as reported by Linux or Python, else its architecture.

    >>> isinstance(cpu_name(), str)
    True
    """
    lines = read_text("/proc/cpuinfo").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
