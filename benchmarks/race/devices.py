"""What the benchmark asks of a type of device: when work is done, how much memory it takes, what is raced on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skipway.errors import SkipwayError
from skipway.hardware.allocator import trim_memory
from skipway.hardware.processor import cpu_name

__all__ = ["DEVICES", "DeviceProfile"]

Sizes = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """A type of device.

    Args:
        title: what its processor is called.
        finish: waits until everything that was begun is done.
        peak: a piece of work → the most bytes that it took beyond what was there before.
        calls: of the work in a timed timing; a GPU is fed ahead of time, as training and serving do it.
        networks: raced by default.
        batch: images at a time, by default.
        products: rows, columns and inner size of the products whose rate is the ceiling.
        copied: bytes that are copied to find the rate of copying.
        loosened: what the products of the ceiling happen in; where convolutions in single precision are computed in
            TF32 by default, so that no network exceeds what is called its ceiling.
    """

    title: Callable[[], str]
    finish: Callable[[], object]
    peak: Callable[[Callable[[], object]], int]
    calls: int
    networks: tuple[str, ...]
    batch: int
    products: Sizes
    copied: int
    loosened: Callable[[], AbstractContextManager[Any]] = nullcontext


def process_status(field: str) -> int:
    """Bytes of a field of this process's status, on Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise SkipwayError(f"/proc/self/status has no {field}")


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that a piece of work had resident beyond what was resident before, in bytes; on Linux.

    >>> peak_bytes(lambda: bytearray(b"1" * (1 << 26))) > 1 << 25
    True
    """
    trim_memory()  # what was freed but is still held by the allocator would hide what the work takes
    try:
        # the high water mark starts anew
        Path("/proc/self/clear_refs").write_text("5")
        before = process_status("VmRSS")
    except OSError as error:
        raise SkipwayError("peak memory is read from /proc/self, which only Linux has") from error
    work()
    return max(0, process_status("VmHWM") - before)


def peak_cuda_bytes(work: Callable[[], object]) -> int:
    """The most that a piece of work had allocated on the GPU beyond what was before, in bytes."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Products in single precision may be computed in TF32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


DEVICES: Mapping[str, DeviceProfile] = {
    "cpu": DeviceProfile(
        title=lambda: f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        finish=lambda: None,
        peak=peak_bytes,
        calls=1,
        networks=("resnet50", "vit-small-16", "convnext-tiny", "swin-tiny"),
        batch=16,
        products=((3136, 1536, 384), (2048, 2048, 2048), (4096, 1024, 1024), (3136, 384, 1536)),
        copied=1 << 28,
    ),
    "cuda": DeviceProfile(
        title=torch.cuda.get_device_name,
        finish=torch.cuda.synchronize,
        peak=peak_cuda_bytes,
        calls=8,
        networks=("resnet50", "vit-base-16", "convnext-base", "swin-base"),
        batch=128,
        products=((8192, 8192, 8192), (16384, 4096, 4096), (25216, 3072, 768), (25216, 768, 3072)),
        copied=1 << 31,
        loosened=tensor_cores,
    ),
}
"""Devices by torch's name of their type."""
