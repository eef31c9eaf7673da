"""Connections over several streams: s'ⱼ = Σₖ Aⱼₖ sₖ + wⱼ F(x), where x is read from all streams s.

A and w may be numbers, parameters, or computed from s. What is a connection follows from how the values were computed:
the written tensor repeats F over an axis; the carried one leads back to the state s through what moves its elements and
through products with coefficients; all that F knows of s passes through x, which has fewer elements; and the axis was
opened by copying or stacking tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from torch import Tensor

from skipway.tracing.operators import is_linear_map
from skipway.tracing.program import Program, Value
from skipway.tracing.residual_adds import StreamAxis, StreamJoin
from skipway.tracing.walks import CARRYING, Skip, SkipPath, Walker, effective_part

__all__ = ["StreamJudge", "StreamPath"]

GATHERING = frozenset({"sum", "mean"})
"""Operators that end a product which was written out element by element."""
UNKNOWN = 0
"""The number of streams of a tensor that came in with them."""


@dataclass(frozen=True)
class StreamPath(SkipPath):
    """From what is carried back to the state of several streams.

    Args:
        mixing: numbers of the crossed values that weigh streams.
        written: the operand of the sum that holds F for every stream.
        join: how the streams are read and written.
    """

    mixing: frozenset[int] = field(default=frozenset())
    written: int = -1
    join: StreamJoin | None = None

    @property
    def skip(self) -> Skip:
        others = SkipPath(self.start, tuple(value for value in self.crossed if value.number not in self.mixing)).skip
        return "mixed" if others == "identity" and self.mixing else others

    @property
    def factor(self) -> float:
        return prod((value.factor for value in self.crossed if value.number not in self.mixing), start=1.0)


class StreamJudge(Walker):
    """Finds connections over several streams.

    Args:
        program, skips, cancelled: see `Walker`.
    """

    def __init__(self, program: Program, skips: dict[int, int], cancelled: dict[int, int]) -> None:
        super().__init__(program, skips, cancelled)
        self.states: dict[int, StreamJoin] = {}
        """The sums that are states, each with how it was joined."""
        self.origins: dict[int, int] = {}

    def connection(self, value: Value) -> tuple[int, StreamPath] | None:
        """The skip of a sum that is a connection over several streams, and the way to it; None of another sum."""
        for skip, written in (value.operands, value.operands[::-1]):
            for branch in self.branches(written, value.numel):
                path = self.path(value, skip, written, branch)
                if path is not None and path.join is not None:
                    self.states[value.number] = path.join
                    return skip, path
        return None

    def mixes_streams(self, value: Value) -> bool:
        """True if both sides of a sum are the same streams, mixed or not: a part of a skip and no connection."""
        ends = {self.origin(operand) for operand in value.operands}
        if len(ends) != 1:
            return False
        state = ends.pop()
        crossed = [self.program[each] for operand in value.operands for each in self.steps(operand)]
        return self.weighs_any(crossed) and self.opened(state) > 1

    def weighs_any(self, crossed: Iterable[Value]) -> bool:
        return any(self.weighs(each) for each in crossed)

    # The branch -------------------------------------------------------------------------------------------------------

    def branches(self, number: int, total: int) -> Iterator[int]:
        """Tensors that a written tensor repeats, the likeliest first: where going back the elements get fewer."""
        value = self.program[number]
        if value.numel < total:
            if total % value.numel == 0 and value.shape:
                yield self.put_out(number)
            return
        signals = self.program.signals(value)
        if value.norm is None and (value.part in CARRYING or self.weighs(value)):
            for operand in sorted(signals, key=self.spread, reverse=True):
                weights = [
                    self.spread(each) for each in signals if each != operand and value.operator in {"mul", "mul_"}
                ]
                if not self.positional[operand] and max(weights, default=0) < total:  # weights of streams, not elements
                    yield from self.branches(operand, total)

    def put_out(self, number: int) -> int:
        """The first value that a module has put out of those that a tensor is only another form of; else the first."""
        forms = [number]
        while True:
            value, signals = self.program[forms[-1]], self.program.signals(self.program[forms[-1]])
            if value.part != "carry" or len(signals) != 1 or self.program[signals[0]].numel != value.numel:
                return next((each for each in reversed(forms) if each in self.program.makers), forms[-1])
            forms.append(signals[0])

    # The skip ---------------------------------------------------------------------------------------------------------

    def path(self, value: Value, skip: int, written: int, branch: int) -> StreamPath | None:
        """The way from a state to what is carried, if the branch was computed from a read of that state."""
        state, crossed, rows = self.walk(skip, branch)
        if state is None:
            return None
        entry = next((self.beside(each) for each in crossed if each.operator == "cat"), None)
        read = self.read(state, branch if entry is None else entry, {each.number for each in crossed})
        units = value.numel // self.program[branch].numel
        count = self.opened(state)
        if count == UNKNOWN and (self.weighs_any(crossed) or self.weighs_any(self.program.between(branch, written))):
            count = units
        if read is None or count < 2 or not (units == count or self.writes_some(crossed, state, branch, count)):
            return None
        if all(effective_part(each) != "map" for each in self.program.between(read[0], branch)):
            return None
        axis, channel = self.axis(value, written, branch, count, units), self.channel(value, written, branch)
        mixing = self.mixing(value, skip, state, crossed, rows, channel)
        if mixing is None:
            return None
        join = StreamJoin(axis, channel, state, read[0], branch, normed=read[1])
        return StreamPath(state, tuple(reversed(crossed)), mixing=mixing, written=written, join=join)

    def walk(self, skip: int, branch: int) -> tuple[int | None, list[Value], list[Value]]:
        """Back from what is carried, by maps and norms too, to what the branch was computed from; from there on to the
        state that it was, only by what the branch reads other rows of. The state, what was crossed, the maps of rows.
        """
        state, crossed, mixing, here = None, [], [], skip
        while True:
            value = self.program[here]
            if self.program.depends(branch, here):
                state = here
            before = self.before(value)
            if before is None and state is None:
                before = self.before_projection(value)
            elif before is None and any(each.part == "slice" for each in crossed):
                before = self.before_rows(value)
                mixing += [value] if value.part == "map" else []
            if before is None:
                return state, crossed, mixing
            crossed.append(value)
            here = before

    def before_rows(self, value: Value) -> int | None:
        """The streams before an operator of whose result slices are carried and read: a map of them, or what prepares
        them laid end to end with what was read from them.
        """
        if value.operator == "cat":
            return self.weighed(value) if len(self.program.signals(value)) > 1 else None
        prepares = value.norm is not None or (value.part == "nonlinear" and len(self.program.signals(value)) == 1)
        if not prepares:
            return self.before_projection(value)
        before = self.before_norm(value) if value.norm is not None else self.program.signals(value)[0]
        here = before
        while here is not None and (each := self.program[here]).operator != "cat":
            signals = self.program.signals(each)
            here = self.before_norm(each) if each.norm is not None else signals[0] if len(signals) == 1 else None
        return None if here is None else before

    def beside(self, value: Value) -> int | None:
        """What was laid end to end with the streams."""
        streams = self.weighed(value)
        return next((each for each in self.program.signals(value) if each != streams), None)

    def mixing(
        self, value: Value, skip: int, state: int, crossed: list[Value], rows: list[Value], channel: int | None
    ) -> frozenset[int] | None:
        """Numbers of the values that weigh streams, maps among them where channels do not meet in what is carried; None
        where its weights differ between the channels.
        """
        apart = self.keeps_channels(value, skip, state, channel)
        found = [each for each in crossed if self.weighs(each) or each.operator in GATHERING]
        found += [each for each in crossed if each.part == "sum" and each.number not in self.skips]
        maps = [each for each in crossed if effective_part(each) == "map"] if apart else rows
        if apart is False and any(self.gates(each) for each in crossed):
            return None
        return frozenset(each.number for each in (*found, *maps))

    def gates(self, value: Value) -> bool:
        """True of a product, element by element, with as many weights as there are elements."""
        signals = self.program.signals(value)
        return value.operator in {"mul", "mul_"} and all(self.spread(each) >= value.numel for each in signals)

    def keeps_channels(self, value: Value, skip: int, state: int, channel: int | None) -> bool | None:
        """Whether all channels are carried alike: where those of the state are equal, so are those of the skip; None
        where that cannot be told.
        """
        shape, known = self.program[state].shape, self.states.get(state)
        axis = self.program[state].channel if known is None else known.channel
        if axis is None or channel is None or skip == state:
            return None
        generator = torch.Generator().manual_seed(0)
        random = partial(torch.rand, generator=generator, dtype=torch.float64, device="cpu")
        equal = random((*shape[:axis], 1, *shape[axis + 1 :]))
        carried = self.replayed(skip, state, equal, lambda other: random(other.shape))
        if carried is None or carried.shape != value.shape:
            return None
        return bool((carried - carried.narrow(channel, 0, 1)).abs().max() < 1e-9)

    def writes_some(self, crossed: list[Value], state: int, branch: int, count: int) -> bool:
        """True if a slice of the streams is carried, of which not all are written."""
        sliced = any(each.part == "slice" for each in crossed)
        return sliced and self.program[state].numel == count * self.program[branch].numel

    def steps(self, number: int) -> Iterator[int]:
        """A value and those before it on the way of the streams, up to the state that they were."""
        here: int | None = number
        while here is not None:
            yield here
            here = self.before(self.program[here])

    def before(self, value: Value) -> int | None:
        """The operand that holds the streams: of what moves them, weighs them, or adds them to themselves."""
        if value.number in self.states or value.norm is not None or value.operator == "alias":
            return None
        signals = [each for each in self.program.signals(value) if not self.positional[each]]
        if value.part in CARRYING or value.operator in GATHERING:
            alone = len(signals) == 1 and (value.part == "pad" or self.program[signals[0]].numel >= value.numel)
            return signals[0] if alone else None
        if value.part == "sum" and value.number not in self.skips:
            ends = {self.origin(each) for each in signals}
            return ends.pop() if len(ends) == 1 and self.opened(min(ends)) > 1 else None
        return self.weighed(value) if self.weighs(value) else None

    def before_projection(self, value: Value) -> int | None:
        """The operand of a map or pooling, of one that adds, or what a norm has normed."""
        if value.number in self.states:
            return None
        if value.number in self.skips:
            return self.skips[value.number]
        signals = self.program.signals(value)
        projects = effective_part(value) in {"map", "pool"} and len(signals) == 1
        return self.before_norm(value) if value.norm is not None else signals[0] if projects else None

    def weighs(self, value: Value) -> bool:
        """True of a product of two signals, and of a product with numbers of which each multiplies a whole row."""
        if value.norm is not None:
            return False
        if value.part == "product":
            return value.operator in {"mul", "mul_"} or is_linear_map(value.operator)
        if value.part != "map" or value.operator not in {"mm", "bmm"}:
            return False
        return self.program[value.operands[0]].shape[-1] == 1

    def weighed(self, value: Value) -> int | None:
        """The factor that is the state: the one that the other was computed from, else the larger one."""
        signals = self.program.signals(value)
        if len(signals) < 2:
            return signals[0] if signals else None
        first, second = signals[:2]
        ends = self.origin(first), self.origin(second)
        if self.program.depends(ends[1], ends[0]):
            return first
        if self.program.depends(ends[0], ends[1]):
            return second
        return max(signals, key=self.spread)

    def origin(self, number: int) -> int:
        """The end of the way back from a value."""
        if number not in self.origins:
            before = self.before(self.program[number])
            self.origins[number] = number if before is None else self.origin(before)
        return self.origins[number]

    # The streams ------------------------------------------------------------------------------------------------------

    def opened(self, number: int) -> int:
        """The streams of a state: those of the sum that it was, or as many copies or stacked tensors as it was made of;
        1 where none were opened, `UNKNOWN` of what the model is called with.
        """
        return self.opening(number)[0]

    def origin_of_streams(self, number: int) -> int:
        """What was copied or stacked to make a state, or the state itself."""
        return self.opening(number)[1]

    def opening(self, number: int) -> tuple[int, int]:
        """The number of streams, and what they were made of; the state itself where that is several tensors."""
        here: int | None = number
        came_in = True
        while here is not None:
            value = self.program[here]
            if here in self.states:
                return self.states[here].axis.count, number
            signals = self.program.signals(value)
            if value.operator == "stack" or (value.operator == "cat" and len(set(value.operands)) == 1):
                return len(value.operands), value.operands[0] if len(set(value.operands)) == 1 else number
            if value.part in {"slice", "mean"}:
                return 1, number
            if value.operator == "input":
                return UNKNOWN if came_in else 1, number
            came_in &= value.part in CARRYING or here in self.skips
            # what was written into a part of an alias adds no streams
            here = signals[0] if len(signals) == 1 or value.operator == "alias" else None
            if value.norm is not None:
                here = self.before_norm(value)
            if value.number in self.skips:
                here = self.skips[value.number]
            if here is not None and value.part in CARRYING and value.numel > (size := self.program[here].numel):
                return value.numel // size, here
        return 1, number

    def read(self, state: int, branch: int, carried: set[int]) -> tuple[int, bool] | None:
        """The first value that all that the branch knows of the state passes through and that is smaller than it; and
        whether all has passed a norm before.
        """
        members = {each.number for each in self.program.between(state, branch)}
        same = self.equal_values(members)
        reach, normed = self.last_user(state, members, same), False
        for number in sorted(members - same.keys()):
            value = self.program[number]
            if reach <= number and number not in carried:
                normed |= value.norm is not None
                if value.numel < self.program[state].numel:
                    return number, normed
            copies = (number, *(each for each, first in same.items() if first == number))
            reach = max(reach, *(self.last_user(each, members, same) for each in copies))
        return None

    def last_user(self, number: int, members: set[int], same: dict[int, int]) -> int:
        return max((user for user in self.program.users[number] if user in members and user not in same), default=-1)

    def equal_values(self, members: set[int]) -> dict[int, int]:
        """Of values that were computed alike from the same ones, each with the first: a slice that was taken twice."""
        first: dict[object, int] = {}
        same = {}
        for number in sorted(members):
            value = self.program[number]
            if value.part == "slice" and value.operation is not None:
                before = first.setdefault((value.operation, value.output), number)
                if before != number:
                    same[number] = before
        return same

    def replayed(
        self, number: int, source: int, held: Tensor, default: Callable[[Value], Tensor] | None = None
    ) -> Tensor | None:
        """A value where `source` holds given numbers, and weights are 1 or `default`; None where that is not known."""
        try:
            given = {source: held.expand(self.program[source].shape)}
            return self.program.replay(number, given, default or ones_like)
        except (RuntimeError, TypeError, ValueError, IndexError):  # an operator that wants other numbers
            return None

    def axis(self, value: Value, written: int, branch: int, count: int, units: int) -> StreamAxis:
        """The axis of the sum that the streams lie on: the one along which it takes the same element of F."""
        numbers = torch.arange(self.program[branch].numel, dtype=torch.float64).view(self.program[branch].shape)
        index = self.replayed(written, branch, numbers)
        found = None if index is None else repeated_axis(index.expand(value.shape), units)
        return StreamAxis(count, *(found or (None, 1)))

    def channel(self, value: Value, written: int, branch: int) -> int | None:
        """The axis of the sum that holds the channels of F."""
        axis, shape = self.program[branch].channel, self.program[branch].shape
        if axis is None:
            return None
        numbers = torch.arange(shape[axis], dtype=torch.float64).view(-1, *(1,) * (len(shape) - 1 - axis))
        index = self.replayed(written, branch, numbers)
        if index is None:
            return None
        index = index.expand(value.shape)
        axes = (place for place in range(index.ndim) if bool((index != index.narrow(place, 0, 1)).any()))
        return next(axes, None)


def ones_like(value: Value) -> Tensor:
    return torch.ones(value.shape, dtype=torch.float64)


def repeated_axis(index: Tensor, units: int) -> tuple[int, int] | None:
    """The axis along which numbers repeat, and the stride between those that are the same.

    >>> repeated_axis(torch.tensor([[0, 0], [1, 1]]), 2), repeated_axis(torch.tensor([0, 1, 2, 0, 1, 2]), 2)
    ((1, 1), (0, 3))
    """
    for axis, size in enumerate(index.shape):
        for stride in (each for each in range(1, size // units + 1) if size % (units * each) == 0):
            apart = index.unflatten(axis, (-1, units, stride))
            if bool((apart == apart.narrow(axis + 1, 0, 1)).all()):
                return axis, stride
    return None
