"""The axis of every tensor that counts the samples, found by comparing with targets and by a second batch size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.tracing.containers import map_tensors, tensors_in
from skipway.tracing.example import Example, call_model, copy_example
from skipway.tracing.restoration import preserved_state, without_fused_layers

__all__ = ["SampleAxes", "find_sample_axes"]


@dataclass(frozen=True)
class SampleAxes:
    """The axis of the samples in the tensors of a batch.

    Args:
        size: samples in the batch.
        axis: where the first tensor with samples has them: 0, or 1 in sequence-first batches.
        axes: of every tensor that has one, by its identity.
        remark: why it is this axis, where another one was possible.
    """

    size: int
    axis: int
    axes: dict[int, int] = field(repr=False)
    remark: str = ""

    def including(self, batch: Any) -> SampleAxes:
        """The axes with those of further tensors that have as many samples."""
        more = {id(each): axis_of(each, self.size, self.axis) for each in tensors_in(batch) if has_axes(each)}
        return replace(self, axes=self.axes | {key: axis for key, axis in more.items() if axis is not None})

    def part(self, batch: Any, start: int, stop: int) -> Any:
        """Some of the samples; tensors without samples are whole."""

        def cut(tensor: Tensor) -> Tensor:
            axis = self.axes.get(id(tensor))
            if axis is None or not tensor.ndim:
                return tensor
            return tensor[start:stop] if axis == 0 else tensor.narrow(axis, start, stop - start)

        return map_tensors(cut, batch)

    def samples_first(self, tensor: Tensor, count: int) -> Tensor:
        """A tensor of the network's signal with `count` samples, with their axis first."""
        if self.axis == 0 or tensor.ndim < 2:
            return tensor
        if tensor.ndim > 2 and tensor.shape[self.axis] == count:
            return tensor.movedim(self.axis, 0)
        return tensor


def find_sample_axes(model: nn.Module, inputs: Example, targets: Any = None) -> SampleAxes:
    """Find the axis of the samples in a batch: the first or, in sequence-first batches, the second one of the inputs.

    With targets it is an axis of as many samples as there are targets. Where both axes are possible, or without
    targets, the model runs in evaluation mode on two samples and on one of them: samples are what the outputs do not
    depend on each other along. The model is left as it is.

    Raises:
        SkipwayError: no axis of the inputs has as many samples as there are targets.

    >>> rows = find_sample_axes(nn.Linear(3, 2), torch.zeros(8, 3), torch.zeros(8, dtype=torch.long))
    >>> rows.size, rows.axis
    (8, 0)
    """
    tensors = [tensor for tensor in tensors_in(inputs) if has_axes(tensor)]
    if not tensors:
        raise SkipwayError(
            "example: its tensors are single numbers, sparse or nested; the rule is a batch of samples, of which some "
            "can be taken along an axis: give a dense tensor"
        )
    given = [tensor for tensor in tensors_in(targets) if has_axes(tensor)]
    found = [axes for axes in layouts(tensors, given) if fits_targets(axes, tensors, given)]
    if not found:
        counts = " or ".join(str(each) for each in dict.fromkeys(tensors[0].shape[:2]))
        raise SkipwayError(
            f"targets of shape {tuple(given[0].shape)}: the rule is one for each of the {tensors[0].shape[0]} samples, "
            f"and the inputs {tuple(tensors[0].shape)} have {counts} on the first axes; or give loss=(output, targets) "
            "→ a scalar, and put the targets into it"
        )
    first, *others = found
    if given and not others:
        return first if first.axis == 0 else remarked(first, tensors, f"as the {first.size} targets tell")
    chosen = next((axes for axes in found if is_independent(model, inputs, axes)), None)
    if chosen is None:
        return remarked(first, tensors, "which is not certain: other axes are as long") if given else first
    if chosen is first and first.axis == 0:
        return first
    return remarked(chosen, tensors, "along which the outputs do not depend on each other")


def has_axes(tensor: Tensor) -> bool:
    """Whether part of a tensor can be taken along an axis: it is dense, and no single number."""
    return tensor.layout is torch.strided and not tensor.is_nested and tensor.ndim > 0


def remarked(axes: SampleAxes, tensors: list[Tensor], why: str) -> SampleAxes:
    """The axes with a remark on their choice."""
    shape = tuple(next(each for each in tensors if id(each) in axes.axes).shape)
    return replace(axes, remark=f"{axes.size} on axis {axes.axis} of the input {shape}, {why}")


def layouts(tensors: list[Tensor], targets: list[Tensor]) -> Iterator[SampleAxes]:
    """The possible axes: the first axis of every tensor, then the second one of the first tensor."""
    known: set[tuple[int, int]] = set()
    for axis in (0, 1):
        for main in tensors if axis == 0 and targets else tensors[:1]:
            if main.ndim <= axis or (main.shape[axis], axis) in known:
                continue
            size = main.shape[axis]
            known.add((size, axis))
            axes = {id(each): axis_of(each, size, axis) for each in (*tensors, *targets)}
            yield SampleAxes(size, axis, {key: place for key, place in axes.items() if place is not None})


def axis_of(tensor: Tensor, size: int, axis: int) -> int | None:
    """The axis of a tensor that has `size` samples: the given one, else the first; None if neither has as many."""
    if tensor.ndim > axis and tensor.shape[axis] == size:
        return axis
    return 0 if tensor.shape[0] == size else None


def fits_targets(axes: SampleAxes, tensors: list[Tensor], targets: list[Tensor]) -> bool:
    """Whether the first of the targets has as many samples, on the same axis of positions if it has one."""
    if not targets:
        return True
    first = targets[0]
    if axes.axis == 0 or first.ndim == 1:
        return first.shape[0] == axes.size
    return id(first) in axes.axes and (axes.axes[id(first)] == 0 or first.shape[0] == tensors[0].shape[0])


def is_independent(model: nn.Module, inputs: Example, axes: SampleAxes) -> bool:
    """Whether an axis is one of samples: the output for one of two samples is the same without the other."""
    if axes.size < 2:
        return False
    try:
        with without_fused_layers(), preserved_state(model), torch.no_grad():
            model.eval()
            both = list(tensors_in(call_model(model, copy_example(axes.part(inputs, 0, 2)))))
            one = list(tensors_in(call_model(model, copy_example(axes.part(inputs, 1, 2)))))
    except SkipwayError:
        return False
    pairs = [pair for pair in zip(both, one, strict=False) if pair[0].is_floating_point() and pair[1].numel()]
    agreed = [agrees(*pair, axis) for pair in pairs if (axis := halved_axis(*pair)) is not None]
    return bool(agreed) and all(agreed)


def halved_axis(both: Tensor, one: Tensor) -> int | None:
    """The only axis on which two outputs differ, if one is half as long there."""
    differing = [axis for axis, (a, b) in enumerate(zip(both.shape, one.shape, strict=False)) if a != b]
    fits = both.ndim == one.ndim and len(differing) == 1 and both.shape[differing[0]] == 2 * one.shape[differing[0]]
    return differing[0] if fits else None


def agrees(both: Tensor, one: Tensor, axis: int, coarse: bool = False) -> bool:
    """Whether the second half of an output for two samples is the output for the second one, but for rounding, see
    `batch_rounding`.
    """
    second = both.narrow(axis, one.shape[axis], one.shape[axis])
    if not one.is_floating_point() and not one.is_complex():
        return float((second != one).float().mean()) <= batch_rounding(one, coarse)
    wide = torch.complex128 if one.is_complex() else torch.float64
    second, alone = (each.cpu().to(wide) for each in (second, one))  # not every device has float64
    return bool((second - alone).abs().max() <= batch_rounding(one) * alone.abs().max().clamp_min(1e-12))


def is_coarse(model: nn.Module, inputs: Any) -> bool:
    """Whether a network computes with floating numbers of 16 bits or fewer, as its parameters or inputs tell.

    >>> is_coarse(nn.Linear(2, 2), torch.zeros(1)), is_coarse(nn.Linear(2, 2).bfloat16(), torch.zeros(1))
    (False, True)
    """
    kinds = {tensor.dtype for tensor in (*model.parameters(), *tensors_in(inputs))}
    return any(kind.is_floating_point and kind.itemsize < 4 for kind in kinds)


def batch_rounding(output: Tensor, coarse: bool = False) -> float:
    """How far an output may move, over its largest value, where a sample is in another batch, since sums are in another
    order. Of whole numbers and truth values, which name things, it is the share that may become others, larger where
    the network computes in 16 bits (`coarse`).

    >>> numbers, names = torch.zeros(1), torch.zeros(1).long()
    >>> batch_rounding(numbers), batch_rounding(numbers.bfloat16()), batch_rounding(names), batch_rounding(names, True)
    (0.001, 0.05, 0.0001, 0.05)
    """
    if not output.is_floating_point() and not output.is_complex():
        return 5e-2 if coarse else 1e-4
    return 1e-3 if output.dtype.to_real() in (torch.float32, torch.float64) else 5e-2
