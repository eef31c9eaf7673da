"""Connections of ours that join skip and branch by more than an addition, as their slots hand them over."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from skipway.nn import Residual
from skipway.nn.history import History
from skipway.tracing.program import Program
from skipway.tracing.walks import Skip, SkipPath

__all__ = ["ResidualSlots", "SlotPath", "find_residual_slots"]


@dataclass(frozen=True)
class SlotPath(SkipPath):
    """The way of a skip that a shortcut put out.

    Args:
        kind: of the skip, where that is no matter of what was crossed.
    """

    kind: Skip | None = None

    @property
    def skip(self) -> Skip:
        return super().skip if self.kind is None else self.kind


@dataclass(frozen=True)
class ResidualSlots:
    """What the slots of a `Residual` that ran once handed over, as numbers of values.

    Args:
        name: path of the module.
        read: x, which the branch is computed from.
        skip: what the shortcut put out.
        branch: what drop put out.
        total: what post was given; the last tensor of a state of several.
        streams: how many it carries; None without `streams`.
        kind: of the skip, where the streams say it.
        adds: whether its join is an addition of its own forward.
    """

    name: str
    read: int
    skip: int
    branch: int
    total: int
    streams: int | None
    kind: Skip | None
    adds: bool

    def holds(self, owner: str) -> bool:
        """Whether a value that was made in a module is a step of the join and not of the branch."""
        parts = (f"{self.name}.join", f"{self.name}.streams")
        return owner == self.name or any(owner == part or owner.startswith(f"{part}.") for part in parts)


def find_residual_slots(model: nn.Module, program: Program) -> list[ResidualSlots]:
    """Those of all connections of ours whose skip is not cut, in the order of their sums."""
    found = []
    for name, each in model.named_modules():
        if not isinstance(each, Residual):
            continue
        slots = [program.given.get(name)] if each.streams is None else [program.returned.get(f"{name}.streams")]
        slots += [program.returned.get(f"{name}.{part}") for part in ("shortcut", "drop")]
        slots.append(program.given.get(f"{name}.post"))
        if program.runs.get(name) != 1 or not all(slots):
            continue
        read, skip, branch, total = ([*slot.values()] for slot in slots if slot)
        if not program[skip[0]].signal:
            continue
        adds = each.join is None and each.streams is None
        kind: Skip | None = None if each.streams is None else "mixed"
        if isinstance(each.streams, History):
            kind = None if each.streams.carries else "read"
        count = None if each.streams is None else each.streams.count
        found.append(ResidualSlots(name, read[0], skip[0], branch[0], total[-1], count, kind, adds))
    return sorted(found, key=lambda each: each.total)
