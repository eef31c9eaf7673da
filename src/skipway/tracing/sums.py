"""Sums in one normal form, whatever operator adds: Σ factor · term, where a term is a tensor or what an operator makes
of some, as the product in `addcmul` and the map in `addmm`.

The same table reads the calls of Python and those of the dispatcher, whose arguments stand in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "PLACING",
    "JoinedAxis",
    "StackedAxis",
    "Term",
    "is_addition",
    "number_of",
    "operator_of",
    "slices_of",
    "terms_of",
]

PLACING = frozenset({"index_add", "scatter_add", "index_put", "scatter", "scatter_reduce"})
"""Operators that write a tensor into some positions of another one, and may add it there."""


@dataclass(frozen=True)
class Term:
    """A term of a sum.

    Args:
        tensors: that it is made of.
        factor: the number that it is multiplied by.
        operator: what makes the term of several tensors, or places one among zeros; "" for the tensor itself.
        make: computes the term without its factor.
        shape: of the term, where it is not that of its tensors.
    """

    tensors: tuple[Tensor, ...]
    factor: float = 1.0
    operator: str = ""
    make: Callable[[], Tensor] | None = None
    shape: tuple[int, ...] | None = None

    def value(self) -> Tensor:
        """The term as it is added; the tensor itself where nothing multiplies it."""
        made = self.tensors[0] if self.make is None else self.make()
        return made if self.factor == 1 else made * self.factor


def scaled(tensor: Tensor, factor: float = 1.0) -> Term:
    return Term((tensor,), float(factor))


def product(first: Tensor, second: Tensor, factor: float = 1.0) -> Term:
    return Term((first, second), float(factor), "mul", lambda: first * second)


def add(x: Tensor, other: Tensor, *, alpha: float = 1, **_: Any) -> list[Term]:
    return [scaled(x), scaled(other, alpha)]


def sub(x: Tensor, other: Tensor, *, alpha: float = 1, **_: Any) -> list[Term]:
    return [scaled(x), scaled(other, -alpha)]


def rsub(x: Tensor, other: Tensor, alpha: float = 1, **_: Any) -> list[Term]:
    return [scaled(x, -alpha), scaled(other)]


def lerp(x: Tensor, end: Tensor, weight: Any, **_: Any) -> list[Term]:
    """x + weight · (end − x)."""
    if not isinstance(weight, Tensor):
        return [scaled(x, 1 - weight), scaled(end, weight)]
    return [Term((x, weight), 1.0, "mul", lambda: x * (1 - weight)), product(end, weight)]


def addcmul(x: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1, **_: Any) -> list[Term]:
    return [scaled(x), product(tensor1, tensor2, value)]


def addcdiv(x: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1, **_: Any) -> list[Term]:
    return [scaled(x), Term((tensor1, tensor2), float(value), "div", lambda: tensor1 / tensor2)]


def add_map(
    operator: str, x: Tensor, first: Any = None, second: Any = None, *, beta: float = 1, alpha: float = 1, **named: Any
) -> list[Term]:
    """beta · x + alpha · (first @ second); the names of the factors differ by operator."""
    given = [each for each in (first, second, *named.values()) if isinstance(each, Tensor)]
    left, right = given[:2]
    summed = operator == "addbmm"
    shape = (*left.shape[1 if summed else 0 : -1], *right.shape[-1:] * (right.ndim > 1))
    make = partial(multiply, left, right, summed=summed)
    return [scaled(x, beta), Term((left, right), float(alpha), MAPS[operator], make, shape)]


def multiply(left: Tensor, right: Tensor, *, summed: bool) -> Tensor:
    return (left @ right).sum(0) if summed else left @ right


MAPS = {"addmm": "mm", "addmv": "mv", "addbmm": "bmm", "baddbmm": "bmm"}


def place(operator: str, x: Tensor, source: Tensor, *where: Any, factor: float = 1.0) -> list[Term]:
    """x with `source` added at some positions."""
    make = partial(write_into_zeros, x, operator, where)
    return [scaled(x), Term((source,), float(factor), operator, make, tuple(x.shape))]


def write_into_zeros(like: Tensor, operator: str, where: tuple[Any, ...]) -> Tensor:
    return getattr(torch.zeros_like(like), operator)(*where)


def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1, **_: Any) -> list[Term]:
    return place("index_add", x, source, dim, index, source, factor=alpha)


def scatter_add(x: Tensor, dim: int, index: Tensor, src: Tensor, **_: Any) -> list[Term]:
    return place("scatter_add", x, src, dim, index, src)


def scatter(x: Tensor, dim: int, index: Tensor, src: Any = None, reduce: str = "", **_: Any) -> list[Term]:
    added = reduce in ("add", "sum") and isinstance(src, Tensor)
    return place("scatter_add", x, src, dim, index, src) if added else []


def index_put(x: Tensor, indices: Any, values: Tensor, accumulate: bool = False, *_: Any) -> list[Term]:
    return place("index_put", x, values, indices, values, True) if accumulate else []


FORMS: dict[str, Callable[..., list[Term]]] = {
    "add": add,
    "sub": sub,
    "subtract": sub,
    "rsub": rsub,
    "lerp": lerp,
    "addcmul": addcmul,
    "addcdiv": addcdiv,
    **{operator: partial(add_map, operator) for operator in MAPS},
    "index_add": index_add,
    "scatter_add": scatter_add,
    "scatter": scatter,
    "scatter_reduce": scatter,
    "index_put": index_put,
}
REDUCTIONS = frozenset({"sum", "mean", "nansum"})
"""Operators that add along an axis."""


def operator_of(name: str) -> str:
    """The operator that a call of Python or of the dispatcher runs.

    >>> [operator_of(name) for name in ("add_", "__iadd__", "__rsub__", "index_add", "_softmax")]
    ['add', 'add', 'rsub', 'index_add', '_softmax']
    """
    if name.startswith("__"):
        bare = name.strip("_")
        return bare if bare in FORMS else bare[1:]
    return name if name.startswith("_") else name.removesuffix("_")


NUMBERED = frozenset(
    name
    for operator in FORMS
    for name in (operator, f"{operator}_", f"__{operator}__", f"__i{operator}__", f"__r{operator}__")
)


def is_addition(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether Python may add tensors here: two of them, or those along an axis.

    `num_batches_tracked.add_(1)` is none, so a norm's mode does not matter.
    """
    name = getattr(func, "__name__", "")
    if name in REDUCTIONS:
        return True
    return name in NUMBERED and sum(isinstance(each, Tensor) for each in (*args, *kwargs.values())) > 1


def terms_of(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Term]:
    """The tensors that a call adds, in order; none if it adds nothing.

    >>> x, f = torch.ones(2), torch.full((2,), 3.0)
    >>> [term.factor for term in terms_of("sub", (x, f), {"alpha": 0.5})]
    [1.0, -0.5]
    >>> [term.value().tolist() for term in terms_of("lerp", (x, f, 0.25), {})]
    [[0.75, 0.75], [0.75, 0.75]]
    """
    form = FORMS.get(operator_of(name))
    if form is None:
        return []
    first = [kwargs[key] for key in ("input", "self") if key in kwargs]
    rest = {key: value for key, value in kwargs.items() if key not in ("input", "self")}
    terms = form(*first, *args, **rest)
    return [term for term in terms if all(isinstance(tensor, Tensor) for tensor in term.tensors)]


def slices_of(operator: str, input: Tensor, *args: Any, **kwargs: Any) -> list[Term]:
    """The slices of a tensor that a sum or mean over one axis adds, in order."""
    axis = reduced_axis(input, (*args, *(kwargs[key] for key in ("dim", "axis") if key in kwargs)))
    if axis is None:
        return []
    length = input.shape[axis]
    factor = 1 / length if operator == "mean" else 1.0
    slices = (partial(input.select, axis, number) for number in range(length))
    return [Term((input,), factor, "select", each) for each in slices]


def reduced_axis(x: Tensor, args: Sequence[Any]) -> int | None:
    """The axis that a sum or mean runs over, None unless it is one."""
    axes = args[0] if args else ()
    axes = (axes,) if isinstance(axes, int) and not isinstance(axes, bool) else axes
    if not isinstance(axes, list | tuple) or len(axes) != 1 or not isinstance(axes[0], int):
        return None
    return axes[0] % max(x.ndim, 1)


def number_of(name: str, args: Sequence[Any], terms: Sequence[Term]) -> float:
    """The number that an operator multiplies its only tensor of the signal by.

    Args:
        name: of the operator.
        args: what it is called with.
        terms: those that it adds, without constant ones.

    >>> constant, x = torch.ones(1), torch.ones(1)
    >>> number_of("sub", (constant, x), terms_of("sub", (constant, x), {})[1:])
    -1.0
    """
    operator = operator_of(name)
    if operator == "neg":
        return -1.0
    if operator in ("mul", "div") and len(args) > 1 and isinstance(args[1], int | float):
        return float(args[1]) if operator == "mul" else 1 / args[1] if args[1] else 1.0
    factors = {term.factor for term in terms}
    return factors.pop() if len(factors) == 1 else 1.0


@dataclass(frozen=True)
class StackedAxis:
    """Tensors of one shape that were stacked, or laid end to end, of which views are known by the stride between them.

    Args:
        members: the values that were stacked.
        stride: from one to the next.
        numel: elements of all of them.
    """

    members: tuple[int, ...]
    stride: int
    numel: int

    @classmethod
    def of(
        cls, name: str, args: Sequence[Any], kwargs: dict[str, Any], result: Any, members: Sequence[int]
    ) -> StackedAxis | None:
        """What `stack`, or `cat` of tensors of one size, has made, else None."""
        if name not in ("stack", "cat") or len(members) < 2:
            return None
        axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        shapes = {tensor.shape for tensor in args[0]}
        if len(shapes) > 1:
            return None
        size = 1 if name == "stack" else shapes.pop()[axis]
        return cls(tuple(members), result.stride(axis) * size, result.numel())

    def is_contracted(self, name: str, args: Sequence[Any], view: Tensor) -> bool:
        """Whether an operator sums over the axis of the stack in `view`, with weights or without."""
        if name in REDUCTIONS:
            axis = reduced_axis(view, args[1:])
        elif name in ("mm", "bmm", "mv"):
            left = args[0] is view
            if (name == "mv" and not left) or args[left].numel() != len(self.members):
                return False
            axis = view.ndim - (1 if left else 2)
        else:
            return False
        if axis is None or view.numel() != self.numel:
            return False
        return view.shape[axis] == len(self.members) and view.stride(axis) == self.stride


@dataclass(frozen=True)
class JoinedAxis:
    """Tensors that `cat` or `stack` has laid side by side, so that a slice of the result is known to be one of them.

    Args:
        members: the values that were joined.
        ends: where each ends on the axis.
        axis: that they lie on.
        number: of the value that holds them all.
        result: the tensor that does.
        stacked: whether the axis was made for them.
    """

    members: tuple[int, ...]
    ends: tuple[int, ...]
    axis: int
    number: int
    result: Tensor
    stacked: bool

    @classmethod
    def of(
        cls, name: str, args: Sequence[Any], kwargs: dict[str, Any], result: Any, members: Sequence[int], number: int
    ) -> JoinedAxis | None:
        """What `cat` or `stack` has made of several values, else None."""
        if name not in ("stack", "cat") or len(members) < 2 or len({tensor.ndim for tensor in args[0]}) > 1:
            return None  # one without elements may have one axis
        axis = kwargs.get("dim", args[1] if len(args) > 1 else 0) % result.ndim
        sizes = (1 if name == "stack" else tensor.shape[axis] for tensor in args[0])
        return cls(tuple(members), tuple(accumulate(sizes)), axis, number, result, name == "stack")

    def member(self, view: Tensor) -> tuple[int, int, int] | None:
        """The value that a view is a slice of, where the slice starts in it and how long it is; None of other views."""
        whole, step = self.result, self.result.stride(self.axis)
        dropped = view.ndim < whole.ndim
        axes = [axis for axis in range(whole.ndim) if not (dropped and axis == self.axis)]
        if len(axes) != view.ndim or any(
            whole.stride(axis) != view.stride(place) or (axis != self.axis and whole.shape[axis] != view.shape[place])
            for place, axis in enumerate(axes)
        ):
            return None
        start, rest = divmod(int(view.storage_offset()) - int(whole.storage_offset()), max(step, 1))
        length = 1 if dropped else view.shape[self.axis]
        begins = (0, *self.ends)
        if rest or not length or dropped != self.stacked:
            return None
        for member, begin, end in zip(self.members, begins, self.ends, strict=False):
            if begin <= start and start + length <= end:
                return member, start - begin, length
        return None
