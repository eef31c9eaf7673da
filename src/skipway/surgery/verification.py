"""Whether an operation kept its promise: outputs before and after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from skipway.tracing import Example, preserved_state
from skipway.tracing.example import call_model

__all__ = ["difference", "outputs"]


def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """The tensors that the model puts out in evaluation mode."""
    with preserved_state(model), torch.no_grad():
        output = call_model(model.eval(), example)
    found = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
    # an object that is no tree
    return found or [value for value in vars(output).values() if isinstance(value, Tensor)]


def difference(before: Sequence[Tensor], after: Sequence[Tensor], *, mean: bool = False) -> float:
    """Largest difference over the largest magnitude, or with `mean` the root mean squares of both instead."""
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if not old.is_floating_point() or old.is_meta or not old.numel():
            continue
        gap, size = (old - new).float(), old.float()
        pair = (gap.norm(), size.norm()) if mean else (gap.abs().max(), size.abs().max())
        found = float(pair[0]) / (float(pair[1]) or 1.0)
        worst = max(worst, found if found == found else float("inf"))  # not a number is no agreement
    return worst
