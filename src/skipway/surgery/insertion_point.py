"""Where in somebody's network something can be put behind a branch: the last module that puts out what is added."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from skipway.tracing import Program
from skipway.tracing.chain import WatchedConnection
from skipway.tracing.program import Value

__all__ = ["Place", "place_behind"]

COMMUTING = frozenset({"carry", "drop", "scale", "pad"})
"""What a factor may stand in front of as well as behind."""


@dataclass(frozen=True)
class Place:
    """Behind which module the branch of a connection can be multiplied.

    Args:
        name: path of the module.
        axis: of its output that holds the channels of the stream; None where there is no telling.
        ndim: axes of its output.
        dim: channels of its output.
    """

    name: str
    axis: int | None
    ndim: int
    dim: int


def place_behind(model: nn.Module, program: Program, connection: WatchedConnection) -> Place | str:
    """The place behind a connection's branch, or the reason why there is none.

    From the value that is added, back through views, dropout and factors, to one that a module put out; a module that
    ran once, inside of the one that adds, and whose output nothing else reads. A branch that is wider than the stream
    is passed through its slice where the rest of it stands beside the sum: [x + F₁, F₂] is [x, 0] + F (ReXNet, DPN).
    """
    seen = connection.seen
    _, branch, total, start = seen.numbers
    here, following, beside, dim = branch, total, frozenset[int](), connection.site.dim
    reason = "what is added is put out by no module of its own, but made in the forward that adds"
    while True:
        value = program[here]
        others = [user for user in program.users[here] if user != following and program[user].signal]
        if not beside.issuperset(others):
            return "what is added is read by something else too"
        for name in reversed(program.makers.get(here, [])):
            if not inside(name, seen.owner):
                continue
            # a container runs what is in it one after the other, and would run what is added to it a second time
            if isinstance(model.get_submodule(name), nn.Sequential | nn.ModuleList | nn.ModuleDict):
                continue
            if program.runs[name] > 1:
                reason = f"{name} runs {program.runs[name]} times in a pass, so a scale behind it would be shared"
                continue
            if program.left[name] > total:  # what was added already was passed through it afterwards
                continue
            return Place(name, channel_axis(value, connection, dim), len(value.shape), dim)
        signals = program.signals(value)
        if here != start and value.part == "slice" and len(signals) == 1 and (rest := beside_sum(program, here, total)):
            dim = dim * program[signals[0]].numel // value.numel
            beside, here, following = rest, signals[0], here
            continue
        if here == start or value.part not in COMMUTING or len(signals) != 1 or value.norm is not None:
            return reason
        here, following = signals[0], here


def beside_sum(program: Program, part: int, total: int) -> frozenset[int]:
    """The other slices of what a branch is a slice of, if all that is done with them is to join them to the sum."""
    (source,) = program.signals(program[part])
    joins = {user for user in program.users[total] if program[user].part == "join"}
    rest = frozenset(user for user in program.users[source] if user != part and program[user].signal)
    joined = all(program[user].part == "slice" and joins.issuperset(program.users[user]) for user in rest)
    return rest if joined and joins else frozenset()


def inside(name: str, owner: str) -> bool:
    """Whether a module is a part of the one that adds."""
    return bool(name) and name != owner and (not owner or name.startswith(owner + "."))


def channel_axis(value: Value, connection: WatchedConnection, dim: int) -> int | None:
    """Which axis of a value is as long as the stream is wide: that of images or of tokens, else the only one."""
    shape = value.shape
    if connection.site.spatial == 2 and len(shape) == 4 and shape[1] == dim:
        return 1
    if shape and shape[-1] == dim:
        return len(shape) - 1
    fitting = [axis for axis, size in enumerate(shape) if axis and size == dim]
    return fitting[0] if len(fitting) == 1 else None
