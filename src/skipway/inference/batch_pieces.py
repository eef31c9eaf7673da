"""Batches cut into pieces, several computed at a time: on a CPU a piece fits the caches, and each core has its own."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import lru_cache, partial
from itertools import takewhile
from types import BuiltinFunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from skipway.errors import SkipwayError, warn_caller
from skipway.inference.backends import Backend, Choice, Run
from skipway.inference.outputs import is_rounding
from skipway.tracing.containers import ATOMS, CLOSED, map_tensors, tensors_in
from skipway.tracing.samples import agrees, axis_of, halved_axis, has_axes, is_coarse

__all__ = [
    "BatchAxes",
    "CallForm",
    "PieceRun",
    "argument_kind",
    "arguments_of",
    "build_run",
    "find_batch_axes",
    "piece_choices",
    "stream_threads",
]


def arguments_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of an example."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


UNCHANGING = (slice, range, frozenset, torch.memory_format, BuiltinFunctionType)
"""Types of arguments that hold no tensors of a call."""


def may_be_written(value: Any) -> bool:
    """Whether a network may write tensors into an argument that is no tensor: an empty container, or an object.

    >>> may_be_written([]), may_be_written((3, "text", None)), may_be_written([224, 224])
    (True, False, False)
    """
    if isinstance(value, tuple) or (isinstance(value, list | dict) and value):
        return any(map(may_be_written, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, (Tensor, Enum, *UNCHANGING, *ATOMS, *CLOSED))


def argument_kind(value: Any, any_size: bool = False) -> Any:
    """What an argument counts by: a tensor by its shape, or its number of axes, type and device; another value by
    itself, or by its class and the tensors in it where it can be written into and equals nothing but itself, as caches
    do.
    """
    if isinstance(value, Tensor) and value.is_nested:  # such a tensor may have no shape
        return tuple(argument_kind(each, any_size) for each in value.unbind())
    if isinstance(value, Tensor):
        return value.ndim if any_size else tuple(value.shape), value.dtype, value.device
    if isinstance(value, np.ndarray):  # whose == is an array
        return type(value), value.shape, value.dtype, value.tobytes()
    if is_dataclass(value) and not isinstance(value, type):  # whose == is that of the tensors in it
        return type(value), *(argument_kind(getattr(value, each.name), any_size) for each in fields(value))
    if type(value).__eq__ is object.__eq__ and may_be_written(value):
        return type(value), *(argument_kind(each, any_size) for each in tensors_in(value))
    return type(value), value  # True equals 1, which equals 1.0


@dataclass(frozen=True)
class CallForm:
    """How an example gives its arguments, so that calls that give them otherwise count as equal.

    Args:
        parameters: of the network's `forward` that may be given by position or by name, in order.
        positional: arguments that the example gives by position.
        keywords: names of those that it gives by name, in order.

    >>> form = CallForm.of(nn.Bilinear(2, 3, 4), {"input1": 1, "input2": 2})
    >>> form.bring((1,), {"input2": 2}), form.bring((), {"input2": 2, "input1": 1})
    (((), {'input1': 1, 'input2': 2}), ((), {'input1': 1, 'input2': 2}))
    """

    parameters: tuple[str, ...]
    positional: int
    keywords: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, example: Any) -> CallForm:
        """The form of an example of a network."""
        args, kwargs = arguments_of(example)
        free = inspect.Parameter.POSITIONAL_OR_KEYWORD
        given = inspect.signature(model.forward).parameters.values()
        names = tuple(each.name for each in takewhile(lambda each: each.kind == free, given))
        return cls(names, len(args), tuple(kwargs))

    def bring(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call as the example gives them, by position or name and in its order."""
        if len(args) == self.positional and tuple(kwargs) == self.keywords:
            return args, kwargs
        named = dict(zip(self.parameters[self.positional :], args[self.positional :], strict=False))
        if self.positional + len(named) < len(args) or named.keys() & kwargs.keys():
            return args, kwargs  # too many, or one twice: the network says so
        args, kwargs = args[: self.positional], {**named, **kwargs}
        while (
            len(args) < self.positional
            and self.parameters[len(args) : len(args) + 1]
            and (name := self.parameters[len(args)]) in kwargs
        ):
            args = (*args, kwargs.pop(name))
        known = {name: kwargs.pop(name) for name in self.keywords if name in kwargs}
        return args, {**known, **kwargs}


@dataclass(frozen=True)
class BatchAxes:
    """Where the tensors of a call, and of what it returns, count the samples.

    Args:
        size: samples of the example.
        inputs: axis of each leaf of the arguments; None of those without samples.
        outputs: axis of each leaf of the output.
    """

    size: int
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]

    def count(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return the number of samples in a call; 0 where its tensors disagree about it, or there are others."""
        leaves = tree_leaves((args, kwargs))
        if len(leaves) != len(self.inputs):
            return 0
        pairs = [(leaf, axis) for leaf, axis in zip(leaves, self.inputs, strict=True) if axis is not None]
        counts = {leaf.shape[axis] if isinstance(leaf, Tensor) and leaf.ndim > axis else 0 for leaf, axis in pairs}
        return counts.pop() if len(counts) == 1 else 0

    def cut(self, args: tuple[Any, ...], kwargs: dict[str, Any], start: int, stop: int, fill: int = 0) -> Any:
        """Return the arguments for some of the samples, the last one repeated until there are `fill`."""
        leaves, structure = tree_flatten((args, kwargs))
        parts = [
            leaf if axis is None else repeat_last(leaf.narrow(axis, start, stop - start), axis, fill)
            for leaf, axis in zip(leaves, self.inputs, strict=True)
        ]
        return tree_unflatten(parts, structure)

    def join(self, outputs: list[Any], count: int) -> Any:
        """Return one output for those of the pieces, without what was filled up."""
        leaves = [tree_leaves(output) for output in outputs]
        joined = [
            parts[0] if axis is None else torch.cat(parts, axis).narrow(axis, 0, count)
            for axis, *parts in zip(self.outputs, *leaves, strict=True)
        ]
        return tree_unflatten(joined, tree_flatten(outputs[0])[1])


def repeat_last(part: Tensor, axis: int, fill: int) -> Tensor:
    """The tensor, its last sample repeated until there are `fill` along an axis."""
    count = part.shape[axis]
    if count >= fill:
        return part
    shape = [fill - count if at == axis else -1 for at in range(part.ndim)]
    return torch.cat([part, part.narrow(axis, count - 1, 1).expand(shape)], axis)


@torch.no_grad()
def find_batch_axes(model: nn.Module, example: Any, output: Any = None) -> BatchAxes | None:
    """Find the axes of the samples of a network in eval mode: along them, the output for each of two samples is the
    same without the other, and that for the whole example is that for its halves. None where there are none, or where
    arguments are containers or objects, which may be written into.

    The two samples are the first ones of the example. Where these are alike, or there is only one, which would hide
    what samples take from each other, it is paired with samples that differ, see `other_samples`. The halves show what
    samples take from others further away, as a series takes from what lies a day before.

    Args:
        model: the network; its calls leave no traces in it.
        example: what it is called with.
        output: what it returns for that, where it was called already.
    """
    args, kwargs = arguments_of(example)
    contained = [value for value in (*args, *kwargs.values()) if not isinstance(value, Tensor)]
    plain = not list(tensors_in(contained)) and not any(map(may_be_written, contained))
    leaves, structure = tree_flatten((args, kwargs))
    dense = [leaf for leaf in leaves if isinstance(leaf, Tensor) and has_axes(leaf)]
    coarse = is_coarse(model, example)
    for axis in (0, 1) if plain and dense else ():
        if dense[0].ndim <= axis or not (size := dense[0].shape[axis]):
            continue
        inputs = tuple(
            axis_of(leaf, size, axis) if isinstance(leaf, Tensor) and has_axes(leaf) else None for leaf in leaves
        )
        call = partial(call_samples, model, leaves, structure, inputs)
        outputs = independent_axes(call, *pairs_of_samples(leaves, inputs), coarse)
        if outputs is None:
            continue
        axes = BatchAxes(size, inputs, outputs)
        if fits_halves(model, example, axes, coarse, output):
            return axes
    return None


def fits_halves(model: nn.Module, example: Any, axes: BatchAxes, coarse: bool, output: Any = None) -> bool:
    """Whether the output for an example is that for its halves, joined."""
    if axes.size < 2:
        return True
    args, kwargs = arguments_of(example)

    def call(start: int, stop: int) -> Any:
        given, named = map_tensors(torch.clone, axes.cut(args, kwargs, start, stop))
        return model(*given, **named)

    half = axes.size // 2
    try:
        whole = call(0, axes.size) if output is None else output
        parts = [call(0, half), call(half, axes.size)]
        return is_rounding(whole, axes.join(parts, axes.size), coarse)
    except Exception:  # a network raises whatever it likes at another size, and outputs may be of other shapes
        return False


Sample = list[Any]
"""The leaves of an example that have samples, cut to one sample each."""


def pairs_of_samples(leaves: list[Any], inputs: tuple[int | None, ...]) -> tuple[Sample, list[Sample]]:
    """A sample of an example, and the ones that it is called with: the sample before it or, where that is the same,
    others that are made from it.
    """
    axed = [(leaf, axis) for leaf, axis in zip(leaves, inputs, strict=True) if axis is not None]
    first, second = ([leaf.narrow(axis, min(at, leaf.shape[axis] - 1), 1) for leaf, axis in axed] for at in (0, 1))
    if not all(map(torch.equal, first, second)):
        return second, [first]
    return second, list(other_samples(second, [axis for _, axis in axed]))


def other_samples(sample: Sample, axes: list[int]) -> Iterator[Sample]:
    """Samples that differ from one, of numbers that a network is likely to take.

    Floating numbers become their halves, then random ones of twice their range, beside integers in reverse, which keeps
    masks and the range of indices. Integers alone are reversed, then all the largest, then all the least of them; where
    they are all equal, halved, and ones in place of zeros. Complex numbers stay, and tensors without numbers.
    """
    if any(part.is_complex() or not part.numel() for part in sample):
        yield sample
        return
    if any(part.is_floating_point() for part in sample):
        for change in (halve, randomize):
            other = [
                change(part) if part.is_floating_point() else reverse(part, axis)
                for part, axis in zip(sample, axes, strict=True)
            ]
            if not all(map(torch.equal, other, sample)):
                yield other
        return
    others = [
        [reverse(part, axis) for part, axis in zip(sample, axes, strict=True)],
        *([getattr(part, name)().expand_as(part) for part in sample] for name in ("amax", "amin")),
    ]
    different = [other for other in others if not all(map(torch.equal, other, sample))]
    yield from different or [[halve_whole(part) for part in sample]]


def halve_whole(part: Tensor) -> Tensor:
    """The halves of whole numbers, and ones in place of zeros; truth values stay."""
    return part if part.dtype is torch.bool else part // 2 if part.any() else part + 1


def halve(part: Tensor) -> Tensor:
    """The half of a tensor."""
    return part / 2


def randomize(part: Tensor) -> Tensor:
    """Random numbers, the same ones every time, of twice the range of a tensor."""
    span = 2 * part.abs().nan_to_num().max().clamp_min(0.5)
    return torch.randn(part.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(part) * span


def reverse(part: Tensor, axis: int) -> Tensor:
    """A tensor in the opposite order along its last axis that is not the samples'."""
    others = [at for at in range(part.ndim) if at != axis]
    return part.flip(others[-1]) if others else part


def call_samples(
    model: nn.Module, leaves: list[Any], structure: Any, inputs: tuple[int | None, ...], *samples: Sample
) -> list[Any]:
    """The leaves of what a network returns for some samples, one after the other."""
    joined = iter([list(parts) for parts in zip(*samples, strict=True)])
    parts = [leaf if axis is None else torch.cat(next(joined), axis) for leaf, axis in zip(leaves, inputs, strict=True)]
    args, kwargs = tree_unflatten([part.clone() if isinstance(part, Tensor) else part for part in parts], structure)
    return tree_leaves(model(*args, **kwargs))


def independent_axes(
    call: Callable[..., list[Any]], sample: Sample, others: list[Sample], coarse: bool = False
) -> tuple[int | None, ...] | None:
    """The axes of the samples in outputs; None where the sample and one of the others depend on each other. Others that
    the network does not take are passed over, and outputs of one sample that are not a number.
    """
    found: set[tuple[int | None, ...]] = set()
    for other in others:
        try:
            pairs = [(call(other, sample), call(sample)), (call(sample, other), call(other))]
        except Exception:  # a network raises whatever it likes at another size, and for values that it does not know
            continue
        try:
            found |= {tuple(sample_axes_of(*pair, coarse)) for pair in pairs if not has_nan(pair[1])}
        except Exception:  # outputs that cannot be compared
            return None
    axes = found.pop() if len(found) == 1 else ()
    return axes if any(axis is not None for axis in axes) else None


def has_nan(outputs: list[Any]) -> bool:
    """Whether there is something among outputs that is not a number."""
    return any(bool(each.isnan().any()) for each in outputs if isinstance(each, Tensor))


def sample_axes_of(both: list[Any], one: list[Any], coarse: bool) -> Iterator[int | None]:
    """The axis of the samples in each output for two samples, and for the second of them; `coarse` as in `agrees`.

    Raises:
        ValueError: outputs that are no tensors, or depend on the other sample.
    """
    for pair in zip(both, one, strict=True):
        if not all(isinstance(each, Tensor) for each in pair):
            if pair[0] != pair[1]:
                raise ValueError("an output that is no tensor differs")
            yield None
        elif pair[0].shape == pair[1].shape:
            if not torch.equal(*pair):
                raise ValueError("an output without samples depends on them")
            yield None
        else:
            axis = halved_axis(*pair)
            if axis is None or not agrees(*pair, axis, coarse):
                raise ValueError("samples depend on each other")
            yield axis


def build_run(
    backend: Backend, model: nn.Module, example: Any, choice: Choice, axes: BatchAxes | None, rest: Run | None = None
) -> Run:
    """Build a backend for a choice; its pieces are built and run on the threads of the streams. What is left over of a
    batch of another size goes through `rest`, see `PieceRun`.

    Raises:
        SkipwayError: the batch cannot be cut into as many pieces.
    """
    if choice.pieces > 1 and (axes is None or axes.size % choice.pieces):
        why = "samples depend on each other" if axes is None else f"the rule is a divisor of the {axes.size} samples"
        raise SkipwayError(f"pieces={choice.pieces}: {why}")
    if axes is None or (choice.pieces == 1 and backend.any_size):
        return backend.build(model, example, choice)
    size = axes.size // choice.pieces
    if choice.pieces > 1:
        args, kwargs = axes.cut(*arguments_of(example), 0, size)
        example = kwargs or (args[0] if len(args) == 1 else args)
    build = partial(backend.build, model, example, choice)
    run = build() if choice.streams == 1 else stream_threads(choice.streams).submit(without_gradients, build).result()
    return PieceRun(run, axes, size, choice.streams, backend.any_size, rest)


def piece_choices(whole: Choice, batch: int, cores: int) -> Iterator[Choice]:
    """Choices with one piece for each core in place of a whole batch, then with pieces of 2, 4, 1 and 8 samples: each
    core a stream of its own, then a quarter as many streams, then one.

    >>> [str(each) for each in piece_choices(Choice("torch", "bfloat16"), 16, 2)][:3]
    ['torch bfloat16, 2 pieces, 2 streams', 'torch bfloat16, 8 pieces, 2 streams', \
'torch bfloat16, 4 pieces, 2 streams']
    >>> [str(each) for each in piece_choices(Choice("torch"), 4, 2)]
    ['torch float32, 2 pieces, 2 streams', 'torch float32, 4 pieces, 2 streams', 'torch float32, 2 pieces', \
'torch float32, 4 pieces']
    """
    for streams in dict.fromkeys((cores, max(1, cores // 4), 1)):
        for size in dict.fromkeys((batch // cores, 2, 4, 1, 8)):
            if 0 < size < batch and batch % size == 0 and streams <= batch // size:
                yield replace(whole, pieces=batch // size, streams=streams)


def without_gradients(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in inference, which is a mode of the thread."""
    with torch.no_grad():
        return function(*args, **kwargs)


class PieceRun:
    """A function for a batch of one size, called with batches of any size in pieces of that size.

    Samples that are left over fill a piece up with copies of the last one where they are half a piece or more; fewer go
    through `rest`.

    Args:
        run: takes `size` samples; called by several threads.
        axes: of the samples.
        size: samples of a piece.
        streams: pieces computed at a time.
        any_size: whether `run` takes any number of samples.
        rest: takes any number of samples, slowly; with None every last piece is filled up.
    """

    def __init__(self, run: Run, axes: BatchAxes, size: int, streams: int, any_size: bool, rest: Run | None = None):
        self.run, self.axes, self.size, self.streams, self.any_size = run, axes, size, streams, any_size
        self.rest = rest
        self.remarked: set[int] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        count, size = self.axes.count(args, kwargs), self.size
        if self.streams == 1 and (count == size or (self.any_size and count < size)):
            return self.run(*args, **kwargs)
        whole, left = divmod(count, size)
        slow = left and not self.any_size and 2 * left < size and self.rest is not None
        pieces = [(at * size, at * size + size) for at in range(whole)] + [(whole * size, count)] * bool(
            left and not slow
        )
        fill = 0 if self.any_size else size
        calls = [self.axes.cut(args, kwargs, start, stop, fill) for start, stop in pieces]
        if self.streams == 1:
            outputs = [self.run(*given, **named) for given, named in calls]
        else:
            threads = stream_threads(self.streams)
            waiting = [threads.submit(without_gradients, self.run, *given, **named) for given, named in calls]
            outputs = [each.result() for each in waiting]
        if slow:
            assert self.rest is not None
            self.remark(count, left)
            given, named = self.axes.cut(args, kwargs, whole * size, count)
            outputs.append(self.rest(*given, **named))
        return self.axes.join(outputs, count)

    def remark(self, count: int, left: int) -> None:
        """Say once for each batch size that part of it is slow."""
        if count not in self.remarked:
            self.remarked.add(count)
            warn_caller(
                f"a batch of {count}: it was optimized for pieces of {self.size}, so {left} of it run in plain torch, "
                f"which is slower; give multiples of {self.size}, or optimize for this size"
            )


def stream_threads(streams: int) -> ThreadPoolExecutor:
    """The threads of a number of streams, each with its share of torch's threads; all models share them."""
    return start_streams(streams, torch.get_num_threads(), os.getpid())


@lru_cache
def start_streams(streams: int, threads: int, process: int) -> ThreadPoolExecutor:
    """Start the threads of streams. A forked process has none of its parent's."""

    def share() -> None:
        torch.get_num_threads()  # a thread of torch takes the number of the process when it is first asked
        torch.set_num_threads(max(1, threads // streams))

    pool = ThreadPoolExecutor(streams, "skipway-stream", initializer=share)
    started = threading.Barrier(streams + 1)
    for _ in range(streams):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(threads)  # of the process, which those of the streams have set
    return pool
