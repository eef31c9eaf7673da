"""The machine that this process runs on: its processor, its memory allocator, its devices."""

from skipway.hardware.processor import cores, processor

__all__ = ["cores", "processor"]
