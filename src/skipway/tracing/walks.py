"""Walks through a program: back from a value through what carries the signal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

from skipway.tracing.operators import Part, is_linear_map
from skipway.tracing.program import Program, Value

__all__ = ["CARRYING", "LINEAR", "Skip", "SkipPath", "Walker", "effective_part"]

Skip = Literal["identity", "pooled", "upsampled", "projection", "mixed", "read"]

CARRYING: frozenset[str] = frozenset({"carry", "slice", "stride", "pad", "drop", "scale", "shift"})
LINEAR: frozenset[str] = CARRYING | {"pool", "map", "norm"}
COMPARISONS = frozenset(
    {"eq", "ne", "lt", "le", "gt", "ge", "isin", "logical_not", "logical_and", "logical_or", "logical_xor"}
    | {"bitwise_not", "bitwise_and", "bitwise_or", "bitwise_xor"}
)
LOOKUPS = frozenset({"embedding", "embedding_bag"})
COUNTS = frozenset({"cumsum", "cumprod", "sum", "argsort", "sort", "nonzero"})


def effective_part(value: Value) -> Part:
    return "norm" if value.norm is not None else value.part


@dataclass(frozen=True)
class SkipPath:
    """From a side of a sum back to the tensor `start` that the other side was computed from too."""

    start: int
    crossed: tuple[Value, ...]

    @property
    def skip(self) -> Skip:
        parts = {effective_part(value) for value in self.crossed}
        if parts & {"map", "norm"} or any(is_linear_map(each.operator) for each in self.crossed):
            return "projection"  # also where a map is one to more positions
        if parts & {"pool", "mean", "stride"}:
            return "pooled"
        return "upsampled" if "upsample" in parts else "identity"

    @property
    def weight(self) -> int:
        """Amount of work on the path; the skip is the side with less."""
        return sum(effective_part(value) in {"map", "norm", "pool", "mean"} for value in self.crossed)

    @property
    def factor(self) -> float:
        """The number that multiplies what is carried."""
        return prod((value.factor for value in self.crossed), start=1.0)


class Walker:
    """Walks back through a program.

    Args:
        program: that is walked through.
        skips: accepted sums, each with the operand that a walk goes on with.
        cancelled: differences (x + F) − x, each with F.
    """

    def __init__(self, program: Program, skips: dict[int, int], cancelled: dict[int, int]) -> None:
        self.program, self.skips, self.cancelled = program, skips, cancelled

    def way(self, side: int, other: int) -> SkipPath | None:
        """Back from `side` through carrying, pooling, norms and linear maps to what `other` was computed from."""
        program, crossed = self.program, []
        here = side
        while not program.depends(other, here):
            value = program[here]
            if value.operator == "cat" and value.norm is None and (joined := self.way_of_parts(value, other)):
                return SkipPath(joined.start, (*joined.crossed, value, *reversed(crossed)))
            if value.norm is not None:
                before = self.before_norm(value)
            elif value.number in self.skips:
                before = self.skips[value.number]
            elif (
                effective_part(value) in LINEAR
                or effective_part(value) in {"mean", "upsample"}
                or self.is_own_activation(value)
                or self.is_masked(value)
            ):
                signals = program.signals(value)
                if len(signals) > 1:
                    signals = [each for each in signals if not self.positional[each]]
                before = signals[0] if len(signals) == 1 else None
            else:
                before = None
            if before is None:
                return None
            crossed.append(value)
            here = before
        return SkipPath(here, tuple(reversed(crossed)))

    def way_of_parts(self, value: Value, other: int) -> SkipPath | None:
        """Back from the largest of several joined tensors, if all of them carry what `other` was computed from."""
        ways = {each: self.way(each, other) for each in self.program.signals(value)}
        starts = {None if way is None else way.start for way in ways.values()}
        projected = any(way is not None and way.skip == "projection" for way in ways.values())
        if len(ways) < 2 or None in starts or (projected and len(starts) > 1):
            return None
        return ways[max(ways, key=lambda each: self.program[each].numel)]

    def is_own_activation(self, value: Value) -> bool:
        """True for the activation of a norm-activation-map shortcut that has its own norm, as in DPN."""
        signals = self.program.signals(value)
        return value.part == "nonlinear" and len(signals) == 1 and effective_part(self.program[signals[0]]) == "norm"

    def is_masked(self, value: Value) -> bool:
        """True for a product with what tells padding from tokens."""
        signals = self.program.signals(value)
        return value.operator in {"mul", "mul_"} and sum(not self.positional[each] for each in signals) == 1

    @cached_property
    def positional(self) -> list[bool]:
        """For each value whether it tells only which tokens are padding, or counts them: comparisons of integers with
        each other, their running sums, and what is computed or looked up from those alone. A matrix times such a value
        is an embedding of the tokens.
        """
        counted = [False] * len(self.program)  # by a running sum, so that products with other integers are counts too
        found = [False] * len(self.program)
        for value in self.program.values:
            signals = self.program.signals(value)
            operator = value.operator.removesuffix("_") if not value.operator.startswith("_") else value.operator
            if not signals or not value.signal:
                continue
            whole = not any(self.program[each].floating for each in signals)
            counted[value.number] = whole and (operator in COUNTS or any(counted[each] for each in signals))
            found[value.number] = (effective_part(value) != "map" or value.operator in LOOKUPS) and (
                all(found[each] for each in signals)
                or (whole and operator in COMPARISONS)
                or (counted[value.number] and not value.floating)
            )
        return found

    def before_norm(self, value: Value) -> int | None:
        """The one tensor that went into the norm that `value` belongs to."""
        program = self.program
        inside, outside = [value.number], set()
        while inside:
            for operand in program.signals(program[inside.pop()]):
                if program[operand].norm == value.norm:
                    inside.append(operand)
                else:
                    outside.add(operand)
        return outside.pop() if len(outside) == 1 else None

    def spread(self, number: int) -> int:
        """Elements of a value before it was spread over positions, also by a mask that tells where to."""
        value = self.program[number]
        smallest = value.numel
        while True:
            signals = self.program.signals(value)
            marks = [each for each in signals if self.positional[each]]
            if self.is_masked(value) and marks:
                signals = [each for each in signals if each not in marks]
            elif value.part != "carry" or value.operator == "constant":
                break
            if len(signals) != 1:
                break
            value = self.program[signals[0]]
            smallest = min(smallest, value.numel)
        return smallest

    def main_operand(self, value: Value) -> int | None:
        """The operand that carries the branch on: the only signal, or at a gate the larger one."""
        if value.norm is not None:
            return self.before_norm(value)
        if value.number in self.cancelled:
            return self.cancelled[value.number]
        signals = self.program.signals(value)
        if len(signals) == 1:
            return signals[0]
        if value.part == "product" and value.operator in {"mul", "mul_"}:
            return max(signals, key=lambda operand: self.spread(operand))
        return None if value.part != "join" else max(signals)

    def back(self, branch: int, start: int) -> Iterator[Value]:
        """The values on the main way back from the end of a branch to its start."""
        here: int | None = branch
        while here is not None and here != start:
            value = self.program[here]
            yield value
            here = self.main_operand(value)

    def tail(self, branch: int, start: int) -> Iterator[Value]:
        """The values after the last map or norm of a branch."""
        for value in self.back(branch, start):
            if effective_part(value) in {"map", "norm"}:
                return
            yield value

    def belongs(self, value: Value, owner: str) -> bool:
        """True if a value was made in the module at `owner` or in one of its submodules."""
        return not owner or value.owner == owner or value.owner.startswith(owner + ".")
