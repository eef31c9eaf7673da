"""Where a connection of somebody's network can read and write several streams."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from skipway.errors import SkipwayError
from skipway.surgery.block_call import CONTAINERS, BlockCall, parameter_names
from skipway.surgery.insertion import INPUT, OUTPUT
from skipway.tracing import Program
from skipway.tracing.chain import WatchedConnection
from skipway.tracing.paths import parents

__all__ = ["StreamPoints", "find_stream_points"]


@dataclass(frozen=True)
class StreamPoints:
    """The modules between which the branch of a connection runs.

    Args:
        first: the module in front of which the streams are read.
        call: which argument of it is x.
        last: the module behind which they are written.
    """

    first: str
    call: BlockCall
    last: str

    def __str__(self) -> str:
        return self.first if self.first == self.last else f"{self.first} to {self.last}"


def find_stream_points(model: nn.Module, program: Program, connection: WatchedConnection, block: str) -> StreamPoints:
    """Find the module that alone reads x for a branch, and the one that returns just what is added.

    Raises:
        SkipwayError: there are none; says why.
    """
    seen = connection.seen
    skip, branch, total, start = seen.numbers
    if skip != start or seen.weights != (1.0, 1.0) or seen.skip != "identity" or seen.carry:
        raise SkipwayError("what is added to is not x itself, or not with factors of 1")
    if any(program.writes_into(member, start) for member in [*program.between(start, branch), program[total]]):
        raise SkipwayError("it writes into x")
    readers = {program[user].owner for user in program.signal_users(start) if user != total}
    found = []
    for name, given in program.given.items():
        paths = [path for path, number in given.items() if number == start]
        around = within(seen.owner, name) or not all(within(each, name) for each in readers)
        if len(paths) == 1 and not around and is_usable(model, program, name, block, INPUT):
            found.append((name, paths[0]))
    if not readers or not found:
        raise SkipwayError("no module alone is given x, as one argument")
    if program.signal_users(branch) != [total]:
        raise SkipwayError("what is added is read by something else too")
    makers = [each for each in program.makers.get(branch, []) if is_usable(model, program, each, block, OUTPUT)]
    last = next((each for each in reversed(makers) if returns(program, each, branch)), None)
    if last is None:
        raise SkipwayError("no module returns what is added")
    name, path = min(found, key=lambda each: each[0].count("."))
    return StreamPoints(name, BlockCall(path, (), parameter_names(model.get_submodule(name))), last)


def is_usable(model: nn.Module, program: Program, name: str, block: str, slot: str) -> bool:
    """Whether a slot of a module of a block is free: the module runs once, and runs no children in a row."""
    if not name or block not in parents(name) or program.runs.get(name) != 1:
        return False
    module = model.get_submodule(name)
    return slot not in module._modules and not isinstance(module, CONTAINERS)


def returns(program: Program, name: str, number: int) -> bool:
    """Whether a value is the output of a module, or the first one that it returns."""
    return any(path in ((), (0,)) for path, each in program.returned.get(name, {}).items() if each == number)


def within(name: str, module: str) -> bool:
    """Whether a module is another one or a part of it."""
    return f"{name}.".startswith(f"{module}.")
