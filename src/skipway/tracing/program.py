"""The program that a model ran on one example: what was computed from what, and in which module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heappop, heappush

from torch import Tensor

from skipway.tracing.arguments import Path
from skipway.tracing.operator_call import OperatorCall
from skipway.tracing.operators import Part

__all__ = ["Ancestry", "Program", "Value"]

REMEMBERED = 64
"""Ancestries that a program keeps: those that are asked for again are asked for soon."""


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of a forward pass.

    Args:
        number: its place in the program.
        operator: name of the dispatched operator, for example "convolution"; "input" and "parameter" for leaves.
        part: what that does to the signal.
        operands: numbers of the values it was computed from.
        output: which of the operator's outputs it is.
        owner: path of the innermost module that was running; "" is the model itself.
        norm: path of the innermost norm module that was running, None outside of norms.
        shape: its sizes.
        signal: whether it depends on the input.
        parameters: names of the parameters and buffers that it was computed from, where it is no signal.
        call: running number of the Python-level addition that made it, None where none did.
        term: which of the terms of that addition it adds, from 0: 1 unless more than two are added.
        factor: the number that the operator multiplies its signal by.
        written: whether it was written into the tensor that held its first operand.
        floating: whether its elements are real or complex numbers, rather than integers or truth values.
        channel: the axis that holds the channels, see `skipway.tracing.channels`; None where that is unknown.
        operation: what made it, to be run again; None of leaves, and where the storage was written into.
    """

    number: int
    operator: str
    part: Part
    operands: tuple[int, ...]
    output: int
    owner: str
    norm: str | None
    shape: tuple[int, ...]
    signal: bool
    parameters: frozenset[str] = frozenset()
    call: int | None = None
    term: int = 1
    factor: float = 1.0
    written: bool = False
    floating: bool = True
    channel: int | None = None
    operation: OperatorCall | None = field(default=None, repr=False, compare=False)

    @property
    def numel(self) -> int:
        size = 1
        for axis in self.shape:
            size *= axis
        return size


@dataclass
class Program:
    """All values of one forward pass, in order.

    Args:
        values: each with operands that stand before it.
        calls: how many additions were called from Python.
        makers: for a value the modules that put it out, innermost first.
        runs: how often each module ran.
        left: how many values there were when each module was left, the last time that it ran.
        given: the values that each module was called with the last time that it ran, by their paths in the arguments.
        returned: the values that it returned then, by their paths in the output.
        readers: modules that read values of the signal, so that Python can decide by them, in order.
        selectors: modules that put out as many rows as values of the signal say, in order.
        on_meta: whether it was watched on the meta device.
        ancestries: those that were asked for last.
    """

    values: list[Value] = field(default_factory=list)
    calls: int = 0
    makers: dict[int, list[str]] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    given: dict[str, dict[Path, int]] = field(default_factory=dict)
    returned: dict[str, dict[Path, int]] = field(default_factory=dict)
    readers: list[str] = field(default_factory=list)
    selectors: list[str] = field(default_factory=list)
    on_meta: bool = False
    ancestries: dict[int, Ancestry] = field(default_factory=dict, repr=False)

    def __getitem__(self, number: int) -> Value:
        return self.values[number]

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def users(self) -> list[list[int]]:
        """For each value the values computed from it."""
        users: list[list[int]] = [[] for _ in self.values]
        for value in self.values:
            for operand in dict.fromkeys(value.operands):
                users[operand].append(value.number)
        return users

    @cached_property
    def leaves(self) -> dict[str, list[int]]:
        """The values that each parameter and buffer is read as, by its name."""
        leaves: dict[str, list[int]] = {}
        for value in self.values:
            if value.operator == "parameter" and len(value.parameters) == 1:
                leaves.setdefault(next(iter(value.parameters)), []).append(value.number)
        return leaves

    def ancestry(self, number: int) -> Ancestry:
        """The signals that a value was computed from, looked up as far back as is asked."""
        if number not in self.ancestries:
            if len(self.ancestries) >= REMEMBERED:
                del self.ancestries[next(iter(self.ancestries))]
            self.ancestries[number] = Ancestry(self, number)
        return self.ancestries[number]

    def depends(self, later: int, earlier: int) -> bool:
        """True if `later` was computed from `earlier`."""
        return earlier < later and earlier in self.ancestry(later)

    def signals(self, value: Value) -> list[int]:
        """The operands that depend on the input, each once."""
        return [operand for operand in dict.fromkeys(value.operands) if self.values[operand].signal]

    def signal_users(self, number: int) -> list[int]:
        """The values of the signal that are computed from a value.

        A stack that is summed over is no reader, since that sum is written down as one of the stack's members.
        """
        signals = [user for user in self.users[number] if self.values[user].signal]
        return [user for user in signals if self.values[user].part != "join" or not self.is_summed(user)]

    def is_summed(self, number: int) -> bool:
        """True if nothing is computed from a value and it is not put out."""
        return number not in self.makers and all(self.is_summed(user) for user in self.users[number])

    def writes_into(self, value: Value, number: int) -> bool:
        """True if a value was written into a tensor that held another one, or a view of it."""
        while value.written or value.part in {"carry", "slice"}:
            if value.written and number in value.operands[:1]:
                return True
            if not value.operands or value.operands[0] < number:
                return False
            value = self.values[value.operands[0]]
        return False

    def between(self, start: int, end: int) -> Iterator[Value]:
        """The values on the way from `start` (excluded) to `end` (included), in order."""
        reached = {start}
        for number in sorted((end, *self.ancestry(end).since(start + 1))):
            if not reached.isdisjoint(self.signals(self.values[number])):
                reached.add(number)
                yield self.values[number]

    def replay(self, number: int, given: dict[int, Tensor], default: Callable[[Value], Tensor]) -> Tensor | None:
        """Compute a value again where those in `given` hold other tensors, and what they do not reach holds `default`;
        None where that cannot be done.
        """
        held = dict(given)
        for each in sorted((number, *self.ancestry(number).since(min(given)))):
            value = self.values[each]
            if each in held or held.keys().isdisjoint(value.operands):
                continue
            if value.operation is None:
                return None
            made = value.operation.run(
                lambda one: held[one] if one in held else default(self.values[one]), value.output
            )
            held[each] = made
        return held.get(number)

    def weight_owner(self, value: Value) -> str:
        """The module that owns the weight of a map or norm; where it ran, if its weight is nobody's parameter."""
        for operand in value.operands:
            constant = self.values[operand]
            if not constant.signal and len(constant.shape) > 0 and constant.parameters:
                owner, _, name = max(constant.parameters, key=len).rpartition(".")
                if name == "_flat_param":  # FSDP1 lays many into one
                    return value.owner
                return f".{owner}".partition(".parametrizations.")[0].removeprefix(".")
        return value.owner


class Ancestry:
    """The signals that one value was computed from, found from the latest to the earliest.

    A question about a near ancestor looks at what is near only, so that reading a chain takes time in proportion to its
    length. All ancestors of all values would be bits in the square of it.

    Args:
        program: that the value is of.
        number: of the value.
    """

    def __init__(self, program: Program, number: int) -> None:
        self.program = program
        self.found: set[int] = set()
        self.waiting: list[int] = []  # a heap of found values whose operands are not yet visited, latest first
        self.expand(number)

    def expand(self, number: int) -> None:
        for operand in self.program.signals(self.program[number]):
            if operand not in self.found:
                self.found.add(operand)
                heappush(self.waiting, -operand)

    def look_back(self, to: int) -> None:
        """Find all ancestors from `to` on."""
        while self.waiting and -self.waiting[0] > to:
            self.expand(-heappop(self.waiting))

    def __contains__(self, number: int) -> bool:
        self.look_back(number)
        return number in self.found

    def since(self, first: int) -> list[int]:
        """All of them from the value `first` on."""
        self.look_back(first)
        return [number for number in self.found if number >= first]
