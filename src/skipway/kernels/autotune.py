"""A kernel: one function, several ways to compute it, the quickest on this machine chosen by measurement."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skipway.errors import SkipwayError

__all__ = ["KERNELS", "Choice", "Kernel", "Way", "choices", "enabled", "forget", "kernel", "off", "only"]

REFERENCE = "reference"
ROUNDS = 3
"""How often each way is timed; the best time counts, since what disturbs only ever adds."""

# how far a way may be from the reference, relative to the largest value: what rounding in another order explains; the
# coarsest type among arguments and results counts, since sums in float32 of what was rounded to 16 bits differ as much
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Switch:
    """What ways are restricted to, in the whole process: None is no restriction."""

    way: str | None = REFERENCE if os.environ.get("SKIPWAY_KERNELS", "on").lower() in ("off", "0", "false") else None


@dataclass(frozen=True)
class Way:
    """One way to compute a kernel.

    Args:
        name: how it is called in `choices()` and `only(...)`.
        compute: takes the kernel's arguments and puts out what the reference does, up to rounding.
        serves: whether it can be used for these arguments; always, by default.
    """

    name: str
    compute: Callable[..., Any]
    serves: Callable[..., bool] = lambda *arguments: True


@dataclass(frozen=True)
class Choice:
    """What was found for one kind of arguments.

    Args:
        kernel: its name.
        way: the one that is taken.
        seconds: the best time of each way that was tried.
        refused: ways that were not considered, and why.
    """

    kernel: str
    way: str
    seconds: dict[str, float]
    refused: dict[str, str] = field(default_factory=dict)


class Kernel:
    """One function with a reference in plain torch and other ways to compute the same.

    The first call with arguments of a kind (device, types, sizes, layout) runs every way that serves them, drops those
    that differ from the reference by more than rounding, times the others and remembers the quickest. Sizes of the
    first axis of a tensor count up to a factor of two, so that the last batch of an epoch is nothing new.

    Args:
        name: of the kernel.
        reference: in plain torch; what the others are compared with.
        ways: the others.

    >>> double = Kernel("double", lambda x: x + x, Way("product", lambda x: 2 * x))
    >>> double(torch.ones(2))
    tensor([2., 2.])
    >>> sorted(next(iter(double.found.values())).seconds)
    ['product', 'reference']
    """

    def __init__(self, name: str, reference: Callable[..., Any], *ways: Way) -> None:
        self.name = name
        self.ways = (Way(REFERENCE, reference), *ways)
        self.found: dict[Hashable, Choice] = {}

    def __call__(self, *arguments: Any) -> Any:
        with at_home(arguments):
            return self.way(*arguments).compute(*arguments)

    def named(self, name: str) -> Way:
        """The way of that name."""
        return next(way for way in self.ways if way.name == name)

    def way(self, *arguments: Any) -> Way:
        """The way that a call with these arguments takes."""
        wanted = Switch.way
        if wanted is not None:
            return next((way for way in self.ways if way.name == wanted and way.serves(*arguments)), self.ways[0])
        key = tuple(kind(argument) for argument in arguments)
        if key not in self.found:
            choice = self.measure(*arguments)
            if choice is None:
                return self.ways[0]
            self.found[key] = choice
        return self.named(self.found[key].way)

    @torch.no_grad()
    def measure(self, *arguments: Any) -> Choice | None:
        """Time every way on these arguments; None where the reference puts out what nothing can be compared with: a
        diverging run, or the first steps of a gradient scaler."""
        serving = [way for way in self.ways if way.serves(*arguments)]
        if len(serving) == 1:
            return Choice(self.name, REFERENCE, {})
        expected = serving[0].compute(*arguments)
        if not all(bool(each.isfinite().all()) for each in tensors(expected)):
            return None
        allowed = max(TOLERANCE.get(each.dtype, 0.0) for each in tensors((*arguments, expected)))
        seconds, refused = {}, {}
        for way in serving:
            try:
                if way is not serving[0] and (problem := differs(way.compute(*arguments), expected, allowed)):
                    refused[way.name] = problem
                    continue
                seconds[way.name] = min(timed(way, arguments) for _ in range(ROUNDS))
            except Exception as error:  # a compiler's errors are its own: what does not run here is never taken
                refused[way.name] = str(error).partition("\n")[0]
        return Choice(self.name, min(seconds, key=seconds.__getitem__), seconds, refused)


KERNELS: list[Kernel] = []
"""All kernels, in the order of their files."""


def kernel(name: str, reference: Callable[..., Any], *ways: Way) -> Kernel:
    """A kernel that `choices()` tells of."""
    made = Kernel(name, reference, *ways)
    KERNELS.append(made)
    return made


def kind(argument: Any) -> Hashable:
    """What two arguments have in common for which the same way is the quickest."""
    if isinstance(argument, Tensor):
        first = argument.shape[0].bit_length() if argument.ndim else 0
        order = tuple(sorted(range(argument.ndim), key=lambda axis: -argument.stride(axis)))
        return argument.device.type, argument.dtype, first, tuple(argument.shape[1:]), order
    return argument


def tensors(value: Any) -> list[Tensor]:
    """Those of floating point in a value or a tuple of values."""
    values = [each for one in value for each in tensors(one)] if isinstance(value, tuple) else [value]
    return [each for each in values if isinstance(each, Tensor) and each.is_floating_point()]


@contextmanager
def at_home(arguments: tuple[Any, ...]) -> Iterator[None]:
    """Within, types are what the arguments have, without autocast, and programs start where the arguments are."""
    device = home(arguments)
    with ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def home(arguments: tuple[Any, ...]) -> torch.device:
    """Where the first tensor is."""
    return next((each.device for each in arguments if isinstance(each, Tensor)), torch.device("cpu"))


def differs(result: Any, expected: Any, allowed: float) -> str | None:
    """In what a result is not the expected one; None where only by rounding."""
    if isinstance(expected, tuple):
        pairs = zip(result, expected, strict=True)
        return next((problem for pair in pairs if (problem := differs(*pair, allowed))), None)
    if (result.dtype, result.shape) != (expected.dtype, expected.shape):
        return f"is {result.dtype} of shape {tuple(result.shape)}, not {expected.dtype} of {tuple(expected.shape)}"
    scale = expected.abs().amax() if expected.numel() else expected.new_zeros(())
    error = (result - expected).abs().amax() / scale.clamp_min(1e-30) if expected.numel() else scale
    return None if bool(error <= allowed) else f"differs by {float(error):.1g} of the largest value"


def timed(way: Way, arguments: tuple[Any, ...]) -> float:
    """Seconds of one call."""
    device = home(arguments)
    synchronise = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    way.compute(*arguments)
    synchronise()
    return time.perf_counter() - start


def enabled() -> bool:
    """Whether kernels are used at all: not under `off()`, nor with SKIPWAY_KERNELS=off in the environment."""
    return Switch.way != REFERENCE


@contextmanager
def only(way: str) -> Iterator[None]:
    """Within, every kernel takes the way of this name where it has one that serves, and else its reference.

    Raises:
        SkipwayError: no kernel has such a way.

    >>> from skipway.kernels import linear
    >>> with only("onednn"):
    ...     linear(torch.ones(1, 2), torch.ones(1, 2))
    tensor([[2.]])
    """
    known = {each.name for one in KERNELS for each in one.ways}
    if way not in known:
        raise SkipwayError(f"way={way!r}: no kernel has it; there are {', '.join(sorted(known))}")
    before, Switch.way = Switch.way, way
    try:
        yield
    finally:
        Switch.way = before


def off() -> Any:
    """Within, every kernel is its reference in plain torch; so is everything under SKIPWAY_KERNELS=off.

    >>> with off():
    ...     enabled()
    False
    """
    return only(REFERENCE)


def choices() -> list[Choice]:
    """What was measured in this process so far, newest last in each kernel.

    >>> all(isinstance(each, Choice) for each in choices())
    True
    """
    return [choice for each in KERNELS for choice in each.found.values() if choice.seconds]


def forget() -> None:
    """Measure again at the next call: after the number of threads or the load of the machine has changed."""
    for each in KERNELS:
        each.found.clear()
