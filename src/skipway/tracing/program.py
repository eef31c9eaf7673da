"""The program that a model ran on one example: what was computed from what, and in which module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from skipway.tracing.operators import Part

__all__ = ["Program", "Value"]


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of a forward pass.

    Args:
        number: its place in the program.
        operator: what the dispatcher ran, "convolution" say; "input" and "parameter" for what nothing computed.
        part: what that does to the signal.
        operands: numbers of the values it was computed from.
        output: which of the operator's outputs it is.
        owner: path of the innermost module that was running; "" is the model itself.
        norm: path of the innermost norm module that was running, None outside of norms.
        shape: its sizes.
        signal: whether it depends on the input.
        parameters: names of the parameters and buffers that it was computed from, where it is no signal.
        call: running number of the Python-level addition that made it, None where none did.
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
    """

    values: list[Value] = field(default_factory=list)
    calls: int = 0
    makers: dict[int, list[str]] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, number: int) -> Value:
        return self.values[number]

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def ancestors(self) -> list[int]:
        """For each value the set of signals it was computed from, as the bits of one integer."""
        sets: list[int] = []
        for value in self.values:
            own = 0
            for operand in value.operands:
                if self.values[operand].signal:
                    own |= sets[operand] | (1 << operand)
            sets.append(own)
        return sets

    @cached_property
    def users(self) -> list[list[int]]:
        """For each value the values computed from it."""
        users: list[list[int]] = [[] for _ in self.values]
        for value in self.values:
            for operand in dict.fromkeys(value.operands):
                users[operand].append(value.number)
        return users

    def depends(self, later: int, earlier: int) -> bool:
        """Whether `later` was computed from `earlier`."""
        return bool(self.ancestors[later] >> earlier & 1)

    def signals(self, value: Value) -> list[int]:
        """The operands that depend on the input, each once."""
        return [operand for operand in dict.fromkeys(value.operands) if self.values[operand].signal]

    def between(self, start: int, end: int) -> Iterator[Value]:
        """What was computed from `start` on the way to `end`, with `end` and without `start`, in order."""
        members = (self.ancestors[end] | (1 << end)) >> (start + 1)
        number = start + 1
        while members:
            if members & 1 and self.depends(number, start):
                yield self.values[number]
            members >>= 1
            number += 1

    def weight_owner(self, value: Value) -> str:
        """The module that owns the weight of a map or norm; where it ran, if its weight is nobody's parameter."""
        for operand in value.operands:
            constant = self.values[operand]
            if not constant.signal and len(constant.shape) > 0 and constant.parameters:
                return max(constant.parameters, key=len).rpartition(".")[0]
        return value.owner
