"""Cells of a study: the settings of one measurement, and the user's choices of settings."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["BUDGETS", "Budget", "Cell", "Choices", "Row", "Value"]

Value = str | int | float | bool | None
"""A value in a row."""
Row = dict[str, Value]
"""A row of a study's table: settings, results, and where and when they were measured."""
Budget = Literal["cpu", "gpu", "paper"]
BUDGETS: tuple[Budget, ...] = ("cpu", "gpu", "paper")


@dataclass(frozen=True)
class Cell:
    """One measurement of a study, fully defined by its settings, seed included.

    Args:
        study: name of the study.
        settings: pairs (name, value); without those whose value is None.
        revision: of the study; another revision gives another key.

    >>> cell = Cell.of("degradation", scheme="plain", depth=56, width=None)
    >>> cell["depth"], cell.get("width", 16), cell.key
    (56, 16, '62fdaf4162fe')
    """

    study: str
    settings: tuple[tuple[str, Value], ...]
    revision: int = 1

    @classmethod
    def of(cls, study: str, *, revision: int = 1, **settings: Value) -> Cell:
        """Return the cell with these settings; those that are None are left out."""
        return cls(study, tuple((name, value) for name, value in settings.items() if value is not None), revision)

    @property
    def key(self) -> str:
        """First twelve hexadecimal digits of the SHA-256 of study, revision and settings, in any order."""
        text = json.dumps([self.study, self.revision, dict(self.settings)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def __getitem__(self, name: str) -> Any:
        return dict(self.settings)[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting, or `default` if it is absent."""
        return dict(self.settings).get(name, default)

    def __str__(self) -> str:
        return "  ".join(f"{name}={value}" for name, value in self.settings)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The user's choices in place of the study's grid; None keeps the study's values.

    Args:
        depths: in the unit of the study (layers, blocks or branches).
        schemes: spec strings, or names of the study's variants.
        seeds: of weights and data order.
        data: folder of images used in place of the embedded digits.
    """

    depths: tuple[int, ...] | None = None
    schemes: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    data: str | None = None

    @property
    def narrowed(self) -> bool:
        """Whether any choice was made."""
        return any(value is not None for value in (self.depths, self.schemes, self.seeds, self.data))

    def options(self) -> str:
        """Return the choices as command-line options.

        >>> Choices(depths=(8, 20), data="cifar 10").options()
        " --depths 8,20 --data 'cifar 10'"
        """
        import shlex

        lists = {"depths": self.depths, "schemes": self.schemes, "seeds": self.seeds}
        given = {name: ",".join(map(str, values)) for name, values in lists.items() if values}
        if self.data is not None:
            given["data"] = self.data
        return "".join(f" --{name} {shlex.quote(text)}" for name, text in given.items())
