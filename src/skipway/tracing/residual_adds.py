"""Residual adds: the additions of a program that are residual connections, and the reasons why the others are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from skipway.tracing.operators import Part
from skipway.tracing.program import Program, Value

__all__ = ["REASONS", "BranchScale", "NormPosition", "Reason", "Refusal", "ResidualAdd", "Skip", "find_residual_adds"]

Skip = Literal["identity", "pooled", "projection"]
NormPosition = Literal["pre", "inside", "end", "post"]
Reason = Literal["constant", "attention", "broadcast", "hierarchical", "pyramid", "parallel", "rotary", "unrelated"]

REASONS: dict[Reason, str] = {
    "constant": "one side does not depend on the input: a position embedding, a bias or a mask",
    "attention": "the sum goes into a softmax: a bias of attention scores",
    "broadcast": "one side is a vector spread over positions: a gate-like sum",
    "hierarchical": "the sides read different channels or tokens of one tensor, as in Res2Net",
    "pyramid": "a sum across resolutions: the sides come from maps of different sizes",
    "parallel": "both sides do the same kind of work: parallel branches, neither of which carries the stream",
    "rotary": "neither side holds a map or a non-linearity, as in a rotary embedding",
    "unrelated": "neither side carries a tensor that the other was computed from",
}

CARRYING: frozenset[str] = frozenset({"carry", "slice", "stride", "pad", "drop", "scale", "shift"})
LINEAR: frozenset[str] = CARRYING | {"pool", "map", "norm"}
NONLINEAR: frozenset[str] = frozenset({"nonlinear", "softmax", "product", "other"})
WORK: frozenset[str] = NONLINEAR | {"map", "norm", "pool", "mean"}


@dataclass(frozen=True)
class BranchScale:
    """A learned factor on the output of a branch, as in LayerScale or SkipInit.

    Args:
        parameters: the names of the parameters it is made of.
        per_channel: whether there is one factor for each channel, instead of one for all.
    """

    parameters: tuple[str, ...]
    per_channel: bool


@dataclass(frozen=True)
class ResidualAdd:
    """An addition that is a residual connection: y = x + F(x).

    Args:
        name: path of the module whose forward adds, with ":2" for its second connection.
        owner: that path alone.
        call: running number of the addition among those that Python calls; None where none did.
        skip_first: whether the skip is the first operand of the addition.
        skip: "identity" (x itself), "pooled" (x on fewer positions), "projection" (through linear maps or norms).
        carry: names of parameters that multiply the skip.
        shortcut: modules that own the linear maps and norms of the skip, in order.
        maps: modules that own the linear maps of the branch, in order; attention's queries and keys among them.
        modules: all modules that the branch runs in, in order.
        norms: positions of norms: "pre", "inside" or "end" of the branch, "post" after the sum.
        closing: the norm at the end of the branch, None where there is none or several are joined.
        last: the linear map that makes what the branch puts out, None where there is none or several are joined.
        scale: what multiplies the branch, None where nothing does.
        shape: of the sum.
        kind: what the branch does: "attention", "conv" or "mlp".
        numbers: of the values skip, branch and sum in the program, and of the x that both were computed from.
    """

    name: str
    owner: str
    call: int | None
    skip_first: bool
    skip: Skip
    carry: tuple[str, ...]
    shortcut: tuple[str, ...]
    maps: tuple[str, ...]
    modules: tuple[str, ...]
    norms: tuple[NormPosition, ...]
    closing: str | None
    last: str | None
    scale: BranchScale | None
    shape: tuple[int, ...]
    kind: Literal["attention", "conv", "mlp"]
    numbers: tuple[int, int, int, int]


@dataclass(frozen=True)
class Refusal:
    """An addition that is no residual connection.

    Args:
        owner: path of the module whose forward adds.
        reason: a key of `REASONS`, which says it in words.
        shape: of the sum.
    """

    owner: str
    reason: Reason
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.owner or 'the model'}: {REASONS[self.reason]}"


def find_residual_adds(program: Program) -> tuple[list[ResidualAdd], list[Refusal]]:
    """All additions of a program: the residual connections in order, and the refused with their reasons."""
    reader = AddClassifier(program)
    refused: list[Refusal] = []
    for value in program.values:
        if not value.signal:
            continue
        if value.part == "shift" and value.call is not None and is_tensor_sum(program, value):
            refused.append(Refusal(value.owner, "constant", value.shape))
        elif value.part == "sum":
            reason = reader.judge(value)
            if (
                reason is not None and value.call is not None
            ):  # else a step of a composite operator, for example an LSTM
                refused.append(Refusal(value.owner, reason, value.shape))
    return reader.finish(), refused


def is_tensor_sum(program: Program, value: Value) -> bool:
    """True if a tensor made from parameters was added, not a number."""
    return any(not program[operand].signal for operand in value.operands)


@dataclass(frozen=True)
class SkipPath:
    """From a side of a sum back to the tensor `start` that the other side was computed from too."""

    start: int
    crossed: tuple[Value, ...]

    @property
    def skip(self) -> Skip:
        parts = {effective_part(value) for value in self.crossed}
        return (
            "projection" if parts & {"map", "norm"} else "pooled" if parts & {"pool", "mean", "stride"} else "identity"
        )

    @property
    def weight(self) -> int:
        """Amount of work on the path; the skip is the side with less."""
        return sum(effective_part(value) in {"map", "norm", "pool", "mean"} for value in self.crossed)


def effective_part(value: Value) -> Part:
    return "norm" if value.norm is not None else value.part


class AddClassifier:
    """Judges the additions of a program, in order."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.found: list[tuple[Value, int, int, SkipPath]] = []
        self.skips: dict[int, int] = {}  # accepted sums, with the skip operand that a walk goes on with

    def judge(self, value: Value) -> Reason | None:
        """Accept the sum as a connection and return None, or return the reason why it is none."""
        first, second = self.sides(value)
        if first == second or value.number in self.into_softmax:
            return "attention" if first != second else "parallel"
        ways = [(self.way(u, v), u, v) for u, v in ((first, second), (second, first))]
        ways = [(way, u, v) for way, u, v in ways if way is not None]
        if not ways:
            return self.unrelated(first, second, value.owner)
        ways.sort(key=lambda entry: (entry[0].weight, len(entry[0].crossed)))
        way, skip, branch = ways[0]
        assert way is not None
        reason = self.objection(value, way, skip, branch)
        if reason is None:
            self.found.append((value, skip, branch, way))
            self.skips[value.number] = skip
        return reason

    def sides(self, value: Value) -> tuple[int, int]:
        """The two operands; an addition in place reads its own old value first."""
        return value.operands[0], value.operands[1]

    def objection(self, value: Value, way: SkipPath, skip: int, branch: int) -> Reason | None:
        """The reason to refuse a sum although one side leads back to a tensor that the other was computed from."""
        program = self.program
        crossed = list(program.between(way.start, branch))
        parts = {effective_part(member) for member in crossed}
        if not parts & WORK:
            return "rotary"
        if way.skip != "projection":
            if min(self.spread(skip), self.spread(branch)) < value.numel:
                return "broadcast"
            return "hierarchical" if self.reads_other_slices(way, branch) else None
        if min(self.spread(skip), self.spread(branch)) < value.numel:
            return "broadcast"
        if "upsample" in parts or any(member.part == "upsample" for member in way.crossed):
            return "pyramid"
        if self.reads_other_slices(way, branch):
            return "hierarchical"
        if not parts & NONLINEAR or self.is_local_encoding(value, way, parts):
            return "parallel"
        activated = any(member.part == "nonlinear" for member in way.crossed)
        if activated and sum(effective_part(member) == "map" for member in crossed) <= 1:
            return "parallel"
        return None

    def unrelated(self, first: int, second: int, owner: str) -> Reason:
        """The reason to refuse a sum neither side of which leads back to the origin of the other."""
        if min(self.spread(first), self.spread(second)) < max(self.program[first].numel, self.program[second].numel):
            return "broadcast"
        sides = [{number, *self.program.ancestry(number).since(0)} for number in (first, second)]
        shared = sides[0] & sides[1]
        own = [[self.program[number] for number in side - shared] for side in sides]
        sizes = [max((spatial_size(member) for member in members), default=0) for members in own]
        if any(member.part == "upsample" for members in own for member in members) or sizes[0] != sizes[1]:
            return "pyramid"
        latest = max(shared, default=-1)
        members = [member for side in own for member in side if effective_part(member) not in CARRYING]
        at_home = all(self.belongs(member, owner) for member in members)
        since = all(member.number > latest for member in members)
        return "parallel" if shared and (at_home or since) else "unrelated"

    def way(self, side: int, other: int) -> SkipPath | None:
        """Back from `side` through carrying, pooling, norms and linear maps to what `other` was computed from."""
        program, crossed = self.program, []
        here = side
        while not program.depends(other, here):
            value = program[here]
            if value.norm is not None:
                before = self.before_norm(value)
            elif value.number in self.skips:
                before = self.skips[value.number]
            elif (
                effective_part(value) in LINEAR
                or effective_part(value) in {"mean", "upsample"}
                or self.is_own_activation(value)
            ):
                signals = program.signals(value)
                before = signals[0] if len(signals) == 1 else None
            else:
                before = None
            if before is None:
                return None
            crossed.append(value)
            here = before
        return SkipPath(here, tuple(reversed(crossed)))

    def is_own_activation(self, value: Value) -> bool:
        """True for the activation of a norm-activation-map shortcut that has its own norm, as in DPN."""
        signals = self.program.signals(value)
        return value.part == "nonlinear" and len(signals) == 1 and effective_part(self.program[signals[0]]) == "norm"

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
        """Elements of a value before it was spread over positions."""
        value = self.program[number]
        smallest = value.numel
        while value.part == "carry" and value.operator != "constant":
            signals = self.program.signals(value)
            if len(signals) != 1:
                break
            value = self.program[signals[0]]
            smallest = min(smallest, value.numel)
        return smallest

    @cached_property
    def into_softmax(self) -> frozenset[int]:
        """The values between which and a softmax stand nothing but carrying and sums."""
        found: set[int] = set()
        for value in reversed(self.program.values):
            softmax = value.part == "softmax" and value.operator in SOFTMAX
            if softmax or (value.number in found and value.part in CARRYING | {"sum"}):
                found.update(value.operands)
        return frozenset(found)

    def reads_other_slices(self, way: SkipPath, branch: int) -> bool:
        """True if the skip is a slice of a tensor of which the branch reads only other slices."""
        if not any(value.part == "slice" for value in way.crossed):
            return False
        users = [user for user in self.program.users[way.start] if user == branch or self.program.depends(branch, user)]
        return all(self.program[user].part == "slice" for user in users)

    def is_local_encoding(self, value: Value, way: SkipPath, parts: set[Part]) -> bool:
        """True if the skip is a shape-preserving map in parallel to attention: a local position encoding."""
        if not parts & {"product", "softmax"} or self.program[way.start].numel != value.numel:
            return False
        # a product by a gate (squeeze-and-excitation) is no attention: one side of it is a vector
        return any(
            member.part in {"product", "softmax"}
            and all(self.program[operand].numel >= 1 for operand in member.operands)
            and member.operator not in {"mul", "mul_", "div", "sigmoid"}
            for member in self.program.between(way.start, value.number)
        )

    def finish(self) -> list[ResidualAdd]:
        """The connections in order, each described."""
        counts: dict[str, int] = {}
        totals: dict[str, int] = {}
        for value, *_ in self.found:
            totals[value.owner] = totals.get(value.owner, 0) + 1
        sums = []
        for value, skip, branch, way in self.found:
            counts[value.owner] = counts.get(value.owner, 0) + 1
            number = f":{counts[value.owner]}" if totals[value.owner] > 1 else ""
            sums.append(self.describe(value, skip, branch, way, value.owner + number))
        return sums

    def describe(self, value: Value, skip: int, branch: int, way: SkipPath, name: str) -> ResidualAdd:
        program = self.program
        crossed = list(program.between(way.start, branch))
        maps = [member for member in crossed if effective_part(member) == "map"]
        last = self.closing(branch, way.start)
        closing = last if last is not None and effective_part(last) == "norm" else None
        last_map = self.last_map(branch, way.start)
        joined = any(member.part == "join" for member in self.tail(branch, way.start))
        # what is added inside of a norm (global response normalisation) has no norms of its own
        placings = self.placings(value, way, crossed, closing) if value.norm is None else ()
        return ResidualAdd(
            name=name,
            owner=value.owner,
            call=value.call,
            skip_first=value.operands[0] == skip,
            skip=way.skip,
            carry=tuple(sorted(set().union(*(self.factors(member) for member in way.crossed)))),
            shortcut=unique(
                self.program.weight_owner(member) if effective_part(member) == "map" else member.norm or member.owner
                for member in way.crossed
                if effective_part(member) in {"map", "norm"}
            ),
            maps=unique(self.program.weight_owner(member) for member in maps),
            modules=unique(member.owner for member in crossed),
            norms=placings,
            closing=None if closing is None or joined else closing.norm or self.program.weight_owner(closing),
            last=None if last_map is None or joined else self.program.weight_owner(last_map),
            scale=self.scale(branch, way.start),
            shape=value.shape,
            kind=kind_of(crossed),
            numbers=(skip, branch, value.number, way.start),
        )

    def factors(self, value: Value) -> frozenset[str]:
        """Parameters that multiply a signal in one operator."""
        if value.part != "scale":
            return frozenset()
        return value.parameters

    def main_operand(self, value: Value) -> int | None:
        """The operand that carries the branch on: the only signal, or at a gate the larger one."""
        if value.norm is not None:
            return self.before_norm(value)
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

    def closing(self, branch: int, start: int) -> Value | None:
        """The last map or norm of a branch."""
        return next((value for value in self.back(branch, start) if effective_part(value) in {"map", "norm"}), None)

    def tail(self, branch: int, start: int) -> Iterator[Value]:
        """The values after the last map or norm of a branch."""
        for value in self.back(branch, start):
            if effective_part(value) in {"map", "norm"}:
                return
            yield value

    def last_map(self, branch: int, start: int) -> Value | None:
        return next((value for value in self.back(branch, start) if effective_part(value) == "map"), None)

    def scale(self, branch: int, start: int) -> BranchScale | None:
        """The first multiplication by a parameter, coming from the end, before any work."""
        for value in self.back(branch, start):
            if effective_part(value) == "scale" and self.factors(value):
                constants = [self.program[o] for o in value.operands if not self.program[o].signal]
                return BranchScale(tuple(sorted(value.parameters)), any(constant.numel > 1 for constant in constants))
            if effective_part(value) not in CARRYING | {"join"} and value.operator != "sum":
                return None
        return None

    def placings(
        self, value: Value, way: SkipPath, crossed: list[Value], closing: Value | None
    ) -> tuple[NormPosition, ...]:
        program = self.program
        found: list[NormPosition] = []
        members = {member.number for member in crossed}
        if self.starts_with_norm(way, members, value.owner):
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

    def belongs(self, value: Value, owner: str) -> bool:
        """True if a value was made in the module at `owner` or in one of its submodules."""
        return not owner or value.owner == owner or value.owner.startswith(owner + ".")

    def starts_with_norm(self, way: SkipPath, members: set[int], owner: str) -> bool:
        """True if every path of the branch begins with a norm, which the skip may read as well."""
        program = self.program
        entries, waiting = [], [way.start]
        while waiting:
            for user in program.users[waiting.pop()]:
                if user in members:
                    (waiting if effective_part(program[user]) in CARRYING else entries).append(user)
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
        return self.found[-1][0] is value and bool(owner) and norm.startswith(owner + ".")

    @cached_property
    def carried(self) -> dict[int, int]:
        """The values that connections carry, each with the last sum that it is carried to."""
        return {
            number: value.number
            for value, skip, _, way in self.found
            if way.skip != "projection"
            for number in (way.start, skip)
        }


SOFTMAX = frozenset({"_softmax", "softmax", "_safe_softmax"})


def kind_of(crossed: list[Value]) -> Literal["attention", "conv", "mlp"]:
    """Attention where a softmax or a product of matrices is crossed, convolutional where a convolution is."""
    parts = {effective_part(value) for value in crossed}
    if "softmax" in parts or any(value.part == "product" and value.operator in {"bmm", "mm"} for value in crossed):
        return "attention"
    return "conv" if any("conv" in value.operator for value in crossed) else "mlp"


def unique(names: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def spatial_size(value: Value) -> int:
    """Positions of a map (N, C, H, W); 0 of anything else."""
    return value.shape[2] * value.shape[3] if len(value.shape) == 4 else 0
