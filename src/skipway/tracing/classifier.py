"""Which additions of a program are residual connections, and why the others are none."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import combinations, islice

from skipway.tracing.branch import BranchReader, FoundAdd
from skipway.tracing.operators import Part, is_linear_map
from skipway.tracing.paths import parents
from skipway.tracing.program import Program, Value
from skipway.tracing.residual_adds import Reason, Refusal, ResidualAdd
from skipway.tracing.residual_slots import ResidualSlots, SlotPath
from skipway.tracing.stream_paths import StreamJudge
from skipway.tracing.sums import PLACING, operator_of
from skipway.tracing.walks import CARRYING, SkipPath, Walker, effective_part

__all__ = ["find_residual_adds"]

NONLINEAR: frozenset[str] = frozenset({"nonlinear", "softmax", "product", "other"})
WORK: frozenset[str] = NONLINEAR | {"map", "norm", "pool", "mean"}
ELEMENTWISE: frozenset[str] = CARRYING | {"nonlinear", "product", "sum", "join"}
MIXING = frozenset(
    {"roll", "flip", "rot90", "unfold", "im2col", "pixel_shuffle", "pixel_unshuffle"}
    | {"_fft_r2c", "_fft_c2r", "_fft_c2c", "max_unpool2d"}
)
"""Operators without a weight that let positions or channels meet."""
REPLACING = PLACING | {"where", "masked_scatter", "index_copy"}
"""Operators that put one tensor in the place of parts of another one."""
SOFTMAX = frozenset({"_softmax", "softmax", "_safe_softmax"})
FAR = 8
"""Operators between a stack and the sum over it."""


def find_residual_adds(program: Program, own: Sequence[ResidualSlots] = ()) -> tuple[list[ResidualAdd], list[Refusal]]:
    """All additions of a program: the residual connections in order, and the refused with their reasons.

    What a norm adds within itself is listed only where it is a connection.

    Args:
        program: the program.
        own: connections of ours, each of which is one; what is added in a join that is no addition is a step of it.
    """
    classifier = AddClassifier(program)
    refused: list[Refusal] = []
    ends = {each.total: each for each in own}
    named = {each.name: each for each in own if not each.adds}
    for value in program.values:
        slots = next((named[name] for name in (value.owner, *parents(value.owner)) if name in named), None)
        step = not value.signal or (slots is not None and classifier.is_step(value, slots))
        reason = None if step else classifier.reason(value)
        end = ends.get(value.number)
        if end is not None and (reason is not None or not end.adds):
            classifier.accept(end)
            reason = None
        if reason is not None and value.norm is None:
            operator = value.operator if reason == "unknown" else ""
            refused.append(Refusal(value.owner, reason, value.shape, operator))
    return BranchReader(program, classifier.skips, classifier.cancelled, classifier.found).describe_all(), refused


class AddClassifier(Walker):
    """Judges the additions of a program, in order."""

    def __init__(self, program: Program) -> None:
        super().__init__(program, {}, {})
        self.found: list[FoundAdd] = []
        self.streams = StreamJudge(program, self.skips, self.cancelled)

    def is_step(self, value: Value, slots: ResidualSlots) -> bool:
        """True for what is no connection by itself: a step of a join of ours, or a sum in the branch whose skip leads
        back to what was computed before it, such as the values of another attention. What joins several streams is
        accepted here.
        """
        if value.part != "sum":
            return slots.holds(value.owner)
        if not slots.holds(value.owner):
            ways = [self.way(u, v) for u, v in (value.operands, value.operands[::-1])]
            return any(way is not None and way.start < slots.read for way in ways)
        if (slots.streams or 0) > 1 and (joined := self.streams.connection(value)) is not None:
            skip, path = joined
            self.found.append(FoundAdd(value, skip, path.written, path, slots.name))
            self.skips[value.number] = skip
        return True

    def accept(self, slots: ResidualSlots) -> None:
        """Accept a join of ours as a connection, unless one was found in it."""
        if any(each.residual == slots.name for each in self.found):
            return
        way = self.way(slots.skip, slots.branch) if slots.kind is None else None
        path = SlotPath(slots.read, (), slots.kind or "projection") if way is None else SlotPath(way.start, way.crossed)
        self.found.append(FoundAdd(self.program[slots.total], slots.skip, slots.branch, path, slots.name))
        if slots.total != slots.branch:
            self.skips[slots.total] = slots.skip

    def reason(self, value: Value) -> Reason | None:
        """Accept a value as a connection or return why it is none; None too for what cannot add."""
        if value.part == "sum":
            reason = self.judge(value)
            # without a call of Python it is a step of a composite operator, for example of an LSTM
            return reason if value.call is not None else None
        operator = operator_of(value.operator)
        if value.part == "shift":
            return "constant" if value.call is not None and self.adds_constant(value) else None
        if value.part == "other":
            alike = [each for each in self.real_signals(value) if self.program[each].shape == value.shape]
            return "unknown" if len(alike) > 1 and value.floating and not value.output else None
        if operator in REPLACING:
            return "selected" if self.join_branch(self.real_signals(value)) else None
        if value.part == "mean" or is_linear_map(value.operator):
            return "joined" if any(self.sums_over_stack(each) for each in self.program.signals(value)) else None
        return None

    def adds_constant(self, value: Value) -> bool:
        """True if a tensor was added that does not depend on the input, not a number."""
        return any(not self.program[operand].signal for operand in value.operands)

    def real_signals(self, value: Value) -> list[int]:
        """The operands that depend on the input, without indices and masks."""
        return [each for each in self.program.signals(value) if self.program[each].floating]

    def join_branch(self, numbers: list[int]) -> bool:
        """True if one of two values carries a tensor that the other was computed from by more than an activation."""
        if len(numbers) != 2:
            return False
        return any(
            way is not None and self.idle(way, branch) is None
            for side, branch in (numbers, numbers[::-1])
            if (way := self.way(side, branch)) is not None and way.skip != "projection"
        )

    def sums_over_stack(self, number: int) -> bool:
        """True if a value is a stack of a stream and a branch, perhaps weighted."""
        for _ in range(FAR):
            value = self.program[number]
            if value.operator == "stack":
                members = self.real_signals(value)
                return any(self.join_branch([*pair]) for pair in islice(combinations(members, 2), FAR))
            operand = self.main_operand(value)
            if value.part not in {"carry", "scale", "product"} or operand is None:
                return False
            number = operand
        return False

    def judge(self, value: Value) -> Reason | None:
        """Accept the sum as a connection and return None, or return the reason why it is none."""
        first, second = value.operands
        if first == second:
            return "parallel"
        if not value.shape:
            return "scalar"
        if value.number in self.into_softmax:
            return "attention"
        if self.positional[first] != self.positional[second]:
            return "constant"
        if self.cancels(value, first, second):
            return "difference"
        if (joined := self.streams.connection(value)) is not None:
            skip, path = joined
            self.found.append(FoundAdd(value, skip, path.written, path))
            self.skips[value.number] = skip
            return None
        ways = [(self.way(u, v), u, v) for u, v in ((first, second), (second, first))]
        found = [(way, u, v) for way, u, v in ways if way is not None]
        if not found:
            return self.gated(value, first, second) or self.unrelated(value, first, second)
        way, skip, branch = min(
            found, key=lambda each: (each[0].weight, each[0].skip == "projection", len(each[0].crossed))
        )
        reason = self.objection(value, way, skip, branch)
        if reason is None and self.streams.mixes_streams(value):
            reason = "mixing"
        if reason is None and self.is_recurrence(way, branch):
            reason = "rotary"
        if reason is None:
            self.found.append(FoundAdd(value, skip, branch, way))
            self.skips[value.number] = skip
        return reason

    def cancels(self, value: Value, total: int, subtracted: int) -> bool:
        """True for the difference y − x of which y = x + F(x) is read by nothing else: it is F(x), and y none of the
        network's connections.
        """
        minus = self.program[subtracted]
        skip = self.skips.get(total)
        if skip is None or minus.factor != -1 or minus.operands != (skip,):
            return False
        if self.program.signal_users(total) != [value.number]:
            return False
        (found,) = (each for each in self.found if each.value.number == total)
        self.found.remove(found)
        del self.skips[total]
        self.cancelled[value.number] = found.branch
        return True

    def idle(self, way: SkipPath, branch: int) -> Reason | None:
        """The reason why a branch does no work: it only carries, or it is an activation."""
        crossed = list(self.program.between(way.start, branch))
        parts = {effective_part(member) for member in crossed}
        if not parts & WORK:
            return "rotary"
        if not parts <= ELEMENTWISE or any(self.mixes(member) for member in crossed):
            return None
        return "activation" if self.bends(way.start, crossed) else "rotary"

    def bends(self, start: int, crossed: list[Value]) -> bool:
        """True if what was computed from a value is not linear in it; a product with something else is."""
        members = {start, *(member.number for member in crossed)}
        return any(
            effective_part(member) in NONLINEAR - {"product"}
            or (effective_part(member) == "product" and members.issuperset(self.program.signals(member)))
            for member in crossed
        )

    def is_recurrence(self, way: SkipPath, branch: int) -> bool:
        """True if a branch multiplies what is carried by other signals and sums, and neither side has a parameter: a
        step of a linear recurrence, or a row of a solver.
        """
        crossed = list(self.program.between(way.start, branch))
        members = {way.start, *(member.number for member in crossed)}
        if not {effective_part(member) for member in crossed} <= CARRYING | {"product", "mean", "sum"}:
            return False
        products = [self.program.signals(member) for member in crossed if member.part == "product"]
        learned = any(member.parameters for member in (*way.crossed, *crossed))
        return bool(products) and not learned and not any(members.issuperset(operands) for operands in products)

    def worked_parts(self, start: int, crossed: list[Value]) -> set[Part]:
        """What is done to a signal itself, without what only chooses where: whole numbers, and products with masks."""
        program, needed, reached, parts = self.program, {crossed[-1].number}, {start}, set()
        for member in reversed(crossed):
            if member.number in needed:
                needed.update(each for each in program.signals(member) if program[each].floating)
        for member in crossed:
            if member.number in needed and not reached.isdisjoint(program.signals(member)):
                reached.add(member.number)
                parts |= set() if self.is_masked(member) else {effective_part(member)}
        return parts

    def mixes(self, value: Value) -> bool:
        """True if an operator lets positions or channels meet."""
        operator = operator_of(value.operator)
        return operator in MIXING or is_linear_map(operator)

    def objection(self, value: Value, way: SkipPath, skip: int, branch: int) -> Reason | None:
        """The reason to refuse a sum although one side leads back to a tensor that the other was computed from."""
        if min(self.spread(skip), self.spread(branch)) < value.numel:
            return "broadcast"
        if way.skip == "pooled" and any(not member.shape for member in way.crossed):
            return "scalar"
        idle = self.idle(way, branch)
        if idle is not None:
            return idle
        if way.factor < 0:
            return "difference"
        crossed = list(self.program.between(way.start, branch))
        parts = {effective_part(member) for member in crossed if member.floating}  # a mask of tokens does no work
        if way.skip == "pooled" and self.worked_parts(way.start, crossed) <= CARRYING | {"pool", "mean"}:
            return "parallel"
        resampled = "upsample" in parts or any(member.part == "upsample" for member in way.crossed)
        activated = any(member.part == "nonlinear" for member in way.crossed)
        # from fewer positions both sides go to more of them, as in a block of a generator
        grows = spatial_size(self.program[way.start]) < spatial_size(value) and not activated
        if way.skip == "projection" and resampled and not grows:
            return "pyramid"
        if self.reads_other_slices(way, branch):
            return "hierarchical"
        if way.skip != "projection":
            return None
        if not self.program[way.start].floating:
            return "unrelated"  # two tables were asked for the same tokens, and none of them is carried
        if not self.bends(way.start, crossed) or self.is_local_encoding(value, way, parts):
            return "parallel"
        maps = [sum(effective_part(member) == "map" for member in side) for side in (way.crossed, crossed)]
        return "parallel" if activated and maps[1] <= max(1, maps[0]) else None

    def gated(self, value: Value, first: int, second: int) -> Reason | None:
        """The reason for a sum of which a side is a tensor that the other was computed from, times a gate. Where both
        sides are products and one is such a tensor without work on the other, it is a rotation by given angles; those
        angles may be shared by many layers, so that a path through other connections says nothing.
        """
        factors = {side: self.gate_factors(side) for side in (first, second)}
        reasons: list[Reason] = []
        for side, other in ((first, second), (second, first)):
            for operand in factors[side]:
                way = self.way(operand, other)
                if way is None or way.skip == "projection":
                    continue
                if not any(member.number in self.skips for member in self.program.between(way.start, other)):
                    reasons.append(self.objection(value, way, side, other) or "gated")
        return "gated" if "gated" in reasons else reasons[0] if reasons and all(factors.values()) else None

    def gate_factors(self, number: int) -> list[int]:
        """The factors of a value that is a product of two signals, element by element."""
        value = self.program[number]
        while value.part in CARRYING and len(signals := self.program.signals(value)) == 1:
            value = self.program[signals[0]]
        return self.program.signals(value) if value.part == "product" and not self.mixes(value) else []

    def unrelated(self, value: Value, first: int, second: int) -> Reason:
        """The reason to refuse a sum neither side of which leads back to the origin of the other."""
        if min(self.spread(first), self.spread(second)) < max(self.program[first].numel, self.program[second].numel):
            return "broadcast"
        sides = [{number, *self.program.ancestry(number).since(0)} for number in (first, second)]
        shared = sides[0] & sides[1]
        own = [[self.program[number] for number in side - shared] for side in sides]
        sizes = [max((spatial_size(member) for member in members), default=0) for members in own]
        resampled = any(member.part == "upsample" for members in own for member in members) or sizes[0] != sizes[1]
        if resampled and value.channel not in (None, len(value.shape) - 1):
            return "pyramid"
        latest = max(shared, default=-1)
        members = [member for side in own for member in side if effective_part(member) not in CARRYING]
        at_home = all(self.belongs(member, value.owner) for member in members)
        since = all(member.number > latest for member in members)
        return "parallel" if shared and (at_home or since) else "unrelated"

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
        """True if the skip is a slice of a tensor of which the branch reads slices, and others among them."""
        if not any(value.part == "slice" for value in way.crossed) or self.holds_copies(way.start):
            return False
        users = [user for user in self.program.users[way.start] if user == branch or self.program.depends(branch, user)]
        joined = [each for value in way.crossed if value.operator == "cat" for each in value.operands]
        carried = (*way.crossed, *(self.program[each] for each in joined))
        taken = [(value.operation, value.output) for value in carried if way.start in value.operands]
        read = [self.program[user] for user in users]
        same = all((value.operation, value.output) in taken for value in read)
        return not same and all(value.part == "slice" for value in read)

    def holds_copies(self, number: int) -> bool:
        """True for copies of one tensor, of which all slices are alike, as in the first layer of a RevNet."""
        value = self.program[number]
        while value.part == "carry" and len(signals := self.program.signals(value)) == 1:
            if self.program[signals[0]].numel < value.numel:
                return True
            value = self.program[signals[0]]
        return value.part == "join" and len(set(value.operands)) == 1

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


def spatial_size(value: Value) -> int:
    """Positions of a map (N, C, H, W); 0 of anything else."""
    return value.shape[2] * value.shape[3] if len(value.shape) == 4 else 0
