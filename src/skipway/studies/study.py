"""What a study is: a claim, a grid of cells, how one is measured, and what follows from all of them."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Literal

from skipway.registry import Registry
from skipway.report.chart import Figure
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.statistics import group_values

__all__ = ["STUDIES", "Answer", "Published", "Study", "Verdict", "find_study", "studies"]

Answer = Literal["holds", "does not hold", "holds only when", "open"]


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Args:
        claim: one sentence.
        answer: "open" where the rows do not decide it.
        text: the numbers behind the answer, with their spread; after "holds only when", the condition first.
    """

    claim: str
    answer: Answer
    text: str


@dataclass(frozen=True, kw_only=True)
class Published:
    """A number of a paper beside which ours is set.

    Args:
        what: in words.
        value: as published.
        where: values that the rows of the same thing have; all of them, also `dataset`, or there is no difference.
        column: result that it is compared with.
        source: paper and table.
    """

    what: str
    value: float
    where: dict[str, str | int | float | bool]
    column: str
    source: str

    def ours(self, rows: Sequence[Row]):
        """Our sample of the same thing; None where there is no such row."""
        same = [row for row in rows if all(row.get(name) == value for name, value in self.where.items())]
        return group_values(same, [], self.column).get(())


class Study:
    """A claim that is tested; abstract. A study is one object of a derived class, in a file of `studies.catalogue`.

    `measure` runs in a process of its own and must depend on its cell alone; `conclude` and `figures` see rows without
    errors only, perhaps few of them.
    """

    name: ClassVar[str]
    """As people type it."""
    title: ClassVar[str]
    """In words."""
    claim: ClassVar[str]
    """What the literature says, one or two sentences."""
    source: ClassVar[str]
    """Paper, year, table or figure."""
    settings: ClassVar[tuple[str, ...]]
    """Names of what decides a cell, in the order of the table."""
    results: ClassVar[tuple[str, ...]]
    """What the live table shows of a row."""
    revision: ClassVar[int] = 1
    """Counts up when `measure` changes its meaning; rows of before are then measured again."""
    minutes: ClassVar[str] = ""
    """How long the cpu budget takes, and where that was measured."""
    published: ClassVar[tuple[Published, ...]] = ()
    """Numbers of papers for the page."""

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        """The grid of a budget, with the user's choices in place of its own."""
        raise NotImplementedError

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        """The results of one cell."""
        raise NotImplementedError

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        """What the rows say, a verdict for each claim."""
        raise NotImplementedError

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        """What the page shows."""
        raise NotImplementedError

    def summary(self, rows: Sequence[Row]) -> list[Row]:
        """A table of the study's own for the page, a dictionary to a line; none unless told."""
        return []

    def cell(self, **settings: str | int | float | bool | None) -> Cell:
        """A cell of this study."""
        return Cell.of(self.name, revision=self.revision, **settings)

    def cell_of(self, row: Row) -> Cell:
        """The cell that a row was measured by."""
        return self.cell(**{name: row.get(name) for name in self.settings})

    def opening(self) -> str:
        """What the file of the study opens with."""
        return (import_module(type(self).__module__).__doc__ or "").strip()


STUDIES: Registry[Study] = Registry("study")


def studies() -> dict[str, Study]:
    """All studies by name; a file in `studies.catalogue` is found by being there."""
    catalogue = import_module("skipway.studies.catalogue")
    for found in sorted(pkgutil.iter_modules(catalogue.__path__), key=lambda each: each.name):
        import_module(f"{catalogue.__name__}.{found.name}")
    return dict(STUDIES.entries)


def find_study(name: str) -> Study:
    """The study of that name; an unknown one raises with the closest."""
    studies()
    return STUDIES[name]
