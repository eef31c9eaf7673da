"""Base class of studies: a claim, a grid of cells, the measurement of a cell, and verdicts from all rows."""

from __future__ import annotations

import hashlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import ClassVar, Literal

from skipway.registry import Registry
from skipway.report.chart import Figure
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.statistics import SeedValues, group_values, select_best

__all__ = ["STUDIES", "Answer", "Published", "Study", "Verdict", "find_study", "studies"]

Answer = Literal["holds", "does not hold", "holds only when", "open"]


@dataclass(frozen=True)
class Verdict:
    """Verdict on a claim.

    Args:
        claim: one sentence.
        answer: "open" if the rows do not decide.
        text: the numbers that support the answer, with their spread; begins with the condition of "holds only when".
    """

    claim: str
    answer: Answer
    text: str


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published number, for comparison with the measured one.

    Args:
        what: description of the quantity.
        value: as published.
        where: columns and their values that select the comparable rows, `dataset` included; in the grid of a budget
            those rows differ in learning rate and seed alone.
        column: result to compare with.
        source: paper and table.
    """

    what: str
    value: float
    where: dict[str, str | int | float | bool]
    column: str
    source: str

    def measured_values(self, rows: Sequence[Row], criterion: str = "train_error") -> SeedValues | None:
        """Return the measured values of the same quantity, one per seed; None if no row is comparable.

        Of several learning rates the one with the lowest mean of `criterion` counts, as in the verdicts.
        """
        same = [row for row in rows if all(row.get(name) == value for name, value in self.where.items())]
        if len({row.get("lr") for row in same}) > 1:
            same = select_best(same, [], "lr", criterion)
        return group_values(same, [], self.column).get(())


class Study:
    """A test of a claim; abstract. A study is one instance of a subclass, in a module of `studies.catalogue`.

    `measure` runs in a worker process and must depend on its cell alone; `conclude`, `figures` and `summary` are given
    the rows without errors, possibly few.
    """

    name: ClassVar[str]
    """Name on the command line."""
    title: ClassVar[str]
    """Heading of the page."""
    claim: ClassVar[str]
    """The published claim in one or two sentences."""
    source: ClassVar[str]
    """Paper, year, table or figure."""
    settings: ClassVar[tuple[str, ...]]
    """Names of the settings that define a cell, in the order of the table."""
    results: ClassVar[tuple[str, ...]]
    """Columns that the live table shows."""
    revision: ClassVar[int] = 1
    """Incremented when `measure` changes its meaning; older rows are then measured again."""
    minutes: ClassVar[str] = ""
    """Duration of the cpu budget and the hardware on which it was measured."""
    published: ClassVar[tuple[Published, ...]] = ()
    """Published numbers that the page compares with."""
    criterion: ClassVar[str] = "train_error"
    """Column whose lowest mean decides at which learning rate a published number is compared."""
    specs: ClassVar[bool] = True
    """Whether a spec string can be measured beside the study's own schemes."""

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        """Return the grid of a budget; the user's choices replace its values."""
        raise NotImplementedError

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        """Measure one cell and return its results."""
        raise NotImplementedError

    def dial(self, cell: Cell) -> tuple[str, int] | None:
        """Return the model and depth from which a cell's network is built; None where every depth can be built."""
        return None

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        """Return a verdict for each claim."""
        raise NotImplementedError

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        """Return the figures of the page."""
        raise NotImplementedError

    def summary(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows of a summary table for the page; none by default."""
        return []

    def cell(self, **settings: str | int | float | bool | None) -> Cell:
        """Return the cell with these settings."""
        return Cell.of(self.name, revision=self.revision, **settings)

    def cell_of(self, row: Row) -> Cell:
        """Return the cell of a row."""
        return self.cell(**{name: row.get(name) for name in self.settings})

    def fingerprint(self, source: str) -> str:
        """Return hexadecimal digits that change with the user's data: names, classes, splits and sizes of the files.

        Raises:
            DataError: the source cannot be read.
        """
        from skipway.data import list_splits

        splits = list_splits(Path(source), validation=0.0)
        sizes = [splits.images.stamp(sample.file)[0] for sample in splits.samples]
        return hashlib.blake2b(f"{splits.fingerprint} {sizes}".encode(), digest_size=8).hexdigest()

    def opening(self) -> str:
        """Return the docstring of the study's module."""
        return (import_module(type(self).__module__).__doc__ or "").strip()


STUDIES: Registry[Study] = Registry("study")


def studies() -> dict[str, Study]:
    """Return all studies by name: those of every module in `studies.catalogue`."""
    catalogue = import_module("skipway.studies.catalogue")
    for found in sorted(pkgutil.iter_modules(catalogue.__path__), key=lambda each: each.name):
        import_module(f"{catalogue.__name__}.{found.name}")
    return dict(STUDIES.entries)


def find_study(name: str) -> Study:
    """Return the study of that name.

    Raises:
        SkipwayError: no study has that name; the message suggests the closest.
    """
    studies()
    return STUDIES[name]
