"""Run a study: measure the missing cells of its grid in parallel, and store each as soon as it is done."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from skipway._version import __version__
from skipway.errors import SkipwayError, counted
from skipway.hardware.limits import cpu_count
from skipway.hardware.processor import cpu_name
from skipway.studies.cell import BUDGETS, Budget, Cell, Choices, Row, Value
from skipway.studies.grid import check_choices
from skipway.studies.study import Study
from skipway.studies.table import StudyTable, merge_rows, parts_of
from skipway.studies.workers import CellResult, measure_cell, measure_cells

__all__ = ["Share", "SilentWatcher", "Watcher", "cell_by_key", "describe_machine", "read_rows", "remeasure", "run"]

# small networks on a GPU are limited by kernel launches, so several run at a time
JOBS_PER_GPU = 4


class Watcher(Protocol):
    """Receives the progress of a run."""

    def begin(self, study: Study, cells: int, known: int) -> None:
        """Called before the first cell, with the number of cells and of those already measured."""

    def started(self, cell: Cell) -> None:
        """Called before a cell is measured."""

    def done(self, study: Study, found: CellResult) -> None:
        """Called after a cell is measured."""

    def outdated(self, study: Study, cells: int) -> None:
        """Called with the number of cells that were measured on other data of the same path, and are measured again."""


class SilentWatcher:
    """Reports nothing."""

    def begin(self, study: Study, cells: int, known: int) -> None:
        pass

    def started(self, cell: Cell) -> None:
        pass

    def done(self, study: Study, found: CellResult) -> None:
        pass

    def outdated(self, study: Study, cells: int) -> None:
        pass


class Share:
    """Every `count`-th cell from number `index` on: the share of one job of a job array.

    >>> str(Share.read("3/8"))
    '3/8'
    """

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count

    @classmethod
    def read(cls, text: str) -> Share:
        """Parse INDEX/COUNT, from 0, as in Slurm's $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT.

        Raises:
            SkipwayError: the text has another form.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise SkipwayError(f"array={text!r}: the rule is INDEX/COUNT with 0 <= INDEX < COUNT, 0/8 to 7/8")
        return cls(int(index), int(count))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def run(
    study: Study,
    folder: Path,
    *,
    budget: Budget = "cpu",
    choices: Choices = Choices(),  # noqa: B008 - frozen
    jobs: int | None = None,
    share: Share | None = None,
    device: str = "auto",
    watcher: Watcher | None = None,
) -> list[Row]:
    """Measure the cells of a study that are not in `folder` yet; each row is stored as soon as it is measured.

    Args:
        study: to run.
        folder: of the tables; created if missing.
        budget: size of the grid.
        choices: values in place of those of the grid.
        jobs: number of processes; None means one per core, or four per GPU; 0 measures in this process.
        share: part of the cells, for one job of several; written to a table of its own.
        device: auto, cpu or cuda; auto is a GPU, if there is one, except for the budget `cpu`.
        watcher: receives the progress.

    Returns:
        rows of the requested cells, measured now or earlier; failed cells have an `error`.

    A cell that was measured on other data of the same path, or by a version that did not record them, is measured
    again.

    Raises:
        SkipwayError: the choices leave no cell, or one that cannot be built.
    """
    cells = check_choices(study, choices, budget)
    if share is not None:
        cells = cells[share.index :: share.count]
    prints = fingerprints(study, cells)
    if prints:
        forget_data()  # this process may have read them before they changed
    known = {row["key"]: row for row in read_rows(folder, study)}
    rows: dict[str, Row] = {cell.key: known[cell.key] for cell in cells if cell.key in known}
    outdated = {key for key, row in rows.items() if is_outdated(row, prints)}
    todo = [cell for cell in cells if cell.key not in rows or cell.key in outdated or rows[cell.key].get("error")]
    watcher = SilentWatcher() if watcher is None else watcher
    if outdated:
        watcher.outdated(study, len(outdated))
    watcher.begin(study, len(cells), len(cells) - len(todo))
    if not todo:
        return [rows[cell.key] for cell in cells]
    name = study.name if share is None else f"{study.name}.share-{share.index}-of-{share.count}"
    table = StudyTable(folder / f"{name}.csv", study.settings)
    devices = devices_for(device, budget)
    if jobs is None:
        jobs = cpu_count() if devices == ["cpu"] else JOBS_PER_GPU * len(devices)
    where = describe_machine()
    for found in measure_cells(study, todo, jobs=jobs, devices=devices, started=watcher.started):
        row = make_row(study, found, budget, devices[0].partition(":")[0], where, prints)
        table.append(row)
        rows[found.cell.key] = row
        watcher.done(study, found)
    return [rows[cell.key] for cell in cells if cell.key in rows]


def fingerprints(study: Study, cells: Sequence[Cell]) -> dict[Value, str]:
    """Return the fingerprints of the cells' data by path; of data that cannot be read, which each cell says, none."""
    found: dict[Value, str] = {}
    for source in dict.fromkeys(cell.get("data") for cell in cells):
        if source is not None:
            with suppress(SkipwayError, OSError):
                found[source] = study.fingerprint(source)
    return found


def forget_data() -> None:
    """Read data anew in this process."""
    from skipway.studies.fit import data_of
    from skipway.studies.text import text_of

    data_of.cache_clear()
    text_of.cache_clear()


def is_outdated(row: Row, prints: Mapping[Value, str]) -> bool:
    """Return whether a row was measured on other data than its path has now."""
    return not row.get("error") and row.get("data") in prints and row.get("fingerprint") != prints[row.get("data")]


def read_rows(folder: Path, study: Study) -> list[Row]:
    """Return the rows of a study in a folder, one per cell, in grid order; earlier revisions are left out."""
    rows = merge_rows(StudyTable(path).rows() for path in parts_of(folder, study.name))
    rows = [row for row in rows if row["key"] == study.cell_of(row).key]
    sources = {None, *(str(row["data"]) for row in rows if row.get("data"))}
    grids = [study.cells(budget, Choices(data=source)) for budget in BUDGETS for source in sources]
    places = {cell.key: place for grid in reversed(grids) for place, cell in enumerate(grid)}
    return sorted(rows, key=lambda row: places.get(str(row["key"]), len(places)))


def cell_by_key(study: Study, folder: Path, key: str, budget: Budget) -> Cell:
    """Return the cell whose key begins with `key`, from the table or the grid of a budget.

    Raises:
        SkipwayError: no cell matches, or several do.
    """
    cells = [*(study.cell_of(row) for row in read_rows(folder, study)), *study.cells(budget, Choices())]
    found = {cell.key: cell for cell in cells if cell.key.startswith(key)}
    if len(found) != 1:
        known = "none" if not found else f"{len(found)}: {', '.join(found)}"
        raise SkipwayError(
            f"--cell {key}: {known} of the keys of {study.name} match; see the column 'key' of its table"
        )
    return next(iter(found.values()))


def remeasure(study: Study, cell: Cell, *, budget: Budget = "cpu", device: str = "auto") -> Row:
    """Measure one cell again in this process, without storing the row."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        chosen = devices_for(device, budget)[0]
        measured = measure_cell(study, cell, chosen)
        prints = fingerprints(study, [cell])
        return make_row(study, measured, budget, chosen.partition(":")[0], describe_machine(), prints)
    finally:  # restore the settings of the caller's process
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def make_row(
    study: Study, found: CellResult, budget: Budget, device: str, where: str, prints: Mapping[Value, str]
) -> Row:
    """Build the row of a measured cell; `prints` are the fingerprints of data by path."""
    import torch

    source = found.cell.get("data")

    return {
        "study": study.name,
        "key": found.cell.key,
        **dict(found.cell.settings),
        **found.results,
        **({"fingerprint": prints[source]} if source in prints else {}),
        "error": found.error,
        "seconds": round(found.seconds, 2),
        "budget": budget,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "machine": where,
        "skipway": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def devices_for(device: str, budget: Budget) -> list[str]:
    """Return the devices on which to measure."""
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device in ("auto", "cpu") and (budget == "cpu" or not gpus):
        return ["cpu"]
    if device in ("auto", "cuda") and gpus:
        return [f"cuda:{number}" for number in range(gpus)]
    from skipway.hardware.device import choose_device

    return [str(choose_device(device))]


def describe_machine() -> str:
    """Describe this machine in a few words."""
    return f"{counted(cpu_count(), 'core')}, {cpu_name()}"


def failed_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with an error."""
    return [row for row in rows if row.get("error")]
