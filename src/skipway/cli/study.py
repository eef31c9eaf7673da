"""`skipway study`."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from skipway.errors import SkipwayError, counted, duration, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from skipway.studies.cell import Budget, Cell, Row
    from skipway.studies.study import Study
    from skipway.studies.workers import CellResult

__all__ = ["study"]

GRID, EXECUTION, HARDWARE, OUTPUT = (
    Group(name, sort_key=number) for number, name in enumerate(("Grid", "Execution", "Hardware", "Output"))
)
FAILED = 1
# finished cells in the live table
MAX_FINISHED = 12
MOST_INTEGERS = 10_000


def study(
    name: str | None = None,
    /,
    *,
    budget: Annotated[Literal["cpu", "gpu", "paper"], Parameter(group=GRID)] = "cpu",
    depths: Annotated[str | None, Parameter(group=GRID)] = None,
    schemes: Annotated[str | None, Parameter(group=GRID)] = None,
    seeds: Annotated[str | None, Parameter(group=GRID)] = None,
    data: Annotated[Path | None, Parameter(group=GRID)] = None,
    cell: Annotated[str | None, Parameter(group=EXECUTION)] = None,
    jobs: Annotated[int | None, Parameter(group=EXECUTION)] = None,
    array: Annotated[str | None, Parameter(group=EXECUTION)] = None,
    device: Annotated[str, Parameter(group=HARDWARE)] = "auto",
    out: Annotated[Path, Parameter(name=("--out", "-o"), group=OUTPUT)] = Path("studies"),
    list_: Annotated[bool, Parameter(name="--list", negative="", group=OUTPUT)] = False,
    json: Annotated[bool, Parameter(negative="", group=OUTPUT)] = False,
) -> int:
    """Test a published claim about residual learning: a grid of small runs, a table, a verdict, a page.

    Every measured cell is stored immediately; the same command resumes an interrupted study.

    Args:
        name: A study from --list, or all.
        budget: Size of the grid: minutes on two CPU cores, one GPU, or as in the paper.
        depths: Comma-separated depths, such as 16,64 for skipinit. [the study's: skipway study NAME --list]
        schemes: Comma-separated schemes of the study, or others: fixup,layerscale(init=1e-5). [the study's: --list]
        seeds: Seeds: 0,1,2 or 0-4. [three]
        data: Folder of images, for example CIFAR-10. [digits]
        cell: Measure only the cell with this key of the table again, and print it.
        jobs: Parallel processes. [one per core]
        array: INDEX/COUNT, the share of a job in a job array: 0/8 to 7/8.
        device: auto, cpu, cuda.
        out: Folder for tables and pages.
        list_: List the studies; with NAME, the depths, schemes and seeds of that study.
        json: With --list, print one JSON object per line.
    """
    from skipway.studies.cell import Choices
    from skipway.studies.grid import check_choices, own_values
    from skipway.studies.runner import Share, cell_by_key, remeasure
    from skipway.studies.study import find_study, studies

    if list_:
        if name in (None, "all"):
            return print_studies(list(studies().values()), as_json=json)
        return print_grid(find_study(name), budget, as_json=json)
    if name is None:
        raise SkipwayError(f"which study? {', '.join(studies())}, or all; skipway study --list describes them")
    chosen = list(studies().values()) if name == "all" else [find_study(name)]
    if cell is not None:
        if len(chosen) > 1:
            raise SkipwayError("--cell belongs to one study; name the study instead of all")
        row = remeasure(chosen[0], cell_by_key(chosen[0], out, cell, budget), budget=budget, device=device)
        print_row(row)
        return FAILED if row.get("error") else 0
    if jobs is not None and jobs < 1:
        raise SkipwayError(f"--jobs {jobs}: the rule is jobs >= 1")
    own = [str(name) for each in chosen for name in own_values(each, "scheme", budget)]
    choices = Choices(
        depths=None if depths is None else parse_integers("depths", depths),
        schemes=None if schemes is None else parse_schemes(schemes, own),
        seeds=None if seeds is None else parse_integers("seeds", seeds),
        data=None if data is None else str(data.resolve()),
    )
    for each in chosen:  # before the first one begins
        check_choices(each, choices, budget)
    share = None if array is None else Share.read(array)
    options = {"budget": budget, "choices": choices, "jobs": jobs, "share": share, "device": device}
    return sum(run_study(each, out, options) for each in chosen) and FAILED


def run_study(chosen: Study, out: Path, options: dict[str, Any]) -> int:
    """Run a study, print its verdicts, write its page, and return the number of failed cells."""
    from skipway.studies.grid import describe_others, foreign_schemes, judge, listed, own_values, split_by_grid
    from skipway.studies.page import score_text, write_study_page
    from skipway.studies.runner import failed_rows, read_rows, run

    foreign = foreign_schemes(chosen, options["choices"], options["budget"])
    if foreign:
        own = listed(own_values(chosen, "scheme", options["budget"]))
        sys.stderr.write(
            f"{chosen.name} has no claim about {listed(foreign)}, only a place in table and figures; its claims need "
            f"its own schemes, by these names: {own}\n"
        )

    begun = time.monotonic()
    try:
        with choose_progress() as progress:
            rows = run(chosen, out, watcher=progress, **options)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nthe measured cells are in {out}; the same command resumes from there\n")
        raise
    broken = failed_rows(rows)
    sys.stdout.write(f"\n{chosen.title}: {counted(len(rows), 'cell')}, {time.monotonic() - begun:.0f} s\n")
    if options["share"] is None:
        # the page judges what the folder holds, and so does the terminal
        parts = split_by_grid(chosen, read_rows(out, chosen))
        gap = parts[0].gap
        verdicts = judge(chosen, parts[0].measured, gap)
        notes = [score_text(verdicts), "" if gap is None else gap.text, printable(describe_others(parts))]
        sys.stdout.write("".join(f"{text}\n" for text in notes if text))
        for verdict in verdicts:
            sys.stdout.write(f"\n{verdict.answer.upper():<16}{verdict.claim}\n{'':<16}{verdict.text}\n")
    if broken:
        sys.stdout.write(f"\n{counted(len(broken), 'cell')} failed; the first: {printable(str(broken[0]['error']))}\n")
    if options["share"] is None:
        sys.stdout.write(f"\npage   {write_study_page(chosen, out)}\n")
    else:
        sys.stdout.write(f"\nmerge the shares with  skipway report {out}\n")
    sys.stdout.flush()
    return len(broken)


def parse_integers(name: str, text: str) -> tuple[int, ...]:
    """Parse comma-separated integers and ranges.

    Raises:
        SkipwayError: it is neither, a range runs backwards, or there are more than `MOST_INTEGERS`.

    >>> parse_integers("seeds", "0-2,7")
    (0, 1, 2, 7)
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise SkipwayError(f"--{name} {text}: the rule is comma-separated integers or ranges: 8,20,56 or 0-4")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise SkipwayError(f"--{name} {text}: the rule is ranges from the smaller to the larger: {high}-{low}")
        if len(found) + high - low >= MOST_INTEGERS:
            raise SkipwayError(f"--{name} {text}: the rule is at most {MOST_INTEGERS:,} of them")
        found += range(low, high + 1)
    return tuple(found)


def parse_schemes(text: str, names: Collection[str]) -> tuple[str, ...]:
    """Parse comma-separated schemes, of which there has to be one at least."""
    found = tuple(split_specs(text, names))
    if not found:
        raise SkipwayError(f"--schemes {text!r}: the rule is at least one scheme; skipway study NAME --list shows them")
    return found


def split_specs(text: str, names: Collection[str] = ()) -> list[str]:
    """Split comma-separated spec strings, but not at commas within brackets or within one of these names.

    >>> split_specs("plain, skipinit(init=0.0, norm='remove')")
    ['plain', "skipinit(init=0.0, norm='remove')"]
    >>> split_specs("plain, no norm,Fixup", ["plain, no norm"])
    ['plain, no norm', 'Fixup']
    """
    parts = [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]
    found = []
    while parts:
        longest = range(len(parts), 1, -1)
        count = next((count for count in longest if ", ".join(parts[:count]) in names), 1)
        found.append(", ".join(parts[:count]))
        del parts[:count]
    return found


def print_studies(found: list[Study], *, as_json: bool) -> int:
    """Print the studies with their claims."""
    from skipway.cli.table import print_table

    rows = [(each.name, each.claim, each.source, each.minutes) for each in found]
    print_table(("study", "claim", "source", "cpu budget"), rows, as_json=as_json)
    return 0


def print_grid(study: Study, budget: Budget, *, as_json: bool) -> int:
    """Print the values of every setting in a study's grid."""
    from skipway.cli.table import print_table
    from skipway.studies.grid import listed, own_values

    found = {setting: own_values(study, setting, budget) for setting in study.settings}
    rows = [(setting, listed(values)) for setting, values in found.items() if values]
    print_table(("setting", "values"), rows, as_json=as_json)
    return 0


def print_row(row: Row) -> None:
    """Print a row, one value per line."""
    for name, value in row.items():
        if value is not None:
            sys.stdout.write(f"{name:<18}{printable(str(value))}\n")


def choose_progress() -> LineProgress:
    """A live table on a terminal, otherwise plain lines."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    return LiveProgress(console) if console.is_terminal and not console.is_dumb_terminal else LineProgress()


class LineProgress:
    """Progress as one line per finished cell."""

    total = count = known = 0

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def begin(self, study: Study, cells: int, known: int) -> None:
        self.total, self.count, self.known = cells, known, known
        measured = f", {known} of them already measured" if known else ""
        self.write(f"{study.name}: {counted(cells, 'cell')}{measured}")

    def outdated(self, study: Study, cells: int) -> None:
        self.write(
            f"{study.name}: {counted(cells, 'cell')} measured on other files of --data, or by a version that did not "
            "record them; measured again"
        )

    def started(self, cell: Cell) -> None:
        pass

    def done(self, study: Study, found: CellResult) -> None:
        self.count += 1
        what = f"failed: {found.error}" if found.error else format_results(study, found)
        self.write(f"[{self.count}/{self.total}] {found.cell}  {what}  {found.seconds:.1f} s")

    def write(self, text: str) -> None:
        """Write one line and flush, so that a log can be followed."""
        sys.stdout.write(printable(text) + "\n")
        sys.stdout.flush()


def format_results(study: Study, found: CellResult) -> str:
    """The results of a cell in one line."""
    from skipway.report.chart import format_value

    shown = []
    for name in study.results:
        value = found.results.get(name)
        if value is not None:
            shown.append(f"{name} {format_value(value) if isinstance(value, float) else value}")
    return "  ".join(shown)


class LiveProgress(LineProgress):
    """Progress as a table of running and recently finished cells, redrawn in place."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self.running: dict[str, tuple[Cell, float]] = {}
        self.last: list[tuple[Cell, str, str]] = []
        self.study: Study | None = None
        self.began = time.monotonic()
        self.live = Live(console=console, get_renderable=self.table, refresh_per_second=2, transient=True)

    def __enter__(self) -> LiveProgress:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def begin(self, study: Study, cells: int, known: int) -> None:
        super().begin(study, cells, known)
        self.study, self.began = study, time.monotonic()

    def started(self, cell: Cell) -> None:
        self.running[cell.key] = (cell, time.monotonic())

    def done(self, study: Study, found: CellResult) -> None:
        self.count += 1
        self.running.pop(found.cell.key, None)
        what = f"failed: {found.error}" if found.error else format_results(study, found)
        self.last = [*self.last, (found.cell, printable(what), f"{found.seconds:.1f} s")][-MAX_FINISHED:]

    def table(self) -> RenderableType:
        """Build the table for the current state."""
        from skipway.cli.table import build_table

        now = time.monotonic()
        running = [(cell, "…", f"{now - began:.0f} s") for cell, began in self.running.values()]
        rows = [(printable(str(cell)), what, seconds) for cell, what, seconds in (*self.last, *running)]
        table = build_table(("cell", "result", "time"), rows, right=("time",))
        table.title = f"{'' if self.study is None else self.study.name} {self.count}/{self.total}{self.time_left(now)}"
        return table

    def time_left(self, now: float) -> str:
        """The estimated remaining time, once a cell is finished."""
        done = self.count - self.known
        if not done:
            return ""

        return f", about {duration((now - self.began) / done * (self.total - self.count))} to go"
