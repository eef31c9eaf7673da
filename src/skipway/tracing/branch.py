"""What the branch of a residual connection is made of: maps, norms, factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from skipway.tracing.program import Program, Value
from skipway.tracing.residual_adds import BranchScale, NormPosition, ResidualAdd
from skipway.tracing.residual_slots import SlotPath
from skipway.tracing.stream_paths import StreamPath
from skipway.tracing.walks import CARRYING, SkipPath, Walker, effective_part

__all__ = ["BranchReader", "FoundAdd"]

PLAIN_SOFTMAX = frozenset({"_softmax", "softmax", "_safe_softmax", "_log_softmax", "log_softmax"})


@dataclass(frozen=True)
class FoundAdd:
    """An addition that is a connection.

    Args:
        value: the sum.
        skip: its operand that carries.
        branch: the other one.
        way: from where both come to the skip.
        residual: path of the `Residual` of ours that joins them, where the chain knows it by its slots.
    """

    value: Value
    skip: int
    branch: int
    way: SkipPath
    residual: str | None = None

    @property
    def owner(self) -> str:
        """Path of the module whose forward adds."""
        return self.value.owner if self.residual is None else self.residual


class BranchReader(Walker):
    """Describes connections.

    Args:
        program: that they were found in.
        skips: the sums, each with the operand that is the skip.
        cancelled: differences (x + F) − x, each with F.
        found: the connections in order.
    """

    def __init__(
        self, program: Program, skips: dict[int, int], cancelled: dict[int, int], found: Sequence[FoundAdd]
    ) -> None:
        super().__init__(program, skips, cancelled)
        self.found = found

    def describe_all(self) -> list[ResidualAdd]:
        """The connections in order, each described."""
        counts: dict[str, int] = {}
        totals: dict[str, int] = {}
        for each in self.found:
            totals[each.owner] = totals.get(each.owner, 0) + 1
        sums = []
        for each in self.found:
            owner = each.owner
            counts[owner] = counts.get(owner, 0) + 1
            number = f":{counts[owner]}" if totals[owner] > 1 else ""
            sums.append(self.describe(each, owner + number))
        return sums

    def describe(self, found: FoundAdd, name: str) -> ResidualAdd:
        program, value, skip, way = self.program, found.value, found.skip, found.way
        streams, slots = way.join if isinstance(way, StreamPath) else None, isinstance(way, SlotPath)
        start, branch = (way.start, found.branch) if streams is None else (streams.read, streams.branch)
        crossed = list(program.between(start, branch))
        maps = [member for member in crossed if effective_part(member) == "map"]
        signal_maps, in_order = self.path(branch, start)
        last = self.closing(branch, start)
        closing = last if last is not None and effective_part(last) == "norm" else None
        last_map = self.last_map(branch, start)
        joined = any(member.part == "join" for member in self.tail(branch, start))
        # what is added inside of a norm (global response normalisation) has no norms of its own
        placings = self.placings(value, replace(way, start=start), crossed, closing) if value.norm is None else ()
        return ResidualAdd(
            name=name,
            owner=found.owner,
            call=None if slots else value.call,
            term=value.term,
            skip_first=slots or value.operands[0] == skip,
            weights=(way.factor, self.factor(branch, start)),
            skip=way.skip,
            carry=tuple(sorted(set().union(*(self.factors(member) for member in way.crossed)))),
            shortcut=unique(
                self.program.weight_owner(member) if effective_part(member) == "map" else member.norm or member.owner
                for member in way.crossed
                if effective_part(member) in {"map", "norm"}
            ),
            maps=unique(self.program.weight_owner(member) for member in maps),
            path=signal_maps if in_order else (),
            signal_maps=signal_maps,
            modules=unique(member.owner for member in crossed),
            norms=placings,
            closing=None if closing is None or joined else closing.norm or self.program.weight_owner(closing),
            last=None if last_map is None or joined else self.program.weight_owner(last_map),
            ends=() if joined else self.ends(branch, start, value.number),
            scale=self.scale(branch, start),
            shape=value.shape,
            channel=self.branch_channel(value, branch)
            if slots
            else self.stream_channel(value)
            if streams is None or streams.channel is None
            else streams.channel,
            kind=kind_of(crossed),
            inner=tuple(member.number for member in crossed if member.number in self.skips),
            numbers=(skip, found.branch, value.number, way.start),
            streams=streams,
            slots=slots,
        )

    def branch_channel(self, value: Value, branch: int) -> int | None:
        """The channel axis of a sum, which may have an axis of streams in front, as its branch says."""
        added = self.program[branch]
        if added.channel is None:
            return self.stream_channel(value)
        return added.channel - len(added.shape) + len(value.shape)

    def stream_channel(self, value: Value) -> int | None:
        """The channel axis of a sum. Where no weight wrote the stream (the input itself), its branches decide: the last
        axis, if they write several, since a map over positions writes the other one.
        """
        root = self.roots.get(value.number)
        if root is None or self.program[root].channel is not None:
            return value.channel
        last = len(value.shape) - 1  # sums of one stream may have other axes, where it was flattened in between
        axes = {axis for axis in self.branch_channels[root] if axis <= last}
        return next(iter(axes)) if len(axes) == 1 else last if last in axes else None

    @cached_property
    def branch_channels(self) -> dict[int, set[int]]:
        """The channel axes that the branches on a stream write, by the value that the stream began with."""
        axes: dict[int, set[int]] = {root: set() for root in self.roots.values()}
        for each in self.found:
            branch, root = self.program[each.branch], self.roots.get(each.value.number)
            if root is not None and branch.channel is not None and len(branch.shape) == len(each.value.shape):
                axes[root].add(branch.channel)
        return axes

    @cached_property
    def roots(self) -> dict[int, int]:
        """For each sum with an identity skip the value that its stream began with."""
        roots: dict[int, int] = {}
        for each in self.found:
            if each.way.skip == "identity":
                roots[each.value.number] = roots.get(each.way.start, each.way.start)
        return roots

    def factors(self, value: Value) -> frozenset[str]:
        """Parameters that multiply a signal in one operator."""
        if value.part != "scale":
            return frozenset()
        return value.parameters

    def factor(self, branch: int, start: int) -> float:
        """The number that multiplies what the branch computes."""
        factor = 1.0
        for value in self.back(branch, start):
            if effective_part(value) not in CARRYING:
                break
            factor *= value.factor
        return factor

    def path(self, branch: int, start: int) -> tuple[tuple[str, ...], bool]:
        """The maps up to the end of a branch, in order, without those of what is added to them from outside of it; of a
        product those of `gated`. And whether they follow one another: not where tensors of the branch are added or
        joined on the way, or where a branch could be other than 0 though its last map is 0.
        """
        maps, waiting, seen, in_order = list[Value](), [branch], {start}, True
        while waiting:
            number = waiting.pop()
            if number in seen:
                continue
            seen.add(number)
            value = self.program[number]
            signals = self.program.signals(value)
            inside = [each for each in signals if each == start or self.program.depends(each, start)]
            outside = [each for each in signals if each not in inside and not self.positional[each]]
            is_product = value.norm is None and value.operator in {"mul", "mul_"}
            if value.norm is not None or number in self.cancelled:
                main = self.main_operand(value)
                inside, outside = [] if main is None else [main], []
            elif is_product and len(inside) > 1:
                inside = self.gated(inside)
            if value.part == "join" or not inside:
                in_order = False
            if len(inside) > 1 and not is_product:
                near = set().union(*(self.nearest_maps(each, start) for each in inside))
                if len(near) > 1 or (not maps and near == {start}):
                    in_order = False  # of one map it is an activation that is written out
            if not maps and outside and not is_product:
                in_order = False
            if not maps and len(inside) > 1 and len({self.last_map(each, start) for each in inside}) > 1:
                in_order = False  # a product of two maps: with one of them 0, the activation behind it need not be
            if effective_part(value) == "map":
                maps.append(value)
            waiting += inside
        return unique(self.program.weight_owner(each) for each in sorted(maps, key=lambda each: each.number)), in_order

    def nearest_maps(self, number: int, start: int) -> set[int]:
        """The maps, or the start, that a value is computed from without another map between."""
        waiting, seen, found = [number], set[int](), set[int]()
        while waiting:
            each = waiting.pop()
            if each in seen:
                continue
            seen.add(each)
            if each == start or effective_part(self.program[each]) == "map":
                found.add(each)
            else:
                signals = self.program.signals(self.program[each])
                waiting += [other for other in signals if other == start or self.program.depends(other, start)]
        return found

    def gated(self, factors: Sequence[int]) -> list[int]:
        """The largest factors of a product, without gates: those that are computed from another factor."""
        free = [
            each for each in factors if not any(self.program.depends(each, other) for other in factors if other != each)
        ]
        largest = max(map(self.spread, free))
        return [each for each in free if self.spread(each) == largest]

    def ends(self, number: int, start: int, following: int) -> tuple[str, ...]:
        """The norms or maps that make a branch, of all branches where it is a sum of some; none where one has none."""
        here: int | None = number
        while here is not None and here != start:
            value = self.program[here]
            if effective_part(value) in {"map", "norm"}:
                return (value.norm or self.program.weight_owner(value),)
            if self.is_sum_of_branches(value) and self.program.signal_users(here) == [following]:
                found = [self.ends(operand, start, here) for operand in value.operands]
                alone = all(self.program.signal_users(operand) == [here] for operand in value.operands)
                return tuple(name for names in found for name in names) if alone and all(found) else ()
            here, following = self.main_operand(value), here
        return ()

    def is_sum_of_branches(self, value: Value) -> bool:
        return value.part == "sum" and value.number not in self.skips and value.number not in self.cancelled

    def closing(self, branch: int, start: int) -> Value | None:
        """The last map or norm of a branch."""
        return next((value for value in self.back(branch, start) if effective_part(value) in {"map", "norm"}), None)

    def last_map(self, branch: int, start: int) -> Value | None:
        return next((value for value in self.back(branch, start) if effective_part(value) == "map"), None)

    def scale(self, branch: int, start: int) -> BranchScale | None:
        """The first multiplication by a parameter, coming from the end, before any work."""
        for value in self.back(branch, start):
            if effective_part(value) == "scale" and self.factors(value):
                constants = [self.program[o] for o in value.operands if not self.program[o].signal]
                return BranchScale(tuple(sorted(value.parameters)), any(constant.numel > 1 for constant in constants))
            if self.is_sum_of_branches(value):  # each with a scale of its own
                scales = [scale for operand in value.operands if (scale := self.scale(operand, start)) is not None]
                names = sorted({name for scale in scales for name in scale.parameters})
                each = len(scales) == len(value.operands)
                return BranchScale(tuple(names), any(scale.per_channel for scale in scales)) if each else None
            if effective_part(value) not in CARRYING | {"join"} and value.operator != "sum":
                return None
        return None

    def placings(
        self, value: Value, way: SkipPath, crossed: list[Value], closing: Value | None
    ) -> tuple[NormPosition, ...]:
        program = self.program
        found: list[NormPosition] = []
        members = {member.number for member in crossed}
        read_normed = isinstance(way, StreamPath) and way.join is not None and way.join.normed
        if read_normed or self.starts_with_norm(way, members, value.owner):
            found.append("pre")
        numbers = [member.number for member in crossed if effective_part(member) == "map"]
        norms = [member.number for member in crossed if effective_part(member) == "norm"]
        if numbers and any(
            any(program.depends(norm, early) for early in numbers)
            and any(program.depends(late, norm) for late in numbers)
            for norm in norms
        ):
            found.append("inside")
        if closing is not None and not (found == ["pre"] and self.is_first(closing, way, members)):
            found.append("end")
        if self.is_normed_after(value):
            found.append("post")
        return tuple(found)

    def is_first(self, norm: Value, way: SkipPath, members: set[int]) -> bool:
        """True if this is the only norm of the branch, which then starts with it."""
        before = self.before_norm(norm)
        return before is not None and (before == way.start or before not in members or self.only_carried(before, way))

    def only_carried(self, number: int, way: SkipPath) -> bool:
        return all(effective_part(member) in CARRYING for member in self.program.between(way.start, number))

    def starts_with_norm(self, way: SkipPath, members: set[int], owner: str) -> bool:
        """True if every path of the branch begins with a norm, which the skip may read as well."""
        program = self.program
        entries, waiting = [], [way.start]
        while waiting:
            for user in program.users[waiting.pop()]:
                if user in members:
                    (waiting if effective_part(program[user]) in CARRYING | {"join"} else entries).append(user)
        if entries and all(effective_part(program[entry]) == "norm" for entry in entries):
            return True
        here = program[way.start]
        while way.skip == "projection" and effective_part(here) in {"nonlinear", "carry", "scale"}:
            signals = program.signals(here)
            if len(signals) != 1:
                return False
            here = program[signals[0]]
        return way.skip == "projection" and effective_part(here) == "norm" and self.belongs(here, owner)

    def is_normed_after(self, value: Value) -> bool:
        """True if the sum passes a norm before it is the stream again: only a norm reads it, and a later connection
        carries the output of that norm; after the last connection, the norm is in the same module.
        """
        program = self.program
        readers = [user for user in program.users[value.number] if program[user].signal and not program[user].output]
        norms = [user for user in readers if effective_part(program[user]) == "norm"]
        if not norms or len(norms) != len(readers):
            return False
        number = norms[-1]
        while inside := [
            user
            for user in program.users[number]
            if program[user].norm is not None and program[user].norm == program[number].norm
        ]:
            number = inside[-1]
        if self.carried.get(number, -1) > value.number:
            return True
        owner, norm = value.owner, program[number].norm or program[number].owner
        return self.found[-1].value is value and bool(owner) and norm.startswith(owner + ".")

    @cached_property
    def carried(self) -> dict[int, int]:
        """The values that connections carry, each with the last sum that it is carried to."""
        return {
            number: each.value.number
            for each in self.found
            if each.way.skip != "projection"
            for number in (each.way.start, each.skip)
        }


def kind_of(crossed: list[Value]) -> Literal["attention", "conv", "mlp"]:
    """Attention where matrices of the signal are multiplied, convolutional where a convolution is.

    A softmax alone is none: routers of experts and channel gates have one.
    """
    products = (value.part == "product" and value.operator in {"bmm", "mm"} for value in crossed)
    if any(products) or any(value.part == "softmax" and value.operator not in PLAIN_SOFTMAX for value in crossed):
        return "attention"
    return "conv" if any("conv" in value.operator for value in crossed) else "mlp"


def unique(names: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
