"""Outputs of a model before and after an operation, and hooks for a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from skipway.tracing import Example, call_model, preserved_state

__all__ = ["difference", "forward_hooks", "outputs"]


def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """Tensors that the model returns in evaluation mode, without gradients; the model stays as it is."""
    with preserved_state(model), torch.no_grad():
        output = call_model(model.eval(), example)
    found = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
    # an object that is no tree
    return found or [value for value in vars(output).values() if isinstance(value, Tensor)]


def difference(before: Sequence[Tensor], after: Sequence[Tensor], *, mean: bool = False) -> float:
    """Largest difference over the largest magnitude, or with `mean` the ratio of their root mean squares."""
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if not old.is_floating_point() or old.is_meta or not old.numel():
            continue
        gap, size = (old - new).float(), old.float()
        pair = (gap.norm(), size.norm()) if mean else (gap.abs().max(), size.abs().max())
        ratio = float(pair[0]) / (float(pair[1]) or 1.0)
        worst = max(worst, ratio if ratio == ratio else float("inf"))  # not a number is no agreement
    return worst


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
