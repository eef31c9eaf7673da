"""`skipway study`."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from skipway.errors import SkipwayError, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from skipway.studies.cell import Cell, Row
    from skipway.studies.study import Study
    from skipway.studies.workers import Measured

__all__ = ["study"]

GRID, RUNNING, OUTPUT = (Group(name, sort_key=number) for number, name in enumerate(("Grid", "Running", "Output")))
FAILED = 1
# finished cells that the live table keeps
SHOWN = 12


def study(
    name: str | None = None,
    /,
    *,
    budget: Annotated[Literal["cpu", "gpu", "paper"], Parameter(group=GRID)] = "cpu",
    depths: Annotated[str | None, Parameter(group=GRID)] = None,
    schemes: Annotated[str | None, Parameter(group=GRID)] = None,
    seeds: Annotated[str | None, Parameter(group=GRID)] = None,
    data: Annotated[Path | None, Parameter(group=GRID)] = None,
    cell: Annotated[str | None, Parameter(group=GRID)] = None,
    jobs: Annotated[int | None, Parameter(group=RUNNING)] = None,
    array: Annotated[str | None, Parameter(group=RUNNING)] = None,
    device: Annotated[str, Parameter(group=RUNNING)] = "auto",
    out: Annotated[Path, Parameter(name=("--out", "-o"), group=OUTPUT)] = Path("studies"),
    list_: Annotated[bool, Parameter(name="--list", negative="", group=OUTPUT)] = False,
) -> int:
    """Test a claim about residual learning: a grid of small runs, a table, a verdict, a page.

    What is measured is on disk at once: the same command goes on where it was stopped.

    Args:
        name: A study of --list, or all.
        budget: Grid: two CPU cores in minutes, one GPU, or the paper's.
        depths: Instead of the budget's: 8,20,56.
        schemes: Instead of the study's: plain,fixup,layerscale(init=1e-5).
        seeds: 0,1,2 or 0-4. [three]
        data: Folder of images in place of the digits, CIFAR-10 say.
        cell: Measure this one again and print it; a key of the table.
        jobs: Processes at a time. [one per core]
        array: INDEX/COUNT: this job's share of the cells, 0/8 to 7/8.
        device: auto, cpu, cuda.
        out: Folder for tables and pages.
        list_: Say which studies there are.
    """
    from skipway.studies.cell import Choices
    from skipway.studies.runner import Share, cell_by_key, remeasure
    from skipway.studies.study import find_study, studies

    if list_:
        return show_list(list(studies().values()))
    if name is None:
        raise SkipwayError(f"which study? {', '.join(studies())}, or all; --list says what they are about")
    chosen = list(studies().values()) if name == "all" else [find_study(name)]
    if cell is not None:
        if len(chosen) > 1:
            raise SkipwayError("--cell belongs to one study; name it instead of all")
        row = remeasure(chosen[0], cell_by_key(chosen[0], out, cell, budget), budget=budget, device=device)
        show_row(row)
        return FAILED if row.get("error") else 0
    if jobs is not None and jobs < 1:
        raise SkipwayError(f"--jobs {jobs}: the rule is jobs >= 1")
    choices = Choices(
        depths=None if depths is None else whole_numbers("depths", depths),
        schemes=None if schemes is None else tuple(specs(schemes)),
        seeds=None if seeds is None else whole_numbers("seeds", seeds),
        data=None if data is None else str(data.resolve()),
    )
    share = None if array is None else Share.read(array)
    how = {"budget": budget, "choices": choices, "jobs": jobs, "share": share, "device": device}
    return sum(conducted(each, out, how) for each in chosen) and FAILED


def conducted(chosen: Study, out: Path, how: dict[str, Any]) -> int:
    """Run a study, say what follows, write its page; the number of cells that failed."""
    from skipway.studies.page import write_page
    from skipway.studies.runner import failures, run

    begun = time.monotonic()
    try:
        with screen() as shown:
            rows = run(chosen, out, watcher=shown, **how)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nwhat is measured is in {out}; the same command goes on from there\n")
        raise
    broken = failures(rows)
    sys.stdout.write(f"\n{chosen.title}: {len(rows)} cells, {time.monotonic() - begun:.0f} s\n")
    for verdict in chosen.conclude([row for row in rows if not row.get("error")]) if how["share"] is None else ():
        sys.stdout.write(f"\n{verdict.answer.upper():<16}{verdict.claim}\n{'':<16}{verdict.text}\n")
    if broken:
        sys.stdout.write(f"\n{len(broken)} cells failed; the first: {printable(str(broken[0]['error']))}\n")
    if how["share"] is None:
        sys.stdout.write(f"\npage   {write_page(chosen, out)}\n")
    else:
        sys.stdout.write(f"\nmerge the shares with  skipway report {out}\n")
    sys.stdout.flush()
    return len(broken)


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """Numbers with commas, and ranges.

    >>> whole_numbers("seeds", "0-2,7")
    (0, 1, 2, 7)
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise SkipwayError(f"--{name} {text}: the rule is whole numbers with commas, or ranges: 8,20,56 or 0-4")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(found)


def specs(text: str) -> list[str]:
    """Spec strings with commas between them, not those within brackets.

    >>> specs("plain, skipinit(init=0.0, norm='remove')")
    ['plain', "skipinit(init=0.0, norm='remove')"]
    """
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def show_list(found: list[Study]) -> int:
    """The studies with their claims."""
    if not sys.stdout.isatty():
        for each in found:
            sys.stdout.write("\t".join((each.name, each.claim, each.source, each.minutes)) + "\n")
        return 0
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("study", "what the literature says", "source", "cpu budget", box=None, padding=(0, 2, 1, 0))
    for each in found:
        table.add_row(Text(each.name, "bold"), Text(each.claim), Text(each.source), Text(each.minutes))
    Console().print(table)
    return 0


def show_row(row: Row) -> None:
    """A row, one value to a line."""
    for name, value in row.items():
        if value is not None:
            sys.stdout.write(f"{name:<18}{printable(str(value))}\n")


def screen() -> Lines:
    """A live table on a terminal, else plain lines."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    return Live(console) if console.is_terminal and not console.is_dumb_terminal else Lines()


class Lines:
    """One line for each cell that is done."""

    total = count = known = 0

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def begin(self, study: Study, cells: int, known: int) -> None:
        self.total, self.count, self.known = cells, known, known
        measured = f", {known} of them measured already" if known else ""
        self.write(f"{study.name}: {cells} cells{measured}")

    def started(self, cell: Cell) -> None:
        pass

    def done(self, study: Study, found: Measured) -> None:
        self.count += 1
        what = f"failed: {found.error}" if found.error else results(study, found)
        self.write(f"[{self.count}/{self.total}] {found.cell}  {what}  {found.seconds:.1f} s")

    def write(self, text: str) -> None:
        """One line, at once: a log is looked at while it grows."""
        sys.stdout.write(printable(text) + "\n")
        sys.stdout.flush()


def results(study: Study, found: Measured) -> str:
    """The results of a cell that are shown."""
    from skipway.report.figure import number

    shown = []
    for name in study.results:
        value = found.results.get(name)
        if value is not None:
            shown.append(f"{name} {number(value) if isinstance(value, float) else value}")
    return "  ".join(shown)


class Live(Lines):
    """A table of what runs and what was done last, rewritten in place."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live as Region

        self.running: dict[str, tuple[Cell, float]] = {}
        self.last: list[tuple[Cell, str, str]] = []
        self.study: Study | None = None
        self.began = time.monotonic()
        self.region = Region(console=console, get_renderable=self.table, refresh_per_second=2, transient=True)

    def __enter__(self) -> Live:
        self.region.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.region.stop()

    def begin(self, study: Study, cells: int, known: int) -> None:
        super().begin(study, cells, known)
        self.study, self.began = study, time.monotonic()

    def started(self, cell: Cell) -> None:
        self.running[cell.key] = (cell, time.monotonic())

    def done(self, study: Study, found: Measured) -> None:
        self.count += 1
        self.running.pop(found.cell.key, None)
        what = f"failed: {found.error}" if found.error else results(study, found)
        self.last = [*self.last, (found.cell, printable(what), f"{found.seconds:.1f} s")][-SHOWN:]

    def table(self) -> RenderableType:
        """What the terminal shows now."""
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        table = Table(
            title=f"{'' if self.study is None else self.study.name} {self.count}/{self.total}{self.left(now)}"
        )
        for column in ("cell", "result", "time"):
            table.add_column(column, justify="right" if column == "time" else "left")
        for cell, what, seconds in self.last:
            table.add_row(Text(printable(str(cell))), Text(what), Text(seconds))
        for cell, began in self.running.values():
            table.add_row(Text(printable(str(cell)), "dim"), Text("…"), Text(f"{now - began:.0f} s", "dim"))
        return table

    def left(self, now: float) -> str:
        """How long the rest will take, once it can be told."""
        done = self.count - self.known
        if not done:
            return ""
        from skipway.report.summary import duration

        return f", about {duration((now - self.began) / done * (self.total - self.count))} to go"
