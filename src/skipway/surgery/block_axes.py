"""Which axis of each argument of a block holds the samples: found by passes with more and with other samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.surgery.block_call import BlockCall
from skipway.surgery.verification import forward_hooks
from skipway.tracing import Example, call_model, preserved_state
from skipway.tracing.arguments import Path, exchange_at, item_at, path_text, tensor_paths
from skipway.tracing.example import copy_example

__all__ = ["BlockAxes", "find_block_axes"]

MOST_TRIES = 64
"""Choices of axes of the example that are tried."""
AXES = 3
"""Axes of an input that may be that of the samples."""
CLOSE = 1e-4
"""Difference, relative to the largest value, of what other samples must not change."""

Given = dict[Path, Tensor]


@dataclass(frozen=True)
class BlockAxes:
    """Axes of a block's arguments and outputs that hold the samples.

    Args:
        stream: axis of x.
        arguments: axes of all tensors that it was given, by their paths; None is shared by all samples. An axis with
            several entries for each sample holds them sample by sample.
    """

    stream: int
    arguments: tuple[tuple[Path, int | None], ...]

    def joined(self, other: BlockAxes) -> BlockAxes:
        """These axes and those of arguments that were given in another pass only.

        Raises:
            SkipwayError: an axis is another one there.
        """
        axes = {**dict(other.arguments), **dict(self.arguments)}
        wrong = [path for path, axis in other.arguments if axes[path] != axis]
        if wrong or self.stream != other.stream:
            raise SkipwayError(f"with padding, samples are on another axis of {path_text(wrong[0]) if wrong else 'x'}")
        return BlockAxes(self.stream, tuple(axes.items()))


@dataclass
class BlockPass:
    """What blocks are given in one pass, and what the last of them makes of x."""

    given: dict[str, Given]
    last: Tensor


def find_block_axes(model: nn.Module, example: Example, calls: Mapping[str, BlockCall]) -> dict[str, BlockAxes]:
    """The axes of the samples in the calls of blocks; the model is left alone.

    An axis of the example is that of the samples if further entries on it, with other values, do not change what the
    blocks compute of the first ones, and another first entry does not change what they compute of the rest. With the
    further entries, the axes of the samples are the longer ones everywhere.

    Args:
        model: any module.
        example: what the model is called with.
        calls: of its blocks, in order.

    Raises:
        SkipwayError: there is no such axis, or a block is given the samples in groups.
    """
    before = run_blocks(model, example, calls)
    problem = ""
    for axes in islice(axis_choices(example), MOST_TRIES):
        try:
            more = run_blocks(model, changed_example(example, axes, extend), calls)
            found = {name: compare_shapes(name, calls[name], before.given[name], more.given[name]) for name in calls}
            axis = next(reversed(found.values())).stream
            count = before.last.shape[axis]
            if not gap(before.last, more.last.narrow(axis, 0, count)) <= CLOSE:  # what is no number is not small
                continue
            if count > 1:
                other = run_blocks(model, changed_example(example, axes, exchange_first), calls)
                rest = (each.last.narrow(axis, 1, count - 1) for each in (before, other))
                if not gap(*rest) <= CLOSE:
                    continue
        except SkipwayError as refusal:
            problem = problem or str(refusal)
            continue
        except Exception:
            continue
        return found
    raise SkipwayError(
        "no axis of the example holds independent samples: "
        + (problem or "another entry on any axis changes what blocks compute of the rest, as with edge lists")
        + "; a block can be computed for some of the samples only where none has an influence on the others"
    )


def axis_choices(example: Example) -> Iterator[dict[Path, int]]:
    """Choices of an axis for each tensor of an example, of equal lengths; a tensor that is in none has no samples."""
    tensors = list(tensor_paths(example))
    if not tensors:
        raise SkipwayError("the example holds no tensor, so that it has no samples")
    for lead, (_, first) in enumerate(tensors):  # the first one that has samples
        for axis in range(min(first.ndim, AXES)):
            size = first.shape[axis]
            options: list[list[int | None]] = [*([None] for _ in range(lead)), [axis]]
            for _, tensor in tensors[lead + 1 :]:
                options.append([*(own for own in range(min(tensor.ndim, AXES)) if tensor.shape[own] == size), None])
            for chosen in product(*options):
                yield {path: own for (path, _), own in zip(tensors, chosen, strict=True) if own is not None}


def changed_example(example: Example, axes: Mapping[Path, int], change: Any) -> Example:
    """An example whose tensors are changed on the axes of the samples."""
    for path, axis in axes.items():
        example = exchange_at(example, path, change(item_at(example, path), axis))
    return example


def extend(tensor: Tensor, axis: int) -> Tensor:
    """The tensor followed by as many samples again, which have other values."""
    return torch.cat([tensor, other_values(tensor, axis)], axis)


def exchange_first(tensor: Tensor, axis: int) -> Tensor:
    """The tensor with another first sample."""
    rest = tensor.narrow(axis, 1, tensor.shape[axis] - 1)
    return torch.cat([other_values(tensor.narrow(axis, 0, 1), axis), rest], axis)


def other_values(tensor: Tensor, axis: int) -> Tensor:
    """Values of the same kind: moved along another axis and, floating ones, with noise."""
    others = [each for each in range(tensor.ndim) if each != axis and tensor.shape[each] > 1]
    moved = tensor.roll(1, others[-1]) if others else tensor
    if not tensor.is_floating_point():
        return moved
    noise = torch.randn(moved.shape, generator=torch.Generator().manual_seed(moved.numel()), device="cpu").to(moved)
    return moved + noise * (0.1 + moved.nan_to_num(0, 0, 0).abs().mean())


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference of two tensors over their largest value; not a number if one alone is none, or both are none
    everywhere.
    """
    missing = one.isnan() & other.isnan()
    if bool(missing.all()):
        return float("nan")
    difference = (one - other).abs().masked_fill((one == other) | missing, 0)
    return float(difference.max()) / (float(one.abs().nan_to_num(0, 0, 0).max()) or 1.0)


def run_blocks(model: nn.Module, example: Example, calls: Mapping[str, BlockCall]) -> BlockPass:
    """Run the model in evaluation mode, and note what its blocks are given."""
    given: dict[str, Given] = {}
    last: list[Tensor] = []

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if output is not None:
            given[name] = dict((*tensor_paths(args), *tensor_paths(kwargs)))
            last[:] = [item_at(output, calls[name].output).float()]

    with forward_hooks(model, calls, leave=leave), preserved_state(model), torch.no_grad():
        call_model(model.eval(), copy_example(example))
    return BlockPass(given, last[0])


def compare_shapes(name: str, call: BlockCall, before: Given, more: Given) -> BlockAxes:
    """The axes that became twice as long.

    Raises:
        SkipwayError: none did, several did, or an argument has several entries for each sample that do not follow one
            another.
    """
    axes = {path: doubled_axis(name, tensor.shape, more[path].shape) for path, tensor in before.items()}
    stream = axes.get(call.stream)
    if stream is None:
        raise SkipwayError(f"{name} is given the same x whatever samples there are")
    count = before[call.stream].shape[stream]
    for path, axis in axes.items():
        if axis is None or before[path].shape[axis] == count:
            continue
        size = before[path].shape[axis]
        first = more[path].narrow(axis, 0, size)
        if size % count or not torch.equal(first, before[path]):
            raise SkipwayError(
                f"{name} is given an argument of shape {tuple(before[path].shape)}, which does not hold the {count} "
                "samples of x one after the other"
            )
    return BlockAxes(stream, tuple(axes.items()))


def doubled_axis(name: str, before: tuple[int, ...], more: tuple[int, ...]) -> int | None:
    """The axis that became twice as long, None where none did."""
    changed = [axis for axis, (old, new) in enumerate(zip(before, more, strict=True)) if old != new]
    if len(changed) > 1 or any(more[axis] != 2 * before[axis] for axis in changed):
        raise SkipwayError(
            f"with twice as many samples, the shape of an argument of {name} changed from {before} to {more}"
        )
    return changed[0] if changed else None
