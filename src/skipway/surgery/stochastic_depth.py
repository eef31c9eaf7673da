"""`skip_compute(model, rate, example)`: stochastic depth that does not compute what it drops."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.surgery.block_rows import changed, present
from skipway.surgery.operation import Operation
from skipway.surgery.preconditions import admitted, refuse_branching
from skipway.surgery.verification import difference, outputs
from skipway.tracing import Example

__all__ = ["skip_compute"]


def skip_compute(model: nn.Module, rate: float, example: Example, *, rising: bool = True) -> Operation:
    """Stochastic depth that does not compute what it drops, around anybody's blocks, in place.

    In training a block sees only k = ⌈n(1 − p)⌉ of the n samples, drawn anew in each pass, and the others carry x:
    y = x, and on the drawn ones y = x + (n/k)(block(x) − x), so that the expectation is the block's own output. k does
    not depend on what is drawn, and is at least 1: shapes stay static for `torch.compile`, and every parameter has a
    gradient for DDP. In evaluation the block is what it was. Stochastic depth of the block's own is best switched off.

    Args:
        model: any module that `chain` can read, with blocks that carry x itself.
        rate: p of the last block, 0 < p < 1.
        example: what the model is called with.
        rising: p_l = p · l/L, as in Huang et al. 2016 (https://arxiv.org/abs/1603.09382, eq. 4); else p everywhere.

    Raises:
        SkipwayError: the rate is not between 0 and 1, or the model has no such block.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    >>> operation = skip_compute(model, 0.5, torch.randn(8, 3, 8))
    >>> [round(block.skipped, 3) for block in model.layers]
    [0.125, 0.25, 0.375, 0.5]
    """
    if not 0 < rate < 1:
        raise SkipwayError(f"rate={rate}: the share of samples that a block skips has to be between 0 and 1")
    model = admitted(model)
    refuse_branching(model, example, "skip_compute")
    blocks = present(model, example)
    before = outputs(model, example)
    operation = Operation(model, f"{type(model).__name__} skips up to {rate:g} of its blocks' samples", {}, {}, {})
    touched = {}
    try:
        for number, name in enumerate(blocks, start=1):
            block, own = model.get_submodule(name), rate * (number / len(blocks) if rising else 1)
            operation.steps.append(changed(block, skipping(type(block))))
            block.skipped = own  # type: ignore[assignment]
            operation.steps.append(partial(delattr, block, "skipped"))
            touched[name] = f"rate {own:.3g}"
        operation.report = {"difference": difference(before, outputs(model, example))}
    except BaseException:
        operation.undo()
        raise
    operation.touched = touched
    return operation


@cache
def skipping(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `kind` that in training computes only some of the samples."""

    def forward(self: nn.Module, x: Tensor, *others: Any, **named: Any) -> Any:
        if not self.training:
            return kind.forward(self, x, *others, **named)
        count = x.shape[0]
        kept = max(1, int(-(-count * (1 - self.skipped) // 1)))  # type: ignore[operator]
        drawn = torch.randperm(count, device=x.device)[:kept]
        part = x[drawn]
        change = kind.forward(self, part, *others, **named) - part
        return x.index_add(0, drawn, (change * (count / kept)).to(x.dtype))

    return type(f"{kind.__name__}Skipping", (kind,), {"forward": forward, "__module__": kind.__module__})
