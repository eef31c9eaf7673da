"""Which axis of what modules put out holds the samples: found by passes with more and with other samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.surgery.block_axes import (
    CLOSE,
    MOST_TRIES,
    axis_choices,
    changed_example,
    doubled_axis,
    exchange_first,
    extend,
    gap,
)
from skipway.surgery.checks import rounding_of
from skipway.surgery.insertion_point import InsertionPoint
from skipway.surgery.transaction import draw, is_silent, write
from skipway.surgery.verification import forward_hooks
from skipway.tracing import Example, call_model, preserved_state
from skipway.tracing.arguments import item_at
from skipway.tracing.example import copy_example
from skipway.tracing.restoration import restored, without_fused_layers

__all__ = ["find_output_axes"]

Outputs = Mapping[str, Tensor]


def find_output_axes(model: nn.Module, example: Example, points: Mapping[str, InsertionPoint]) -> dict[str, int | None]:
    """The axis of the samples in what is put out at each insertion point, by its slot; None where no axis holds one
    entry for each sample. The model is left as it is.

    An axis of the example is that of the samples if further entries on it, with other values, do not change what is put
    out for the first ones, and another first entry does not change the rest. With twice as many, the axes of the
    samples are twice as long.

    Args:
        model: any module.
        example: what the model is called with.
        points: where, by their slots.

    Raises:
        SkipwayError: no axis of the example holds samples that have no influence on each other.
    """
    close = max(CLOSE, rounding_of(model.parameters()))
    with awake(model):
        before, shared = outputs_at(model, example, points), dict[str, int | None]()
        for axes in islice(axis_choices(example), MOST_TRIES):
            path, axis = next(iter(axes.items()))
            count = item_at(example, path).shape[axis]
            try:
                more = outputs_at(model, changed_example(example, axes, extend), points)
                other = (
                    outputs_at(model, changed_example(example, axes, exchange_first), points) if count > 1 else before
                )
                found = {slot: sample_axis(slot, each, more[slot], count) for slot, each in before.items()}
                if all(
                    axis is None
                    or (
                        gap(before[slot], more[slot].narrow(axis, 0, count)) <= close
                        and (count == 1 or gap(*(rest(each[slot], axis) for each in (before, other))) <= close)
                    )
                    for slot, axis in found.items()
                ):
                    if any(axis is not None for axis in found.values()):
                        return found
                    shared = shared or found  # no samples were added, or they are in windows everywhere
            except Exception:  # whatever a network raises that is given another number of samples
                continue
    if shared:
        return shared
    raise SkipwayError(
        "no axis of the example holds independent samples: more or other entries on any axis do not run, or change "
        "what branches compute of the rest; a branch is dropped sample by sample, so give an example with samples"
    )


def sample_axis(slot: str, before: Tensor, more: Tensor, count: int) -> int | None:
    """The axis that became twice as long, if it holds one entry for each sample."""
    try:
        axis = doubled_axis(slot, before.shape, more.shape)
    except SkipwayError:
        return None
    return axis if axis is not None and before.shape[axis] == count else None


def rest(output: Tensor, axis: int) -> Tensor:
    """All samples but the first."""
    return output.narrow(axis, 1, output.shape[axis] - 1)


def outputs_at(model: nn.Module, example: Example, points: Mapping[str, InsertionPoint]) -> Outputs:
    """What is put out at each insertion point in evaluation mode."""
    found: dict[str, Tensor] = {}
    slots: dict[str, list[str]] = {}
    for slot, point in points.items():
        slots.setdefault(point.name, []).append(slot)

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for slot in slots[name]:
            call = points[slot].call
            own = output if call is None else item_at(output, call.output)
            found[slot] = (own[0] if isinstance(own, tuple | list) else own).detach().float().clone()

    hooks = forward_hooks(model, slots, leave=leave)
    with hooks, preserved_state(model), without_fused_layers(), torch.no_grad():
        call_model(model.eval(), copy_example(example))
    return found


@contextmanager
def awake(model: nn.Module) -> Iterator[None]:
    """Within it, parameters that are 0, or -1 as in gains of 1 + g, hold random values: what puts out 0 hides what it
    depends on.
    """
    silent = [each for each in model.parameters() if each.is_floating_point() and is_silent(each)]
    with restored([partial(write, each, each.detach().clone()) for each in silent]):
        for each in silent:
            draw(each, len(silent))
        yield
