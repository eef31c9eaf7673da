"""What a backend returns beside what the original returns: containers, types, values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_structure, tree_unflatten

from skipway.errors import SkipwayError, counted
from skipway.inference.backends import Run
from skipway.surgery.verification import difference, is_whole
from skipway.tracing.containers import tensors_in
from skipway.tracing.samples import batch_rounding

__all__ = ["has_numbers", "in_container", "in_type", "is_rounding", "output_difference", "whole_share"]


def in_type(expected: Any, run: Run) -> Run:
    """A backend whose output has the types that the original's has, and lies in memory in the usual order where that
    does, so that it can be viewed in the same shapes: its tensors one by one, where there are as many.
    """
    forms = [(leaf.dtype, is_contiguous(leaf)) for leaf in tree_leaves(expected) if isinstance(leaf, Tensor)]

    def typed(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten(run(*args, **kwargs))
        held = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        wanted = iter(forms if len(forms) == len(held) else [(leaf.dtype, False) for leaf in held])
        return tree_unflatten(
            [in_form(leaf, *next(wanted)) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure
        )

    return typed


def in_form(tensor: Tensor, dtype: torch.dtype, contiguous: bool) -> Tensor:
    """A tensor in a type, and in the usual order in memory where that is wanted."""
    tensor = tensor.to(dtype)
    return tensor.contiguous() if contiguous and tensor.layout is torch.strided else tensor


def is_contiguous(tensor: Tensor) -> bool:
    """Whether a dense tensor lies in memory in the usual order."""
    return tensor.layout is torch.strided and not tensor.is_nested and tensor.is_contiguous()


def in_container(expected: Any, run: Run) -> Run:
    """A backend that returns one tensor, in the containers that the original returns it in: a tuple, a mapping, an
    output of transformers.

    Raises:
        SkipwayError: the original returns none or several.
    """
    leaves, structure = tree_flatten(expected)
    places = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(places) != 1:
        found = counted(len(places), "tensor") if places else f"a {type(expected).__name__}"
        raise SkipwayError(f"this backend returns one tensor, and the model returns {found}")
    if isinstance(expected, Tensor):
        return run

    def contained(*args: Any, **kwargs: Any) -> Any:
        (place,) = places
        return tree_unflatten([*leaves[:place], run(*args, **kwargs), *leaves[place + 1 :]], structure)

    return contained


def output_difference(expected: Any, output: Any) -> float:
    """Largest difference of two outputs over the largest value of each tensor, of whole numbers and truth values the
    share that differs; NaN for NaN is none.

    Raises:
        SkipwayError: they hold other tensors, or in other containers.
    """
    pairs = pairs_of_tensors(expected, output)
    return difference([old for old, _ in pairs], [new for _, new in pairs])


def is_rounding(expected: Any, output: Any, coarse: bool = False) -> bool:
    """Whether two outputs differ by rounding alone, each of their tensors, see `batch_rounding`; `coarse` where the
    network computes in 16 bits.

    Raises:
        SkipwayError: they hold other tensors, or in other containers.
    """
    pairs = [pair for pair in pairs_of_tensors(expected, output) if pair[0].numel()]
    return all(difference([old], [new]) <= batch_rounding(old, coarse) for old, new in pairs)


def pairs_of_tensors(expected: Any, output: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of two outputs, with 0 where both are not a number.

    Raises:
        SkipwayError: they hold other tensors, or in other containers.
    """
    before, after = list(tensors_in(expected)), list(tensors_in(output))
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        tensors = counted(len(after), "tensor")
        raise SkipwayError(f"it returns {tensors}, or of other shapes, for the original's {len(before)}")
    if tree_structure(expected) != tree_structure(output):
        raise SkipwayError(f"it returns a {type(output).__name__} for the original's {type(expected).__name__}")
    return [without_nan(*pair) for pair in zip(before, after, strict=True)]


def whole_share(expected: Any, output: Any) -> float:
    """Largest share of the whole numbers and truth values in a tensor of an output that differ from the original's."""
    pairs = zip(tensors_in(expected), tensors_in(output), strict=True)
    whole = [pair for pair in pairs if pair[0].numel() and all(map(is_whole, pair))]
    return max((float((old != new).float().mean()) for old, new in whole), default=0.0)


def without_nan(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors with 0 where both are not a number."""
    both = old.isnan() & new.isnan()
    return (old.masked_fill(both, 0), new.masked_fill(both, 0)) if both.any() else (old, new)


def has_numbers(output: Any) -> bool:
    """Whether there are values among an output that are not NaN."""
    return any(not bool(tensor.isnan().all()) for tensor in tensors_in(output))
