"""The modules of somebody's network after which a branch can be multiplied: the last ones that return what is added."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from skipway.errors import SkipwayError
from skipway.surgery.block_call import CONTAINERS, BlockCall, parameter_names
from skipway.surgery.insertion import BRANCH, OUTPUT, Around, insert_after, insert_into_branch
from skipway.surgery.transaction import Transaction
from skipway.tracing import Program
from skipway.tracing.chain import WatchedConnection
from skipway.tracing.operators import is_linear_map
from skipway.tracing.program import Value

__all__ = ["InsertionPoint", "adding_module", "find_insertion_points", "insert_at"]

COMMUTING = frozenset({"carry", "slice", "stride", "drop", "scale", "pad"})
"""Parts of operators that a factor commutes with."""
RESAMPLING = ("upsample_", "_upsample_", "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool")
"""Beginnings of the names of operators that average within a channel, with which a factor commutes too."""


@dataclass(frozen=True)
class InsertionPoint:
    """A module after which the branch of a connection, or one of the branches that it is a sum of, can be multiplied.

    Args:
        name: path of the module.
        axis: axis of its output that holds the channels of the stream; None if that is unknown.
        ndim: number of axes of its output.
        dim: channels of its output.
        call: where x is in the arguments and the output of the module, if it is the one that adds; what it adds is
            multiplied then.
    """

    name: str
    axis: int | None
    ndim: int
    dim: int
    call: BlockCall | None = None

    @property
    def slot(self) -> str:
        """Path of what is inserted."""
        return f"{self.name}.{OUTPUT if self.call is None else BRANCH}".removeprefix(".")

    def __str__(self) -> str:
        return self.name if self.call is None else f"{self.name or 'the model'}, on its output minus its input"


def insert_at(change: Transaction, host: nn.Module, point: InsertionPoint, inserted: nn.Module) -> None:
    """Let what `host`, the module of a point or a copy of it, puts out or adds pass through `inserted`, in place."""
    if point.call is None:
        insert_after(change, host, inserted)
    else:
        insert_into_branch(change, host, inserted, Around(point.call))


def find_insertion_points(
    model: nn.Module, program: Program, connection: WatchedConnection
) -> tuple[InsertionPoint, ...]:
    """Find the insertion points of a connection's branch: one, or one for each of the branches that it is a sum of.

    The search goes from the value that is added back through views, dropout, factors and gates, to one that a module
    returned; a module that ran once, inside of the one that adds, and whose output nothing else reads. A factor
    commutes with a gate, so that it stands behind either of the two that are multiplied, and is distributed over a sum:
    s (F + G) = s F + s G. A branch that is wider than the stream is passed through its slice where the rest is joined
    to the sum: [x + F₁, F₂] is [x, 0] + F (ReXNet, DPN). Where there is none, but the module that adds was given x and
    returned y = x + F(x), it is that module, with F(x) = y − x.

    Raises:
        SkipwayError: there is none; says what is in between.
    """
    _, branch, total, _ = connection.seen.numbers
    whole = adding_module(model, program, connection)
    try:
        points = Search(model, program, connection).points(branch, total)
    except SkipwayError:
        if whole is None:
            raise
        return (whole,)
    return points if whole is None or all(point.axis is not None for point in points) else (whole,)


def adding_module(model: nn.Module, program: Program, connection: WatchedConnection) -> InsertionPoint | None:
    """The module that adds, if it was given x and returned x + F(x)."""
    seen, owner = connection.seen, connection.seen.owner
    skip, branch, total, start = seen.numbers
    given = [path for path, number in program.given.get(owner, {}).items() if number == skip]
    returned = [path for path, number in program.returned.get(owner, {}).items() if number == total]
    exact = seen.skip == "identity" and skip == start and seen.weights[0] == 1 and seen.channel is not None
    if not (given and returned and exact) or program.runs.get(owner) != 1:
        return None
    members = [*program.between(start, branch), program[total]]
    writes = any(program.writes_into(member, start) for member in members)
    module = model.get_submodule(owner)
    if isinstance(module, CONTAINERS):
        return None
    call = BlockCall(given[0], returned[0], parameter_names(module), writes_stream=writes)
    return InsertionPoint(owner, seen.channel, len(seen.shape), connection.site.dim, call)


@dataclass(frozen=True)
class Search:
    """The search for the insertion points of one connection."""

    model: nn.Module
    program: Program
    connection: WatchedConnection

    def points(self, here: int, following: int, reason: str = "") -> tuple[InsertionPoint, ...]:
        """The points before the value `here`, which only `following` reads."""
        program, (_, _, total, start) = self.program, self.connection.seen.numbers
        beside = frozenset[int]()
        while True:
            value = program[here]
            # what is written by weights, or read again, is handed over once
            handed = here == self.connection.seen.numbers[1] and self.connection.seen.skip in ("mixed", "read")
            if not handed and not beside.issuperset(user for user in program.signal_users(here) if user != following):
                raise SkipwayError("what is added is read by something else too")
            found, why = self.host(value, total)
            if found is not None:
                return (self.point(found, value),)
            reason = reason or why
            if here == start:
                raise SkipwayError(reason or "what is added holds the stream itself, which a factor would multiply too")
            if here in self.connection.seen.inner:
                raise SkipwayError(reason or "what is added is the sum of another connection")
            signals = program.signals(value)
            if value.norm is None and len(signals) > 1 and value.part in ("sum", "product"):
                return self.points_of_several(value, signals, reason)
            commutes = value.part in COMMUTING or value.operator.startswith(RESAMPLING)
            if not commutes or len(signals) != 1 or value.norm is not None:
                raise SkipwayError(reason or self.in_between(value))
            beside = beside_sum(program, here, total) if value.part == "slice" else frozenset()
            here, following = signals[0], here

    def points_of_several(self, value: Value, signals: list[int], reason: str) -> tuple[InsertionPoint, ...]:
        """The points behind all summands, or behind one factor, preferably one as large as the product."""
        if value.part == "sum":
            return tuple(point for each in signals for point in self.points(each, value.number, reason))
        if is_linear_map(value.operator):
            raise SkipwayError(reason or self.in_between(value))
        problems = []
        if value.operator.removesuffix("_") == "div":
            signals = [operand for operand in value.operands[:1] if operand in signals]
        for factor in sorted(signals, key=lambda each: (-self.program[each].numel, -each)):
            if not has_channels_of(self.program[factor], value):
                problems.append(SkipwayError(reason or self.in_between(value)))
                continue
            try:
                return self.points(factor, value.number, reason)
            except SkipwayError as problem:
                problems.append(problem)
        raise problems[0] if problems else SkipwayError(reason or self.in_between(value))

    def host(self, value: Value, total: int) -> tuple[str | None, str]:
        """The outermost module that returned a value and can be extended, else None and why not."""
        program, reason = self.program, ""
        for name in reversed(program.makers.get(value.number, [])):
            if not is_part_of(name, self.connection.seen.owner):
                continue
            # a container runs its children one after the other, and would run an inserted one a second time
            if isinstance(self.model.get_submodule(name), CONTAINERS):
                continue
            if program.runs[name] > 1:
                reason = f"{name} runs {program.runs[name]} times in a pass, so a scale after it would be shared"
                continue
            if program.left[name] > max(
                total, value.number + 1
            ):  # what was added already was passed through it afterwards
                continue
            return name, ""
        return None, reason

    def point(self, name: str, value: Value) -> InsertionPoint:
        axis = self.channel_axis_of(value)
        return InsertionPoint(name, axis, len(value.shape), value.shape[axis] if axis is not None else 0)

    def channel_axis_of(self, value: Value) -> int | None:
        """The axis of a value that holds the channels of the stream. Where the last map of the branch wrote another
        axis, as in an MLP over positions, it is the only one that is as long.
        """
        seen, branch = self.connection.seen, self.program[self.connection.seen.numbers[1]]
        if value.channel is not None and seen.channel in (None, branch.channel):
            return value.channel
        if seen.channel is None:
            return None
        fitting = [axis for axis, size in enumerate(value.shape) if axis and size == self.connection.site.dim]
        return fitting[0] if len(fitting) == 1 else None

    def in_between(self, value: Value) -> str:
        """The reason why no module returns what is added."""
        what = f"{value.operator} by a norm" if value.norm is not None else value.operator
        return (
            f"what is added is made in the forward that adds, by {what} in {value.owner or 'the model'}, and a factor "
            "before that is none after it"
        )


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


def has_channels_of(factor: Value, product: Value) -> bool:
    """Whether a factor has a number for each channel of the product, at the same axis."""
    if factor.channel is None or product.channel is None:
        return factor.shape == product.shape
    aligned = factor.channel - len(factor.shape) == product.channel - len(product.shape)
    return aligned and factor.shape[factor.channel] == product.shape[product.channel]
