"""What torch has of this machine, how fast it is, and what slows it down: the facts behind `skipway doctor`."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from skipway.errors import counted
from skipway.hardware.limits import available_memory, cpu_count, physical_cores, shared_memory
from skipway.hardware.processor import cpu_name, cpu_precisions

__all__ = ["Checkup", "Speeds", "check_machine"]

# environment variables that decide how many threads compute, and how they wait
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "KMP_BLOCKTIME", "KMP_AFFINITY", "GOMP_SPINCOUNT")
# side of the measured product, bytes of the measured copy, and seconds that a measurement takes
SIDE, COPIED, SECONDS = 512, 32 * 1024**2, 0.1
# threads that are faster by less are of no use, and a precision that is slower by so much is emulated
USEFUL, EMULATED = 1.2, 0.8
SMALL_MEMORY, SMALL_SHARED = 2 * 1024**3, 256 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Measured speeds of the CPU; the product is of two square matrices.

    Args:
        product: 10⁹ operations per second in float32, on all threads.
        one_thread: the same on one thread.
        bfloat16: the same in bfloat16, on all threads.
        copy: 10⁹ bytes per second read and written.
        call: microseconds of an operation on one number, which is what PyTorch takes to begin one.
    """

    product: float
    one_thread: float
    bfloat16: float
    copy: float
    call: float


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """What torch has of a machine.

    Args:
        processor: its name.
        cores: that this process may use, those that share a physical core counted each.
        physical: physical cores among them, as many as torch starts threads by itself on x86.
        machine: cores of the whole machine, of which a container may have a part.
        load: processes on the whole machine that ran or waited to run, in the mean of the last minute; None where the
            system does not say.
        instructions: the widest vector instructions that torch uses.
        precisions: instructions of the processor for small numbers.
        memory: bytes that can still be allocated.
        shared: free bytes for memory that processes share.
        devices: the GPUs that torch sees.
        driver: whether the system has NVIDIA's driver.
        build: what torch is built for: cpu, CUDA or ROCm with version.
        blas: the library of matrix products, and whether convolutions have oneDNN.
        threads: that torch computes with.
        settings: environment variables about threads.
        compiler: path of the C++ compiler that `torch.compile` would call; empty: there is none.
        headers: whether the header files of this Python are there, which `torch.compile` needs, too.
        speeds: measured here.
    """

    processor: str
    cores: int
    physical: int
    machine: int
    load: float | None
    instructions: str
    precisions: tuple[str, ...]
    memory: int | None
    shared: int | None
    devices: tuple[str, ...]
    driver: bool
    build: str
    blas: str
    threads: int
    settings: dict[str, str]
    compiler: str
    headers: bool
    speeds: Speeds

    def causes(self) -> Iterator[str]:
        """Sentences about what is slow, or does not work, and what to do."""
        yield from self.thread_causes()
        if self.load is not None and self.load > 1.5 * self.machine:
            yield (
                f"{self.load:.1f} processes share the {counted(self.machine, 'core')} of this machine: every time "
                "measured now is too long"
            )
        if "oneDNN" not in self.blas:
            yield "this torch has no oneDNN: convolutions are several times slower; install a build of pytorch.org"
        ratio = self.speeds.bfloat16 / self.speeds.product
        if ratio < EMULATED:
            yield f"bfloat16 is {1 / ratio:.1f} times slower than float32: precision='float32' on this CPU"
        if self.build.startswith("cpu") and self.driver:
            yield "a GPU is here, and this torch is built for the CPU: install the build for CUDA (pytorch.org)"
        if not self.build.startswith("cpu") and not self.devices:
            yield f"this torch is built for {self.build} and sees no GPU: see nvidia-smi, or take the CPU build"
        if not self.compiler:
            yield "torch.compile does not work on this CPU: no C++ compiler; install g++ or clang, or set CXX"
        elif not self.headers:
            yield "torch.compile does not work on this CPU: the headers of Python are missing; install python3-dev"
        if self.memory is not None and self.memory < SMALL_MEMORY:
            yield f"{self.memory / 1e9:.1f} GB of memory are left: take smaller batches (batch_size) or images (size)"
        if self.shared is not None and self.shared < SMALL_SHARED:
            yield (
                f"{self.shared / 1e6:.0f} MB of shared memory are too few for workers that decode images: workers=0, "
                "or docker run --shm-size 2g"
            )

    def thread_causes(self) -> Iterator[str]:
        """Sentences about the number of threads."""
        # both are obeyed, the first before the second
        setting = next((name for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS") if name in self.settings), None)
        why = f", since {setting}={self.settings[setting]}" if setting else ""
        setting = setting or "OMP_NUM_THREADS"
        if self.threads < self.physical:
            cores = counted(self.physical, "core")
            yield f"torch computes with {self.threads} of {cores}{why}: {setting}={self.physical}"
        if self.threads > self.cores:
            cores = counted(self.cores, "core")
            yield f"{self.threads} threads wait for each other on {cores}{why}: {setting}={self.cores}"
        if self.threads > 1 and self.speeds.product < USEFUL * self.speeds.one_thread:
            yield (
                f"{self.threads} threads are no faster than one ({self.speeds.product:.0f} against "
                f"{self.speeds.one_thread:.0f} GFLOP/s): other processes use the cores, or two threads share one core"
            )
        if self.threads > 1 and self.settings.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
            yield (
                "waiting threads spin, which stalls others on shared cores: OMP_WAIT_POLICY=PASSIVE for scripts of "
                "your own; skipway train and diagnose set it"
            )


def check_machine() -> Checkup:
    """Look at this machine, and measure it; takes about half a second."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    found = shutil.which(compiler) or shutil.which("clang++") or shutil.which("c++") or shutil.which("cl") or ""
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    cuda, hip = torch.version.cuda, torch.version.hip
    return Checkup(
        processor=cpu_name(),
        cores=cpu_count(),
        physical=physical_cores(),
        machine=os.cpu_count() or 1,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        instructions=torch.backends.cpu.get_cpu_capability(),
        precisions=cpu_precisions(),
        memory=available_memory(),
        shared=shared_memory(),
        devices=tuple(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))),
        driver=shutil.which("nvidia-smi") is not None,
        build=f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "cpu",
        blas=(blas[1] if blas else "unknown") + (", oneDNN" if torch.backends.mkldnn.is_available() else ""),
        threads=torch.get_num_threads(),
        settings={name: os.environ[name] for name in SETTINGS if name in os.environ},
        compiler=found,
        headers=Path(sysconfig.get_path("include"), "Python.h").is_file(),
        speeds=measure_speeds(),
    )


def measure_speeds() -> Speeds:
    """Measure the CPU."""
    a, b = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE)
    low, source, number = a.bfloat16(), torch.ones(COPIED // 4), torch.ones(())
    target, operations, threads = torch.empty_like(source), 2 * SIDE**3 / 1e9, torch.get_num_threads()
    with torch.inference_mode():
        product = operations / seconds_of(lambda: a @ b)
        half = operations / seconds_of(lambda: low @ low)
        copy = 2 * COPIED / 1e9 / seconds_of(lambda: target.copy_(source))
        call = 1e6 * seconds_of(lambda: number + number)
        try:
            torch.set_num_threads(1)
            one = operations / seconds_of(lambda: a @ b)
        finally:
            torch.set_num_threads(threads)
    return Speeds(product=product, one_thread=one, bfloat16=half, copy=copy, call=call)


def seconds_of(work: Callable[[], object]) -> float:
    """The least seconds of a call, among those of a tenth of a second and at least two; the first does not count."""
    work()
    best, end, calls = math.inf, time.perf_counter() + SECONDS, 0
    while calls < 2 or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        best, calls = min(best, time.perf_counter() - began), calls + 1
    return max(best, 1e-9)
