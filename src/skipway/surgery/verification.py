"""Outputs of a model before and after an operation, and hooks for a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError, counted
from skipway.tracing import Example, call_model, preserved_state
from skipway.tracing.containers import tensors_in
from skipway.tracing.example import copy_example

__all__ = ["aligned", "difference", "forward_hooks", "is_whole", "output_gap", "outputs"]


def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """Tensors that the model returns in evaluation mode, without gradients; the model stays as it is."""
    with preserved_state(model), torch.no_grad():
        output = call_model(model.eval(), copy_example(example))
    return list(tensors_in(output))


def aligned(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    """For each output before, the output after that is compared with it. Where a network returns more than before (the
    caches of blocks that were added), that is the next one that agrees best; where an output after the first holds all
    of them along a last axis that is longer now, its entries are aligned in the same way.

    Raises:
        SkipwayError: the network returns fewer outputs, or outputs of other shapes.
    """
    if len(before) == len(after) and all(old.shape == new.shape for old, new in zip(before, after, strict=True)):
        return list(after)
    if len(before) == len(after):
        same = [after[0], *(entries_aligned(old, new) for old, new in zip(before[1:], after[1:], strict=True))]
        if all(old.shape == new.shape for old, new in zip(before, same, strict=True)):
            return same
    found: list[Tensor] = []
    first = 0
    for number, old in enumerate(before):
        last = len(after) - (len(before) - number)
        gaps = {
            place: difference([old], [after[place].detach()]) if old.numel() else 0.0
            for place in range(first, last + 1)
            if after[place].shape == old.shape
        }
        if not gaps:
            tensors = counted(len(before), "tensor")
            raise SkipwayError(
                f"the network returned {tensors} and returns {len(after)}, none of which is like output "
                f"{number} of shape {tuple(old.shape)}"
            )
        best = min(gaps, key=lambda place: (gaps[place], place))
        found.append(after[best])
        first = best + 1
    return found


def entries_aligned(before: Tensor, after: Tensor) -> Tensor:
    """The entries of a tensor that are compared with those before, where its last axis is longer: a slot of a state for
    each block (RWKV). Along any other axis a cache of tokens has grown, which is a difference.
    """
    longer = [axis for axis, pair in enumerate(zip(before.shape, after.shape, strict=False)) if pair[0] != pair[1]]
    if before.ndim != after.ndim or longer != [before.ndim - 1] or before.shape[longer[0]] > after.shape[longer[0]]:
        return after
    return torch.stack(aligned(before.unbind(longer[0]), after.unbind(longer[0])), longer[0])


def output_gap(before: Sequence[Tensor], after: Sequence[Tensor], *, mean: bool = False) -> float:
    """The `difference` of outputs that agree in number or not: a network returns more or fewer caches after blocks were
    added or left out.
    """
    if sum(tensor.numel() for tensor in after) < sum(tensor.numel() for tensor in before):
        return difference(aligned(after, before), after, mean=mean)
    return difference(before, aligned(before, after), mean=mean)


def difference(before: Sequence[Tensor], after: Sequence[Tensor], *, mean: bool = False) -> float:
    """Largest difference over the largest magnitude, or with `mean` the ratio of their root mean squares.

    Values of every type count, complex ones too, in their own type but in float32 at least; equal ones differ by 0,
    infinite ones included. Whole numbers and truth values name things (tokens, classes, indices), so that 285 is as far
    from 281 as from 7: of these it is the share that differs. Tensors on the meta device have no values.

    Raises:
        SkipwayError: there are no values to compare, so that nothing could be verified.
    """
    if not any(old.numel() for old in before):
        raise SkipwayError(
            "the model returns no values on this example, so nothing can be compared before and after: the rule is an "
            "example of at least one sample, and tensors among the outputs"
        )
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if old.is_meta or not old.numel():
            continue
        if is_whole(old) and is_whole(new):
            worst = max(worst, float((old != new).float().mean()))
            continue
        old, new = (torch.view_as_real(each.resolve_conj()) if each.is_complex() else each for each in (old, new))
        wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
        gap = torch.where(old == new, 0.0, new.to(wide) - old.to(wide))
        size = torch.where(old.isfinite(), old.to(wide), 0.0)
        pair = (gap.norm(), size.norm()) if mean else (gap.abs().max(), size.abs().max())
        ratio = float(pair[0]) / (float(pair[1]) or 1.0)
        worst = max(worst, ratio if ratio == ratio else float("inf"))  # not a number is no agreement
    return worst


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor holds whole numbers or truth values."""
    return not tensor.is_floating_point() and not tensor.is_complex()


@contextmanager
def forward_hooks(
    model: nn.Module,
    names: Iterable[str],
    *,
    enter: Callable[..., None] | None = None,
    leave: Callable[..., None] | None = None,
) -> Iterator[None]:
    """Within it, passes call `enter(name, module, args, kwargs)` before and `leave(name, module, args, kwargs, output)`
    after each of the modules, also if a module raises.
    """
    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            if enter is not None:
                hook: Any = partial(enter, name)
                stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            if leave is not None:
                hook = partial(leave, name)
                stack.enter_context(module.register_forward_hook(hook, with_kwargs=True, always_call=True))
        yield
