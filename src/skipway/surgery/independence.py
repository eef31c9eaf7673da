"""What outputs do not depend on: later positions in a causal network, other samples, positions that are masked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from skipway.tracing import Example, as_example, call_model, preserved_state
from skipway.tracing.containers import tensors_in
from skipway.tracing.example import copy_example

__all__ = ["Perturbation", "measure_leaks", "others_like"]

MOST = 8
"""Perturbations of one example, each of which takes a forward pass."""


@dataclass(frozen=True)
class Perturbation:
    """Values of one input that are exchanged for others.

    Args:
        argument: name of the input.
        axis: the later half along it is exchanged; of a padding mask 0, if it is (samples, positions) as the input is,
            and 1 if the input is (positions, samples).
        mask: name of the padding mask whose positions of one kind are exchanged instead.
        kind: which kind: True are the larger values of the mask.
    """

    argument: str
    axis: int
    mask: str = ""
    kind: bool = False

    def __str__(self) -> str:
        if self.mask:
            return f"what {self.mask} hides in {self.argument}"
        return f"later entries of {self.argument} along axis {self.axis}"


Leaks = dict[Perturbation, dict[tuple[int, int], tuple[float, float]]]
"""For each perturbation, by the number of an output and its axis: the largest change where nothing was exchanged, and
where something was, over the largest value of the output."""


class FlatExample:
    """An example as a list of tensors with names.

    Args:
        example: what a model is called with.
    """

    def __init__(self, example: Example) -> None:
        found, self.spec = tree_flatten_with_path(as_example(example))
        self.values: list[Any] = [value for _, value in found]
        self.names = [argument_name(keystr(path)) for path, _ in found]

    def with_values(self, changes: dict[int, Tensor]) -> Any:
        """A copy of the example with other tensors at some places."""
        values = [changes.get(number, value) for number, value in enumerate(self.values)]
        return copy_example(tree_unflatten(values, self.spec))

    @property
    def tensors(self) -> dict[int, Tensor]:
        """The tensors that have an axis, by their numbers."""
        return {number: value for number, value in enumerate(self.values) if isinstance(value, Tensor) and value.ndim}


def argument_name(path: str) -> str:
    """Path of an input in words.

    >>> argument_name(""), argument_name("[0]"), argument_name("['input_ids']")
    ('the input', 'argument 0', 'input_ids')
    """
    if not path:
        return "the input"
    inner = path[1:].replace("]", "", 1)
    return f"argument {inner}" if inner[0].isdigit() else inner.replace("'", "")


def measure_leaks(model: nn.Module, example: Example) -> Leaks:
    """Exchange parts of the inputs, and measure which outputs change, in evaluation mode; the model is left alone."""
    flat, leaks = FlatExample(example), Leaks()
    with preserved_state(model), torch.no_grad():
        model.eval()
        plain = run(model, flat.with_values({}))
        for perturbation, before, after, earlier in perturbations(flat, plain):
            try:
                base = run(model, flat.with_values(before)) if before else plain
                changed = run(model, flat.with_values({**before, **after}))
            except Exception:  # whatever a network raises that is not given what it expects: nothing is known then
                continue
            leaks[perturbation] = compare_outputs(base, changed, earlier)
    return leaks


def run(model: nn.Module, example: Any) -> list[Tensor]:
    """The outputs of one pass."""
    return list(tensors_in(call_model(model, example)))


Change = tuple[Perturbation, dict[int, Tensor], dict[int, Tensor], Tensor]


def perturbations(flat: FlatExample, outputs: Sequence[Tensor]) -> Iterator[Change]:
    """Perturbations that an output can be compared under, at most `MOST`: what is changed before, what is exchanged,
    and which positions are not, along one axis, or along the first two under a mask.
    """
    lengths = {length for output in outputs for length in output.shape}
    first = next(iter(flat.tensors), None)
    if first is None:
        return
    count = 0
    for number, tensor in flat.tensors.items():
        if number != first and is_mask(tensor):
            yield from masked_perturbations(flat, first, number)
            continue
        for axis, length in enumerate(tensor.shape):
            if length > 1 and length in lengths and count < MOST:
                count += 1
                earlier = torch.arange(length, device=tensor.device) < length - length // 2
                shape = [length if each == axis else 1 for each in range(tensor.ndim)]
                exchanged = torch.where(earlier.view(shape), tensor, others_like(tensor))
                yield Perturbation(flat.names[number], axis), {}, {number: exchanged}, earlier


def masked_perturbations(flat: FlatExample, number: int, mask: int) -> Iterator[Change]:
    """Perturbations of the input where a padding mask has one of its two values; a mask that has one value only gets
    the other one at the last positions.
    """
    tensor, given = flat.tensors[number], flat.tensors[mask]
    if given.ndim != 2 or tensor.ndim < 2 or given.shape[1] < 2:
        return
    straight = tensor.shape[:2] == given.shape
    if not straight and tensor.shape[:2] != given.T.shape:
        return
    high = given != 0 if not given.is_floating_point() else given == 0
    before: dict[int, Tensor] = {}
    if bool(high.all()) or not bool(high.any()):
        last = torch.arange(given.shape[1], device=given.device) >= given.shape[1] - max(1, given.shape[1] // 4)
        other = torch.full_like(given, -torch.inf) if given.is_floating_point() else (1 - given.long()).to(given.dtype)
        before = {mask: torch.where(last, other, given)}
        high = high ^ last
    for kind in (False, True):
        chosen = (high if straight else high.T) == kind
        shape = (*chosen.shape, *(1,) * (tensor.ndim - 2))
        exchanged = torch.where(chosen.view(shape), others_like(tensor), tensor)
        hidden = Perturbation(flat.names[number], int(not straight), flat.names[mask], kind)
        yield hidden, before, {number: exchanged}, ~chosen


def is_mask(tensor: Tensor) -> bool:
    """Whether a tensor holds two values that say what to look at: yes and no, or 0 and -inf."""
    if tensor.is_floating_point():
        return bool((tensor.isneginf() | (tensor == 0)).all())
    return tensor.dtype is torch.bool or bool(((tensor == 0) | (tensor == 1)).all())


def others_like(tensor: Tensor) -> Tensor:
    """Other values of the same kind: random ones of the same mean and deviation, or the whole numbers that are there in
    another order.
    """
    generator = torch.Generator().manual_seed(tensor.numel())
    if tensor.is_floating_point() or tensor.is_complex():
        values = tensor.real if tensor.is_complex() else tensor
        finite = values[values.isfinite()].float()
        deviation, mean = (finite.std(), finite.mean()) if finite.numel() > 1 else (torch.ones(()), torch.zeros(()))
        drawn = torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor.device)
        return (drawn * (deviation if float(deviation) > 0 else 1.0) + mean).to(tensor.dtype)
    if bool((tensor == tensor.flatten()[0]).all()):
        return torch.where(tensor == 0, torch.ones_like(tensor), torch.zeros_like(tensor))
    kinds = tensor.unique()
    number = torch.searchsorted(kinds, tensor.contiguous())
    step = torch.randint(1, len(kinds), tensor.shape, generator=generator, device="cpu").to(tensor.device)
    return kinds[(number + step) % len(kinds)]


def compare_outputs(
    base: Sequence[Tensor], changed: Sequence[Tensor], kept: Tensor
) -> dict[tuple[int, int], tuple[float, float]]:
    """Changes of the outputs at the positions that were kept, and at the others, by output and axis."""
    found: dict[tuple[int, int], tuple[float, float]] = {}
    if len(base) != len(changed):
        return found
    width = kept.ndim
    for number, (old, new) in enumerate(zip(base, changed, strict=True)):
        if old.shape != new.shape or not (old.is_floating_point() or old.is_complex()):
            continue
        gap = torch.where(old == new, torch.zeros((), device=old.device), (new - old).abs().float())
        size = largest(old.abs().float().nan_to_num(0, 0, 0)) or 1.0
        for axis in range(old.ndim - width + 1) if width == 1 else range(min(1, old.ndim - 1)):
            if old.shape[axis : axis + width] != kept.shape:
                continue
            rows = gap.movedim(list(range(axis, axis + width)), list(range(width)))
            stays = kept.to(old.device)
            found[number, axis] = (largest(rows[stays]) / size, largest(rows[~stays]) / size)
    return found


def largest(values: Tensor) -> float:
    """The largest value; not a number if one is none."""
    return float(values.max()) if values.numel() else 0.0
