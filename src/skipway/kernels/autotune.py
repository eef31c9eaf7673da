"""A kernel: one function with several implementations, the fastest on this machine chosen by measurement."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from skipway.errors import SkipwayError, first_line

__all__ = [
    "KERNELS",
    "Implementation",
    "Kernel",
    "KernelChoice",
    "Packed",
    "add_kernel",
    "choices",
    "clear_choices",
    "enabled",
    "off",
    "only",
    "restricted",
]

REFERENCE = "reference"
ROUNDS, MOST_ROUNDS, SECONDS = 3, 10, 0.02
"""Timed calls of each implementation: at least so many, at most so many, and more where they are brief until the
reference alone has taken so long. They take turns, and the fastest counts, since disturbances only ever add time.
"""

# largest difference from the reference over its largest value, explained by rounding in another order; the coarsest
# type among arguments and results counts, since float32 sums of values rounded to 16 bits differ as much
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True, eq=False)
class Restriction:
    """An open context that restricts all kernels of the process to one implementation; None lets measurement decide."""

    implementation: str | None


SWITCHED_OFF = os.environ.get("SKIPWAY_KERNELS", "on").lower() in ("off", "0", "false")
RESTRICTIONS = [Restriction(REFERENCE if SWITCHED_OFF else None)]
"""Those of all threads, which may leave in any order; the latest one counts. The first one stays."""


def prescribed() -> str | None:
    """Return the implementation that all kernels are restricted to; None where measurement decides."""
    return RESTRICTIONS[-1].implementation


@dataclass(frozen=True)
class Implementation:
    """One implementation of a kernel.

    Args:
        name: shown in `choices()` and taken by `only(name)`.
        compute: takes the kernel's arguments and returns what the reference returns, up to rounding.
        supports: takes the same arguments; returns whether `compute` can be used for them. By default always.
    """

    name: str
    compute: Callable[..., Any]
    supports: Callable[..., bool] = lambda *arguments: True


@dataclass(frozen=True)
class KernelChoice:
    """The implementation chosen for one kind of arguments, and the measurement.

    Args:
        kernel: the kernel's name.
        implementation: name of the fastest one.
        seconds: the fastest call of each implementation that was timed.
        refused: implementations that failed or differ from the reference, with the reason.
    """

    kernel: str
    implementation: str
    seconds: dict[str, float]
    refused: dict[str, str] = field(default_factory=dict)


class Packed:
    """Weights in an order of a library's, as kernels take them: all of a class are of one kind, and no kernel keeps
    them.
    """


@contextmanager
def without_saving() -> Iterator[None]:
    """Keep what autograd saves from the caller's hooks, those of an activation checkpoint for example, within the
    context: the innermost pair of hooks counts.
    """
    with saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        yield


class Kernel:
    """One function with a reference in plain torch and other implementations.

    The first call with arguments of a kind (device, types, shapes, layouts) on a number of threads runs every
    implementation that supports them, drops those that differ from the reference by more than rounding, times the
    others and remembers the fastest. The first axis of a tensor counts up to a factor of two, so that the last batch of
    an epoch is not measured again, and so do other axes in `rough`.

    Args:
        name: the kernel's name.
        reference: in plain torch; the others are compared with it.
        implementations: the others.
        rough: axes that count up to a factor of two.

    >>> double = Kernel("double", lambda x: x + x, Implementation("product", lambda x: 2 * x))
    >>> double(torch.ones(2))
    tensor([2., 2.])
    >>> sorted(next(iter(double.chosen.values())).seconds)
    ['product', 'reference']
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        *implementations: Implementation,
        rough: Collection[int] = (0,),
    ) -> None:
        self.name, self.rough = name, rough
        self.implementations = (Implementation(REFERENCE, reference), *implementations)
        self.chosen: dict[Hashable, KernelChoice] = {}

    def __call__(self, *arguments: Any) -> Any:
        with without_autocast(arguments):
            return self.select(*arguments).compute(*arguments)

    def implementation(self, name: str) -> Implementation:
        """The implementation of that name."""
        return next(each for each in self.implementations if each.name == name)

    def select(self, *arguments: Any) -> Implementation:
        """The implementation that a call with these arguments uses; measured where they are of a new kind."""
        reference = self.implementations[0]
        usable = [each for each in self.implementations if each.supports(*arguments)]
        if (name := prescribed()) is not None:
            return next((each for each in usable if each.name == name), reference)
        kinds = (argument_kind(argument, self.rough) for argument in arguments)
        key = (torch.get_num_threads(), *(each.name for each in usable), *kinds)
        if key not in self.chosen:
            choice = self.measure(usable, *arguments)
            if choice is None:
                return reference
            self.chosen[key] = choice
        return self.implementation(self.chosen[key].implementation)

    @torch.no_grad()
    @without_saving()
    def measure(self, usable: Sequence[Implementation], *arguments: Any) -> KernelChoice | None:
        """Time implementations, the reference first, on these arguments.

        Returns None where the reference's output is not finite and nothing can be compared with it: in a diverging
        run, or in the first steps of a gradient scaler.
        """
        reference, *others = usable
        if not others:
            return KernelChoice(self.name, REFERENCE, {})
        expected = reference.compute(*arguments)
        if not all(bool(each.isfinite().all()) for each in floating_tensors(expected)):
            return None
        allowed = max(TOLERANCE.get(each.dtype, 0.0) for each in floating_tensors((*arguments, expected)))
        candidates, refused = [reference], {}
        for each in others:
            try:
                problem = mismatch(each.compute(*arguments), expected, allowed)
            except Exception as error:  # compilers raise errors of their own; an implementation that fails is not used
                problem = first_line(error)
            if problem is None:
                candidates.append(each)
            else:
                refused[each.name] = problem
        seconds = fastest_calls(candidates, arguments, refused)
        return KernelChoice(self.name, min(seconds, key=seconds.__getitem__), seconds, refused)


KERNELS: list[Kernel] = []
"""All kernels, in the order in which their modules define them."""


def add_kernel(
    name: str, reference: Callable[..., Any], *implementations: Implementation, rough: Collection[int] = (0,)
) -> Kernel:
    """Make a kernel and add it to `KERNELS`, where `choices()` finds it."""
    kernel = Kernel(name, reference, *implementations, rough=rough)
    KERNELS.append(kernel)
    return kernel


def argument_kind(argument: Any, rough: Collection[int]) -> Hashable:
    """Key of an argument; the same implementation is taken to be the fastest for equal keys."""
    if isinstance(argument, Packed):
        return type(argument)
    if isinstance(argument, Tensor):
        sides = tuple(side.bit_length() if axis in rough else side for axis, side in enumerate(argument.shape))
        order = tuple(sorted(range(argument.ndim), key=lambda axis: -argument.stride(axis)))
        return argument.device.type, argument.dtype, sides, order
    return argument


def floating_tensors(value: Any) -> list[Tensor]:
    """Floating-point tensors in a value or a nested tuple of values."""
    values = [each for one in value for each in floating_tensors(one)] if isinstance(value, tuple) else [value]
    return [each for each in values if isinstance(each, Tensor) and each.is_floating_point()]


@contextmanager
def without_autocast(arguments: tuple[Any, ...]) -> Iterator[None]:
    """Switch autocast off within the context, so that types stay those of the arguments, and select their device."""
    device = device_of(arguments)
    with ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def device_of(arguments: tuple[Any, ...]) -> torch.device:
    """Device of the first tensor among the arguments; the CPU without one."""
    return next((each.device for each in arguments if isinstance(each, Tensor)), torch.device("cpu"))


def mismatch(result: Any, expected: Any, allowed: float) -> str | None:
    """Describe the difference between a result and the expected one; None where rounding explains it."""
    if isinstance(expected, tuple):
        pairs = zip(result, expected, strict=True)
        return next((problem for pair in pairs if (problem := mismatch(*pair, allowed))), None)
    if (result.dtype, result.shape) != (expected.dtype, expected.shape):
        return f"is {result.dtype} of shape {tuple(result.shape)}, not {expected.dtype} of {tuple(expected.shape)}"
    scale = expected.abs().amax() if expected.numel() else expected.new_zeros(())
    error = (result - expected).abs().amax() / scale.clamp_min(1e-30) if expected.numel() else scale
    return None if bool(error <= allowed) else f"differs by {float(error):.1g} of the largest value"


def fastest_calls(
    candidates: Sequence[Implementation], arguments: tuple[Any, ...], refused: dict[str, str]
) -> dict[str, float]:
    """Time calls of implementations in turn, the reference first, and return the shortest time of each; another one
    that fails meanwhile is refused.
    """
    reference, *others = candidates
    seconds = {reference.name: math.inf}
    spent = 0.0
    for turn in range(MOST_ROUNDS):
        spent += (took := seconds_of_call(reference, arguments))
        seconds[reference.name] = min(took, seconds[reference.name])
        for each in list(others):
            try:
                seconds[each.name] = min(seconds_of_call(each, arguments), seconds.get(each.name, math.inf))
            except Exception as error:
                refused[each.name] = first_line(error)
                seconds.pop(each.name, None)
                others.remove(each)
        if turn + 1 >= ROUNDS and spent >= SECONDS:
            break
    return seconds


def seconds_of_call(implementation: Implementation, arguments: tuple[Any, ...]) -> float:
    """Time one call."""
    device = device_of(arguments)
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    implementation.compute(*arguments)
    synchronize()
    return time.perf_counter() - start


def enabled() -> bool:
    """Return whether kernels may use more than their references: not within transforms of `torch.func` and in forward
    mode, which know the operators of torch alone.

    >>> enabled()
    True
    """
    return prescribed() != REFERENCE and not transformed()


def transformed() -> bool:
    """Return whether a transform of `torch.func` or forward-mode differentiation is going on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# torch.compile asks while it traces, in the transforms that it traces, and has guards on them; the decorator for this,
# torch.compiler.assume_constant_result, would import the compiler
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def restricted() -> bool:
    """Return whether one implementation is prescribed for all kernels, by `only` or `off`, so that none is measured.

    >>> with off():
    ...     restricted()
    True
    """
    return prescribed() is not None


@contextmanager
def only(name: str) -> Iterator[None]:
    """Restrict every kernel to the implementation of this name within the context; to its reference where it has none
    that supports the arguments.

    Args:
        name: of an implementation.

    Raises:
        SkipwayError: no kernel has such an implementation.

    >>> from skipway.kernels import linear
    >>> with only("onednn"):
    ...     linear(torch.ones(1, 2), torch.ones(1, 2))
    tensor([[2.]])
    """
    known = {each.name for kernel in KERNELS for each in kernel.implementations}
    if name not in known:
        raise SkipwayError(f"name={name!r}: no kernel has such an implementation; known are {', '.join(sorted(known))}")
    mine = Restriction(name)
    RESTRICTIONS.append(mine)
    try:
        yield
    finally:
        RESTRICTIONS.remove(mine)


def off() -> AbstractContextManager[None]:
    """Restrict every kernel to its reference in plain torch within the context, as SKIPWAY_KERNELS=off does throughout.

    >>> with off():
    ...     enabled()
    False
    """
    return only(REFERENCE)


def choices() -> list[KernelChoice]:
    """Return all measurements of this process, by kernel, the latest of a kernel last.

    >>> all(isinstance(each, KernelChoice) for each in choices())
    True
    """
    return [choice for kernel in KERNELS for choice in kernel.chosen.values() if choice.seconds]


def clear_choices() -> None:
    """Forget all measurements, so that the next calls measure again: after a change of threads or of the load."""
    for kernel in KERNELS:
        kernel.chosen.clear()
