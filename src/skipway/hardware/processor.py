"""The processor of this machine. Importable without torch."""

from __future__ import annotations

import platform
from functools import cache

from skipway.hardware.limits import read_text

__all__ = ["cpu_flags", "cpu_name", "cpu_precisions", "has_amx"]

# instructions for products of small numbers, as Linux names them
PRECISIONS = (
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "avx512_vnni",
    "avx_vnni",
    "avx512_fp16",
    "bf16",
    "i8mm",
    "asimdhp",
)


def cpu_name() -> str:
    """Return the name of the CPU as reported by Linux or Python, else its architecture.

    >>> isinstance(cpu_name(), str)
    True
    """
    names = cpu_field("model name")
    return names or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instructions of the CPU, as Linux names them; empty where the system does not say."""
    return f"{cpu_field('flags')} {cpu_field('Features')}".split()


def cpu_precisions() -> tuple[str, ...]:
    """The instructions of the CPU for products in bfloat16, float16 and int8, as Linux names them; none elsewhere."""
    flags = cpu_flags()
    return tuple(name for name in PRECISIONS if name in flags)


@cache
def has_amx() -> bool:
    """Whether the CPU has matrix units for bfloat16 (AMX)."""
    return "amx_bf16" in cpu_precisions()


def cpu_field(name: str) -> str:
    """What Linux says of the first core under a name; empty if nothing."""
    lines = (line.partition(":") for line in read_text("/proc/cpuinfo").splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")
