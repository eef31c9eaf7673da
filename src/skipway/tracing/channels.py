"""The axis of a signal that holds its channels: the one that the last weight wrote or a norm read, followed through
permutations and views. Sizes do not tell it: (N, L, C) and (N, C, L) are alike where L = C.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from skipway.tracing.operators import ARITHMETIC, PARTS, Part
from skipway.tracing.program import Value

__all__ = ["channel_axis"]

SECOND = ("conv", "batch_norm", "group_norm", "instance_norm")
LAST = ("layer_norm", "rms_norm", "embedding", "linear", "grouped_mm", "scaled_mm")
PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "matmul": 0}
"""Operators that multiply matrices, with the place of the left one among their operands."""
SAME: frozenset[Part] = frozenset(
    {"carry", "slice", "stride", "pad", "pool", "upsample", "drop", "norm", "nonlinear", "softmax", "join", "mean"}
)
"""Parts of operators whose result has the axes that their operand has."""
VIEWS = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze"})


def channel_axis(name: str, args: Sequence[Any], operands: Sequence[Value], shape: Sequence[int]) -> int | None:
    """The channel axis of what the operator `name` makes of `operands`, None where it is unknown.

    Args:
        name: of the dispatched operator.
        args: its arguments, of which axes are read.
        operands: the values that it is given.
        shape: of the result.
    """
    signals = [value for value in operands if value.signal]
    if not signals or not shape:
        return None
    if any(word in name for word in SECOND):
        return 1 if len(shape) > 1 else None
    if any(word in name for word in LAST):
        return len(shape) - 1
    if name in PRODUCTS:
        left, right = operands[PRODUCTS[name] :][:2]
        return None if left.signal == right.signal else len(shape) - (1 if left.signal else 2)
    known = [value for value in signals if value.channel is not None]
    # of a sum the stream, which is older than the branch: a map over positions writes another axis
    given = min(known, key=lambda value: (len(value.shape) != len(shape), value.number), default=None)
    if given is None or given.channel is None:
        return None
    return moved_axis(name, args, given.shape, given.channel, shape)


def moved_axis(name: str, args: Sequence[Any], old: Sequence[int], axis: int, new: Sequence[int]) -> int | None:
    """The place of an axis after an operator that moves, cuts or keeps axes.

    >>> moved_axis("permute", (None, [0, 2, 1]), (2, 5, 8), 2, (2, 8, 5))
    1
    >>> moved_axis("view", (), (2, 8, 4, 4), 1, (2, 8, 16)), moved_axis("view", (), (2, 5, 8), 2, (2, 5, 2, 4))
    (1, None)
    """
    count = len(old)
    if name == "permute":
        return [each % count for each in args[1]].index(axis)
    if name in ("transpose", "t"):
        first, second = (args[1] % count, args[2] % count) if name == "transpose" else (0, count - 1)
        return {first: second, second: first}.get(axis, axis)
    if name in VIEWS:
        before = [prod(new[:place]) for place in range(len(new))]
        fitting = (place for place, size in enumerate(new) if size == old[axis] and before[place] == prod(old[:axis]))
        return next(fitting, None)
    if name in ("select", "unbind", "stack"):
        place = args[1] if len(args) > 1 else 0
        if name == "stack":
            return axis + (place % len(new) <= axis)
        place %= count
        return None if place == axis else axis - (place < axis)
    bare = name.removesuffix("_")
    if name == "expand" or (len(new) > count and bare in ARITHMETIC):
        place = axis + len(new) - count
        return place if new[place] == old[axis] else None
    return axis if len(new) == count and (bare in ARITHMETIC or PARTS.get(bare) in SAME) else None
