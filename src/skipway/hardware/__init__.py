"""The machine that this process runs on: its processor, its memory allocator, its devices."""

from skipway.hardware.limits import available_memory, cpu_count
from skipway.hardware.processor import cpu_name

__all__ = ["available_memory", "cpu_count", "cpu_name"]
