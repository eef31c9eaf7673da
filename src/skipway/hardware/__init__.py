"""The machine that this process runs on: its processor, its memory allocator, its devices."""

from skipway.hardware.processor import cpu_count, cpu_name

__all__ = ["cpu_count", "cpu_name"]
