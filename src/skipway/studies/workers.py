"""Measurement of cells in worker processes of one thread each, so that a failing cell stops no other."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from skipway.errors import SkipwayError
from skipway.studies.cell import Cell, Row
from skipway.studies.study import Study

__all__ = ["CellResult", "measure_cell", "measure_cells"]


@dataclass(frozen=True)
class CellResult:
    """Results of a cell, or its error in one line."""

    cell: Cell
    results: Row
    error: str | None
    seconds: float


def measure_cell(study: Study, cell: Cell, device: str) -> CellResult:
    """Measure a cell in this process; an exception becomes the `error` of the result."""
    began = time.perf_counter()
    try:
        results, error = study.measure(cell, device), None
    except Exception as raised:
        results, error = {}, describe_exception(raised)
    return CellResult(cell, results, error, time.perf_counter() - began)


def describe_exception(raised: BaseException) -> str:
    """Format an exception in one line, with the file and line that raised it unless its message is meant for users."""
    if isinstance(raised, SkipwayError):
        return str(raised)
    frames = traceback.extract_tb(raised.__traceback__)
    origin = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(raised).__name__}: {raised}{origin}"


def measure_cells(
    study: Study, cells: Sequence[Cell], *, jobs: int, devices: Sequence[str], started: Callable[[Cell], None]
) -> Iterator[CellResult]:
    """Measure cells, and yield each result when it is complete.

    Args:
        jobs: number of worker processes; 0 measures one cell after the other in this process.
        devices: assigned to the processes in turn.
        started: called before each cell.
    """
    if not jobs:
        for cell in cells:
            started(cell)
            yield measure_cell(study, cell, devices[0])
        return
    waiting = list(reversed(cells))
    workers: list[Worker] = []
    try:
        for number in range(min(jobs, len(cells))):
            workers.append(Worker(study, devices[number % len(devices)]))
        while waiting or any(worker.cell for worker in workers):
            for worker in workers:
                if worker.cell is None and waiting:
                    cell = waiting.pop()
                    started(cell)
                    worker.begin(cell)
            ready = wait([worker.line for worker in workers if worker.cell])
            for worker in workers:
                if worker.line in ready:
                    yield worker.finish()
    finally:
        for worker in workers:
            worker.end()


class Worker:
    """A process that measures one cell after another, and is replaced if it dies."""

    process: BaseProcess
    line: Connection

    def __init__(self, study: Study, device: str) -> None:
        self.study, self.device = study, device
        self.cell: Cell | None = None
        self.began = 0.0
        self.start()

    def start(self) -> None:
        # a new interpreter: a fork would inherit torch's thread locks
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=serve_cells, args=(theirs, self.study, self.device), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, cell: Cell) -> None:
        """Send a cell to the process."""
        self.cell, self.began = cell, time.perf_counter()
        self.line.send(cell)

    def finish(self) -> CellResult:
        """Receive the result of the cell; if the process has died, replace it and return an error."""
        cell = self.cell
        assert cell is not None
        self.cell = None
        try:
            return self.line.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            reason = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            self.line.close()
            self.start()
            return CellResult(cell, {}, f"the process died: {reason}", time.perf_counter() - self.began)

    def end(self) -> None:
        """Terminate the process."""
        self.process.terminate()
        self.process.join(5)
        self.line.close()


def serve_cells(line: Connection, study: Study, device: str) -> None:
    """Main loop of a process: receive cells and send results until the connection is closed."""
    import torch

    # Ctrl-C is handled by the parent, which ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # denormal numbers of vanishing signals are a hundred times slower
    while True:
        try:
            cell = line.recv()
        except EOFError:
            return
        line.send(measure_cell(study, cell, device))
