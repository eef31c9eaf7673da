"""Cells of a study: the settings of one measurement, and the choices of a user among them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["BUDGETS", "Budget", "Cell", "Choices", "Row", "Value"]

Value = str | int | float | bool | None
"""A value in a row."""
Row = dict[str, Value]
"""A line of a study's table: settings, results, and where and when they were measured."""
Budget = Literal["cpu", "gpu", "paper"]
BUDGETS: tuple[Budget, ...] = ("cpu", "gpu", "paper")


@dataclass(frozen=True)
class Cell:
    """One measurement of a study: `settings` decide everything about it, seed included.

    Args:
        study: its name.
        settings: (name, value) in order; a value that is None is left out.
        revision: of what the study measures; another one makes another key.

    >>> cell = Cell.of("degradation", scheme="plain", depth=56, width=None)
    >>> cell["depth"], cell.get("width", 16), cell.key
    (56, 16, '62fdaf4162fe')
    """

    study: str
    settings: tuple[tuple[str, Value], ...]
    revision: int = 1

    @classmethod
    def of(cls, study: str, *, revision: int = 1, **settings: Value) -> Cell:
        """The cell of these settings."""
        return cls(study, tuple((name, value) for name, value in settings.items() if value is not None), revision)

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of study, revision and settings, whatever their order."""
        text = json.dumps([self.study, self.revision, dict(self.settings)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def __getitem__(self, name: str) -> Any:
        return dict(self.settings)[name]

    def get(self, name: str, default: Any = None) -> Any:
        """A setting, or what stands for an absent one."""
        return dict(self.settings).get(name, default)

    def __str__(self) -> str:
        return "  ".join(f"{name}={value}" for name, value in self.settings)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a user asks of a study instead of its own grid; None leaves it to the study.

    Args:
        depths: in the study's own unit.
        schemes: spec strings, or the names that the study gives its variants.
        seeds: of weights and order.
        data: folder of images in place of the embedded digits.
    """

    depths: tuple[int, ...] | None = None
    schemes: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    data: str | None = None

    @property
    def narrowed(self) -> bool:
        """Whether anything was chosen."""
        return any(value is not None for value in (self.depths, self.schemes, self.seeds, self.data))

    def options(self) -> str:
        """The same as options of the command line.

        >>> Choices(depths=(8, 20), data="cifar 10").options()
        " --depths 8,20 --data 'cifar 10'"
        """
        import shlex

        lists = {"depths": self.depths, "schemes": self.schemes, "seeds": self.seeds}
        given = {name: ",".join(map(str, values)) for name, values in lists.items() if values}
        if self.data is not None:
            given["data"] = self.data
        return "".join(f" --{name} {shlex.quote(text)}" for name, text in given.items())
