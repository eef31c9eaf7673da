"""Work on many images at once: in this process, in threads, or in worker processes that may die.

A batch is one uint8 buffer; every worker writes its images into their rows. Which worker does what decides nothing, so
the result is the same for any number of them. A worker that is killed, crashes or hangs costs time and nothing else:
what it was working on is done again.
"""

from __future__ import annotations

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
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from skipway.data.decode import silence_pillow
from skipway.hardware.processor import cpu_count

__all__ = ["ImageTask", "Remark", "WorkerKind", "WorkerPool", "default_workers"]

Remark = Callable[[str], None]
WorkerKind = Literal["threads", "processes"]

# below this many files, starting workers costs more than it saves
FEW_FILES = 2_000
MAX_WORKERS = 16
# images that a worker takes at once, and batches that are worked on ahead
CHUNK_IMAGES = 8
PREFETCH_BATCHES = 3
# a worker that gives nothing for so long hangs
STALL_SECONDS = 300.0
# how often workers are started again before this process does the work alone
MAX_RESTARTS = 2


class ImageTask(Protocol):
    """What is done to an image."""

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the row that it fills; None if it fills none."""
        ...

    def __call__(self, index: int, row: np.ndarray | None) -> Any:
        """Work on image `index`, fill `row` (uint8), return something small that pickle knows."""
        ...


def default_workers(files: int) -> int:
    """Workers for that many files: one per CPU core that this process may use, none for a few files.

    >>> default_workers(10)
    0
    """
    return 0 if files < FEW_FILES else min(cpu_count(), MAX_WORKERS)


@dataclass
class WorkerPool:
    """Workers, and what to do when they die.

    Args:
        workers: their number; 0 works in this process.
        helpers: threads, or processes, which cost a copy of each batch but never wait for each other.
        remark: told in a sentence when workers had to be started again.
        stall: seconds after which a worker process counts as hanging.
    """

    workers: int = 0
    helpers: WorkerKind = "threads"
    remark: Remark | None = None
    stall: float = STALL_SECONDS

    def batches(
        self, work: ImageTask, batches: Sequence[Sequence[int]], *, pin: bool = False
    ) -> Iterator[tuple[Tensor, list[Any]]]:
        """For each batch of image numbers, in order: a uint8 tensor (B, *shape) and what `work` returned."""
        if not self.workers or not batches:
            yield from run_serially(work, batches, pin)
        elif self.helpers == "threads":
            yield from run_in_threads(work, batches, pin, self.workers)
        else:
            yield from self.in_processes(work, batches, pin)

    def in_processes(
        self, work: ImageTask, batches: Sequence[Sequence[int]], pin: bool
    ) -> Iterator[tuple[Tensor, list[Any]]]:
        """As `batches`, starting workers again from the same batch when one dies or hangs."""
        done, failures = 0, 0
        while failures <= MAX_RESTARTS:
            try:
                for result in run_in_processes(work, batches[done:], pin, self.workers, self.stall):
                    yield result
                    done += 1
                return
            except (BrokenExecutor, Stalled, OSError) as error:
                failures += 1
                self.report_failure(error, done, failures)
        yield from run_serially(work, batches[done:], pin)

    def report_failure(self, error: Exception, done: int, failures: int) -> None:
        """Report a failure."""
        what = f"gave nothing for {self.stall:g} s" if isinstance(error, Stalled) else "died"
        then = "workers start again" if failures <= MAX_RESTARTS else "this process decodes alone from here on"
        if self.remark is not None:
            self.remark(f"a worker process {what} at batch {done}: {then}; nothing is lost")


def allocate_batch(work: ImageTask, count: int, pin: bool) -> Tensor:
    """Room for a batch; page-locked where it goes to a GPU."""
    return torch.empty(count, *(work.shape or (0,)), dtype=torch.uint8, pin_memory=pin)


def run_task(work: ImageTask, indices: Sequence[int], rows: np.ndarray | None) -> list[Any]:
    """Work on some images one after the other."""
    return [work(index, None if rows is None else rows[place]) for place, index in enumerate(indices)]


def buffer_rows(work: ImageTask, buffer: Tensor) -> np.ndarray | None:
    """The buffer as what workers write to."""
    return None if work.shape is None else buffer.numpy()


def run_serially(work: ImageTask, batches: Sequence[Sequence[int]], pin: bool) -> Iterator[tuple[Tensor, list[Any]]]:
    """In this thread, a batch when it is asked for."""
    for batch in batches:
        buffer = allocate_batch(work, len(batch), pin)
        yield buffer, run_task(work, batch, buffer_rows(work, buffer))


def run_in_threads(
    work: ImageTask, batches: Sequence[Sequence[int]], pin: bool, workers: int
) -> Iterator[tuple[Tensor, list[Any]]]:
    """Yield the batches from threads, up to `PREFETCH_BATCHES` ahead: Pillow and simplejpeg release the GIL."""
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


def submit_chunk(
    pool: Executor, work: ImageTask, batch: Sequence[int], rows: np.ndarray | None, at: int
) -> Future[list[Any]]:
    """Give some images of a batch to a thread."""
    return pool.submit(
        run_task, work, batch[at : at + CHUNK_IMAGES], None if rows is None else rows[at : at + CHUNK_IMAGES]
    )


def collect_batch(buffer: Tensor, futures: list[Future[list[Any]]]) -> tuple[Tensor, list[Any]]:
    """A batch whose images are all there."""
    return buffer, [result for future in futures for result in future.result()]


# what a worker process holds: the work, and the buffers that it shares with the main process
WorkerState = tuple[ImageTask, Tensor]
WORKER_STATE: list[WorkerState] = []


def initialise_worker(work: ImageTask, buffers: Tensor, parent: int) -> None:
    """A worker leaves Ctrl-C to the main process, computes on one thread, and ends when the main process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    WORKER_STATE[:] = [(work, buffers)]

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_chunk(indices: Sequence[int], slot: int, at: int) -> list[Any]:
    """Some images, into rows `at`, `at + 1`, ... of a shared buffer."""
    work, buffers = WORKER_STATE[0]
    rows = None if work.shape is None else buffers[slot, at : at + len(indices)].numpy()
    return run_task(work, indices, rows)


def run_in_processes(
    work: ImageTask, batches: Sequence[Sequence[int]], pin: bool, workers: int, stall: float
) -> Iterator[tuple[Tensor, list[Any]]]:
    """In processes that write into `PREFETCH_BATCHES` shared buffers, each copied out before it is written to again."""
    longest = max(map(len, batches), default=0)
    try:
        shared = torch.empty(PREFETCH_BATCHES, longest, *(work.shape or (0,)), dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        raise OSError(f"no room for shared batches: {error}") from error
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
        # hanging processes are not waited for
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            with suppress(OSError):
                process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
