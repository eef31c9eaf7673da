"""Cells measured in processes of their own, one thread each: what goes wrong in one stops no other."""

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

from skipway.studies.cell import Cell, Row
from skipway.studies.study import Study

__all__ = ["CellResult", "measure_cell", "measure_cells"]


@dataclass(frozen=True)
class CellResult:
    """What came of a cell: its results, or the error in one line."""

    cell: Cell
    results: Row
    error: str | None
    seconds: float


def measure_cell(study: Study, cell: Cell, device: str) -> CellResult:
    """Measure a cell here; an exception becomes an error."""
    began = time.perf_counter()
    try:
        results, error = study.measure(cell, device), None
    except Exception as raised:
        results, error = {}, describe_exception(raised)
    return CellResult(cell, results, error, time.perf_counter() - began)


def describe_exception(raised: BaseException) -> str:
    """An exception in one line, with the place where it was raised."""
    frames = traceback.extract_tb(raised.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(raised).__name__}: {raised}{place}"


def measure_cells(
    study: Study, cells: Sequence[Cell], *, jobs: int, devices: Sequence[str], started: Callable[[Cell], None]
) -> Iterator[CellResult]:
    """Measure cells, in the order in which they are done.

    Args:
        jobs: processes at a time; 0 measures here, one after the other.
        devices: dealt to the processes in turn.
        started: called when a cell is begun.
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
    """A process that measures one cell after the other; one that dies is replaced."""

    process: BaseProcess
    line: Connection

    def __init__(self, study: Study, device: str) -> None:
        self.study, self.device = study, device
        self.cell: Cell | None = None
        self.began = 0.0
        self.start()

    def start(self) -> None:
        # a fresh interpreter: forked ones inherit the threads' locks of torch
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=serve_cells, args=(theirs, self.study, self.device), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, cell: Cell) -> None:
        """Hand over a cell."""
        self.cell, self.began = cell, time.perf_counter()
        self.line.send(cell)

    def finish(self) -> CellResult:
        """Take the result of a cell."""
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
        """Stop at once."""
        self.process.terminate()
        self.process.join(5)
        self.line.close()


def serve_cells(line: Connection, study: Study, device: str) -> None:
    """What a process does: cells in, results out, until nobody asks any more."""
    import torch

    # Ctrl-C is for the parent, which ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # vanishing signals would otherwise cost a hundred times as much
    while True:
        try:
            cell = line.recv()
        except EOFError:
            return
        line.send(measure_cell(study, cell, device))
