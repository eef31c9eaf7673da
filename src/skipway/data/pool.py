"""`WorkerPool`: run a task on many images in this process, in threads, or in worker processes.

A batch is one uint8 buffer, and workers write images into its rows, so the result does not depend on the number of
workers. A worker process that is killed, crashes or hangs costs time only: its images are processed again.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Stalled
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from skipway.data.decode import silence_pillow
from skipway.errors import printable
from skipway.hardware.limits import cpu_count, shared_memory

__all__ = ["ImageTask", "Remark", "WorkerKind", "WorkerPool", "default_workers"]

Remark = Callable[[str], None]
WorkerKind = Literal["threads", "processes"]

# below this many files, starting workers costs more than it saves
FEW_FILES = 2_000
MAX_WORKERS = 16
# images that take fewer seconds are handled by a single thread: with so little to decode, most of the work is Python's,
# and threads that wait for its lock are slower together than one (32 x 32 JPEG: two take 1.6 times as long)
QUICK_SECONDS = 0.5e-3
# images that a worker takes at a time, and batches that are prepared in advance
CHUNK_IMAGES = 8
PREFETCH_BATCHES = 3
# a worker without a result for so long counts as hanging
STALL_SECONDS = 300.0
# number of restarts after which this process goes on without workers
MAX_RESTARTS = 2


class ImageTask(Protocol):
    """A task on images by index."""

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the row that an image fills; None: the task fills no rows."""
        ...

    def __call__(self, index: int, row: np.ndarray | None) -> Any:
        """Process image `index`: fill `row` (uint8) and return a small picklable object."""
        ...


def default_workers(files: int) -> int:
    """Default number of workers: one per CPU core that this process may use, 0 for fewer than 2,000 files.

    >>> default_workers(10)
    0
    """
    return 0 if files < FEW_FILES else min(cpu_count(), MAX_WORKERS)


@dataclass
class WorkerPool:
    """Workers, restarted when they die.

    Args:
        workers: number of workers; 0: this process.
        helpers: "threads", or "processes", which cost a copy of each batch but do not share the GIL.
        remark: called with a sentence when workers are restarted.
        stall: seconds without a result after which a worker process counts as hanging.
    """

    workers: int = 0
    helpers: WorkerKind = "threads"
    remark: Remark | None = None
    stall: float = STALL_SECONDS

    def batches(
        self, work: ImageTask, batches: Sequence[Sequence[int]], *, pin: bool = False
    ) -> Iterator[tuple[Tensor, list[Any]]]:
        """Yield, for each batch of image numbers in order, a uint8 tensor (B, *shape) and the results of `work`."""
        if not self.workers or not batches:
            yield from run_serially(work, batches, pin)
        elif self.helpers == "threads":
            yield from run_in_threads(work, batches, pin, self.workers)
        else:
            yield from self.in_processes(work, batches, pin)

    def in_processes(
        self, work: ImageTask, batches: Sequence[Sequence[int]], pin: bool
    ) -> Iterator[tuple[Tensor, list[Any]]]:
        """As `batches`, restarting the workers at the same batch when one dies or hangs.

        Threads take their place where processes cannot share memory or be started.
        """
        done, failures = 0, 0
        while failures <= MAX_RESTARTS:
            try:
                for result in run_in_processes(work, batches[done:], pin, self.workers, self.stall):
                    yield result
                    done += 1
                return
            except (BrokenExecutor, Stalled) as error:
                failures += 1
                self.report_failure(error, done, failures)
            except OSError as error:
                if self.remark is not None:
                    self.remark(
                        f"threads decode instead of worker processes: {printable(error.strerror or str(error))}"
                    )
                yield from run_in_threads(work, batches[done:], pin, self.workers)
                return
        yield from run_serially(work, batches[done:], pin)

    def report_failure(self, error: Exception, done: int, failures: int) -> None:
        """Report that a worker died or hangs, and what follows."""
        what = f"gave no result for {self.stall:g} s" if isinstance(error, Stalled) else "died"
        then = "workers are restarted" if failures <= MAX_RESTARTS else "this process goes on without workers"
        if self.remark is not None:
            self.remark(f"a worker process {what} at batch {done}: {then}; nothing is lost")


def allocate_batch(work: ImageTask, count: int, pin: bool) -> Tensor:
    """Allocate a batch; in pinned memory with `pin`."""
    return torch.empty(count, *(work.shape or (0,)), dtype=torch.uint8, pin_memory=pin)


def run_task(work: ImageTask, indices: Sequence[int], rows: np.ndarray | None) -> list[Any]:
    """Run a task on images one after the other."""
    return [work(index, None if rows is None else rows[place]) for place, index in enumerate(indices)]


def buffer_rows(work: ImageTask, buffer: Tensor) -> np.ndarray | None:
    """The rows of a batch that workers write to; None if the task fills none."""
    return None if work.shape is None else buffer.numpy()


def run_serially(work: ImageTask, batches: Sequence[Sequence[int]], pin: bool) -> Iterator[tuple[Tensor, list[Any]]]:
    """Yield the batches, each processed in this thread when it is requested."""
    for batch in batches:
        buffer = allocate_batch(work, len(batch), pin)
        yield buffer, run_task(work, batch, buffer_rows(work, buffer))


def run_in_threads(
    work: ImageTask, batches: Sequence[Sequence[int]], pin: bool, workers: int
) -> Iterator[tuple[Tensor, list[Any]]]:
    """Yield the batches from threads, up to `PREFETCH_BATCHES` ahead: Pillow and simplejpeg release the GIL.

    The first images are timed; if they are quick, one thread handles all.
    """
    if workers > 1 and is_quick(work, batches[0][:CHUNK_IMAGES]):
        workers = 1
    pool = ThreadPoolExecutor(workers, thread_name_prefix="skipway-decode")
    waiting: deque[tuple[Tensor, list[Future[list[Any]]]]] = deque()
    try:
        for batch in batches:
            silence_pillow()
            buffer = allocate_batch(work, len(batch), pin)
            rows = buffer_rows(work, buffer)
            waiting.append(
                (buffer, [submit_chunk(pool, work, batch, rows, at) for at in range(0, len(batch), CHUNK_IMAGES)])
            )
            if len(waiting) == PREFETCH_BATCHES:
                yield collect_batch(*waiting.popleft())
        while waiting:
            yield collect_batch(*waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def is_quick(work: ImageTask, indices: Sequence[int]) -> bool:
    """Whether an image takes less than `QUICK_SECONDS`, as the median of some that are handled twice."""
    silence_pillow()
    row = None if work.shape is None else np.empty(work.shape, np.uint8)
    times = []
    for index in (*indices, *indices):
        start = time.perf_counter()
        work(index, row)
        times.append(time.perf_counter() - start)
    return median(times) < QUICK_SECONDS


def submit_chunk(
    pool: Executor, work: ImageTask, batch: Sequence[int], rows: np.ndarray | None, at: int
) -> Future[list[Any]]:
    """Submit some images of a batch."""
    return pool.submit(
        run_task, work, batch[at : at + CHUNK_IMAGES], None if rows is None else rows[at : at + CHUNK_IMAGES]
    )


def collect_batch(buffer: Tensor, futures: list[Future[list[Any]]]) -> tuple[Tensor, list[Any]]:
    """Wait for all images of a batch."""
    return buffer, [result for future in futures for result in future.result()]


# state of a worker process: its task, and the buffers that it shares with the main process
WorkerState = tuple[ImageTask, Tensor]
WORKER_STATE: list[WorkerState] = []


def initialise_worker(work: ImageTask, buffers: Tensor, parent: int) -> None:
    """Set up a worker: ignore Ctrl-C, compute on one thread, and exit when the main process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    WORKER_STATE[:] = [(work, buffers)]

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_chunk(indices: Sequence[int], slot: int, at: int) -> list[Any]:
    """Process images into rows `at`, `at + 1`, … of a shared buffer."""
    work, buffers = WORKER_STATE[0]
    rows = None if work.shape is None else buffers[slot, at : at + len(indices)].numpy()
    return run_task(work, indices, rows)


def refuse_small_memory(needed: int) -> None:
    """Raise OSError if processes cannot share so many bytes: a write beyond the limit would kill this process."""
    room = shared_memory()
    if room is not None and needed > room:
        free = f"{room / 1e6:.0f} MB are free (docker run --shm-size)"
        raise OSError(f"{needed / 1e6:.0f} MB of shared memory are needed and {free}")


def run_in_processes(
    work: ImageTask, batches: Sequence[Sequence[int]], pin: bool, workers: int, stall: float
) -> Iterator[tuple[Tensor, list[Any]]]:
    """Yield the batches from processes that write into `PREFETCH_BATCHES` shared buffers in turn."""
    longest = max(map(len, batches), default=0)
    refuse_small_memory(PREFETCH_BATCHES * longest * math.prod(work.shape or (0,)))
    try:
        shared = torch.empty(PREFETCH_BATCHES, longest, *(work.shape or (0,)), dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        raise OSError(f"no shared memory for batches: {error}") from error
    pool = ProcessPoolExecutor(workers, initializer=initialise_worker, initargs=(work, shared, os.getpid()))
    waiting: deque[tuple[int, int, list[Future[list[Any]]]]] = deque()

    def take() -> tuple[Tensor, list[Any]]:
        slot, count, futures = waiting.popleft()
        results = [result for future in futures for result in future.result(timeout=stall)]
        buffer = allocate_batch(work, count, pin)
        return buffer.copy_(shared[slot, :count]) if work.shape is not None else buffer, results

    try:
        for number, batch in enumerate(batches):
            slot = number % PREFETCH_BATCHES
            runs = range(0, len(batch), CHUNK_IMAGES)
            futures = [pool.submit(run_chunk, batch[at : at + CHUNK_IMAGES], slot, at) for at in runs]
            waiting.append((slot, len(batch), futures))
            if len(waiting) == PREFETCH_BATCHES:
                yield take()
        while waiting:
            yield take()
    except Stalled:
        # do not wait for hanging processes
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            with suppress(OSError):
                process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
