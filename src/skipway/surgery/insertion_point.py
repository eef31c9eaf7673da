"""The module of somebody's network after which a branch can be multiplied: the last one that returns what is added."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from skipway.errors import SkipwayError
from skipway.tracing import Program
from skipway.tracing.chain import WatchedConnection
from skipway.tracing.program import Value

__all__ = ["InsertionPoint", "find_insertion_point"]

COMMUTING = frozenset({"carry", "drop", "scale", "pad"})
"""Operators that a factor commutes with."""


@dataclass(frozen=True)
class InsertionPoint:
    """The module after which the branch of a connection can be multiplied.

    Args:
        name: path of the module.
        axis: axis of its output that holds the channels of the stream; None if several or none fit.
        ndim: number of axes of its output.
        dim: channels of its output.
    """

    name: str
    axis: int | None
    ndim: int
    dim: int


def find_insertion_point(model: nn.Module, program: Program, connection: WatchedConnection) -> InsertionPoint:
    """Find the insertion point of a connection's branch.

    The search goes from the value that is added back through views, dropout and factors, to one that a module returned;
    a module that ran once, inside of the one that adds, and whose output nothing else reads. A branch that is wider
    than the stream is passed through its slice where the rest is joined to the sum: [x + F₁, F₂] is [x, 0] + F (ReXNet,
    DPN).

    Raises:
        SkipwayError: there is none; says why.
    """
    seen = connection.seen
    _, branch, total, start = seen.numbers
    here, following, beside, dim = branch, total, frozenset[int](), connection.site.dim
    reason = "what is added is returned by no module of its own, but made in the forward that adds"
    while True:
        value = program[here]
        others = [user for user in program.users[here] if user != following and program[user].signal]
        if not beside.issuperset(others):
            raise SkipwayError("what is added is read by something else too")
        for name in reversed(program.makers.get(here, [])):
            if not is_part_of(name, seen.owner):
                continue
            # a container runs its children one after the other, and would run an inserted one a second time
            if isinstance(model.get_submodule(name), nn.Sequential | nn.ModuleList | nn.ModuleDict):
                continue
            if program.runs[name] > 1:
                reason = f"{name} runs {program.runs[name]} times in a pass, so a scale after it would be shared"
                continue
            if program.left[name] > total:  # what was added already was passed through it afterwards
                continue
            return InsertionPoint(name, channel_axis(value, connection, dim), len(value.shape), dim)
        signals = program.signals(value)
        if here != start and value.part == "slice" and len(signals) == 1 and (rest := beside_sum(program, here, total)):
            dim = dim * program[signals[0]].numel // value.numel
            beside, here, following = rest, signals[0], here
            continue
        if here == start or value.part not in COMMUTING or len(signals) != 1 or value.norm is not None:
            raise SkipwayError(reason)
        here, following = signals[0], here


def beside_sum(program: Program, part: int, total: int) -> frozenset[int]:
    """The other slices of the value that `part` is a slice of, if all of them are only joined to the sum."""
    (source,) = program.signals(program[part])
    joins = {user for user in program.users[total] if program[user].part == "join"}
    rest = frozenset(user for user in program.users[source] if user != part and program[user].signal)
    joined = all(program[user].part == "slice" and joins.issuperset(program.users[user]) for user in rest)
    return rest if joined and joins else frozenset()


def is_part_of(name: str, owner: str) -> bool:
    """Whether a module is a part of the one that adds."""
    return bool(name) and name != owner and (not owner or name.startswith(owner + "."))


def channel_axis(value: Value, connection: WatchedConnection, dim: int) -> int | None:
    """The axis of a value that is as long as the stream is wide: that of images or of tokens, else the only one."""
    shape = value.shape
    if connection.site.spatial == 2 and len(shape) == 4 and shape[1] == dim:
        return 1
    if shape and shape[-1] == dim:
        return len(shape) - 1
    fitting = [axis for axis, size in enumerate(shape) if axis and size == dim]
    return fitting[0] if len(fitting) == 1 else None
