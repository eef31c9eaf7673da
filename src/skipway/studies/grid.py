"""What a study's own grid has: checks of choices before a run, rows by grid, and verdicts on less than a grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from skipway.errors import SkipwayError, counted, suggest
from skipway.models import find_config
from skipway.schemes import parse_scheme
from skipway.studies.cell import BUDGETS, Budget, Cell, Choices, Row, Value
from skipway.studies.study import Study, Verdict
from skipway.validation import check_seed

__all__ = [
    "Gap",
    "GridRows",
    "check_choices",
    "describe_others",
    "find_gap",
    "foreign_schemes",
    "judge",
    "listed",
    "measured_rows",
    "own_values",
    "split_by_grid",
]

MOST_LISTED = 6
"""Values of a setting that a message lists."""
COMBINED = frozenset(("scheme", "depth", "seed", "lr"))
"""Settings that a verdict compares or sums up; rows that differ in another one, which no grid combines, stay apart."""


def own_values(study: Study, name: str, budget: Budget = "cpu") -> list[Value]:
    """Return the values of a setting in the grid of a budget, each once, in ascending order unless they are text.

    >>> from skipway.studies import find_study
    >>> own_values(find_study("degradation"), "depth"), own_values(find_study("degradation"), "scheme")
    ([8, 20, 56, 110], ['plain', 'identity'])
    """
    return in_order(cell.get(name) for cell in study.cells(budget, Choices()))


def in_order(values: Iterable[Value]) -> list[Value]:
    """Each value once, numbers in ascending order and text as it came; None is left out."""
    found = [value for value in dict.fromkeys(values) if value is not None]
    return found if any(isinstance(value, str) for value in found) else sorted(found)  # type: ignore[type-var]


def listed(values: Sequence[Value]) -> str:
    """Values in a row; text, which may hold commas, in quotes.

    >>> listed([8, 20]), listed(["plain, no norm", "Fixup"])
    ('8, 20', "'plain, no norm', 'Fixup'")
    """
    return ", ".join(map(repr, values))


def check_choices(study: Study, choices: Choices, budget: Budget = "cpu") -> list[Cell]:
    """Return the cells of a study for these choices, having checked that each can be built, without building one.

    Raises:
        SkipwayError: no cell is left, a scheme is unknown or without a cell, or a depth cannot be built.
    """
    for seed in choices.seeds or ():
        check_seed("seed", seed)
    cells = list({cell.key: cell for cell in study.cells(budget, choices)}.values())
    own = [str(name) for name in own_values(study, "scheme", budget)]
    reached = {cell.get("scheme") for cell in cells}
    for name in foreign_schemes(study, choices, budget):
        if not study.specs or (cells and name not in reached):
            raise SkipwayError(f"{study.name} measures its own schemes only; {suggest('scheme', name, own)}")
        try:
            parse_scheme(name)
        except SkipwayError as error:
            raise SkipwayError(f"{study.name}: {error}; its own schemes: {listed(own)}") from error
    if not cells:
        raise SkipwayError(f"{study.name} has no cell for these choices; omit one of them, or see skipway study --list")
    for dial, depth in dict.fromkeys((study.dial(cell), cell.get("depth")) for cell in cells):
        if dial is not None:
            try:
                find_config(*dial)
            except SkipwayError as error:
                depths = listed(own_values(study, "depth", budget))
                raise SkipwayError(f"{study.name}, depth {depth}: {error}; its own depths: {depths}") from error
    return cells


def foreign_schemes(study: Study, choices: Choices, budget: Budget = "cpu") -> list[str]:
    """Return the chosen schemes that are not among the study's own, about which it has no claim."""
    own = own_values(study, "scheme", budget)
    return [name for name in choices.schemes or () if own and name not in own]


@dataclass(frozen=True)
class Gap:
    """What rows lack of the study's grid.

    Args:
        text: one sentence.
        shallow: whether the largest depth of the grid is missing.
    """

    text: str
    shallow: bool


def find_gap(study: Study, rows: Sequence[Row]) -> Gap | None:
    """Return what measured rows lack of the budget's grid that they come closest to; None for a complete grid."""
    if not rows:
        return None
    keys = {row["key"] for row in rows}
    sources = dict.fromkeys(None if row.get("data") is None else str(row["data"]) for row in rows)
    budget = rows[-1].get("budget")
    best, most = [], (-1, False)
    for each in BUDGETS:
        for source in sources:
            cells = study.cells(each, Choices(data=source))
            lacking = [cell for cell in cells if cell.key not in keys]
            if not lacking:
                return None
            score = (len(cells) - len(lacking), each == budget)
            if score > most:
                best, most = cells, score
    parts = [text for name in study.settings if (text := lacks(name, best, rows))]
    if not parts:
        parts = [f"{len(best) - most[0]:,} of {len(best):,} cells"]
    return Gap(f"A reduced grid: the study also measures {'; '.join(parts)}.", is_shallow(best, rows))


def lacks(name: str, cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    """The values of a setting that cells have and rows do not; empty if there are none."""
    have = {row.get(name) for row in rows}
    missing = [value for value in in_order(cell.get(name) for cell in cells) if value not in have]
    if not missing:
        return ""
    rest = f" and {len(missing) - MOST_LISTED} more" if len(missing) > MOST_LISTED else ""
    return f"{name}{'s' * (len(missing) > 1)} {listed(missing[:MOST_LISTED])}{rest}"


def is_shallow(cells: Sequence[Cell], rows: Sequence[Row]) -> bool:
    """Whether a kind or family of networks that rows have lacks the largest depth it has in the cells."""

    def deepest(entries: Iterable[Cell | Row]) -> dict[tuple[Value, Value], int]:
        found: dict[tuple[Value, Value], int] = {}
        for each in entries:
            group = each.get("kind"), each.get("family")
            found[group] = max(found.get(group, 0), int(each.get("depth") or 0))
        return found

    own, have = deepest(cells), deepest(rows)
    return any(have[group] < depth for group, depth in own.items() if group in have)


@dataclass(frozen=True)
class GridRows:
    """The rows of one data set whose sizes (width, epochs, steps and so on) are those of one budget's grid.

    Args:
        budget: of the grid; None for sizes that no grid has.
        data: the user's folder of images; None for the study's own data.
        rows: in the order of the grid, those with an error included.
        gap: what the measured ones lack.
    """

    budget: Budget | None
    data: str | None
    rows: list[Row]
    gap: Gap | None

    @property
    def measured(self) -> list[Row]:
        """The rows without an error."""
        return measured_rows(self.rows)

    @property
    def complete(self) -> bool:
        """Whether nothing of the grid is missing."""
        return self.gap is None and bool(self.measured)

    def __str__(self) -> str:
        options = Choices(data=self.data).options()
        return f"--budget {self.budget}{options}" if self.budget else f"sizes of no grid{options}"


def measured_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without an error."""
    return [row for row in rows if not row.get("error")]


def split_by_grid(study: Study, rows: Sequence[Row]) -> list[GridRows]:
    """Split the rows of a folder, which may be of several budgets and data sets, of which no mean may be taken.

    Rows of an equal size belong to every grid that has it, and rows that the data do not change to the grid of every
    data set that has their key; a grid whose rows another one holds as well is left out.

    Returns:
        the rows to judge first: those of the newest complete grid, or of the newest; of the same day those of the
        larger budget. Empty without rows.
    """
    groups: list[tuple[Budget | None, str | None, list[Row]]] = []
    for source, content in dict.fromkeys(map(data_of_row, rows)):
        grids = {budget: study.cells(budget, Choices(data=source)) for budget in BUDGETS}
        keys = {cell.key for cells in grids.values() for cell in cells}
        own = [
            row
            for row in rows
            if data_of_row(row) == (source, content) or (row.get("data") is None and row["key"] in keys)
        ]
        sizes: dict[Budget, set[tuple[Value, ...]]] = {
            budget: {size_of(study, cell) for cell in cells} for budget, cells in grids.items()
        }
        for budget, known in sizes.items():
            groups.append((budget, source, [row for row in own if size_of(study, row) in known]))
        strange = [row for row in own if not any(size_of(study, row) in known for known in sizes.values())]
        for measured_with in dict.fromkeys(row.get("budget") for row in strange):
            groups.append((None, source, [row for row in strange if row.get("budget") == measured_with]))
    # of equal groups the one comes first whose budget the rows were measured with
    groups.sort(key=lambda each: (-len(each[2]), -sum(row.get("budget") == each[0] for row in each[2])))
    found: list[GridRows] = []
    kept: list[set[Value]] = []
    for budget, source, group in groups:
        held = {row["key"] for row in group}
        if group and not any(held <= other for other in kept):
            kept.append(held)
            found.append(GridRows(budget, source, group, find_gap(study, measured_rows(group))))

    def newness(each: GridRows) -> tuple[bool, str, int]:
        size = BUDGETS.index(each.budget) if each.budget in BUDGETS else -1
        return each.complete, max(str(row.get("date") or "") for row in each.rows), size

    return sorted(found, key=newness, reverse=True)


def data_of_row(row: Row) -> tuple[str | None, Value]:
    """The path of a row's data, None for the study's own, and the fingerprint of what it held."""
    return None if row.get("data") is None else str(row["data"]), row.get("fingerprint")


def size_of(study: Study, entry: Cell | Row) -> tuple[Value, ...]:
    """The settings of a cell or row that no verdict combines, `data` apart."""
    return tuple(entry.get(name) for name in study.settings if name not in COMBINED and name != "data")


def describe_others(parts: Sequence[GridRows]) -> str:
    """One sentence on the rows that are not judged, the first of `parts` being those that are; empty without others.

    >>> parts = [GridRows("cpu", None, [{"key": "a"}], None), GridRows("gpu", None, [{"key": "b"}], None)]
    >>> describe_others(parts)
    'Judged are the rows of --budget cpu alone. Measured, too, with other sizes or data: --budget gpu (1 cell).'
    """
    if len(parts) < 2:
        return ""
    others = "; ".join(f"{each} ({counted(len(each.rows), 'cell')})" for each in parts[1:])
    return f"Judged are the rows of {parts[0]} alone. Measured, too, with other sizes or data: {others}."


def judge(study: Study, rows: Sequence[Row], gap: Gap | None) -> list[Verdict]:
    """Return the study's verdict for each claim; on less than its grid each says so.

    Where the largest depth is missing, claims are open: they are about deep networks.

    Args:
        study: whose claims are judged.
        rows: measured, without errors.
        gap: what they lack, see `find_gap`.
    """
    verdicts = study.conclude(rows)
    return verdicts if gap is None else [qualify(each, gap) for each in verdicts]


def qualify(verdict: Verdict, gap: Gap) -> Verdict:
    """The verdict from a reduced grid."""
    text = verdict.text.rstrip(".")
    if verdict.answer == "open" or not gap.shallow:
        return replace(verdict, text=f"{text}. The grid is a reduced one.")
    joint = " " if verdict.answer == "holds only when" else ". "
    return replace(
        verdict,
        answer="open",
        text=f"The study's deepest network was not measured. The others alone: {verdict.answer}{joint}{text}.",
    )
