"""`skip_compute(model, example, rate)`: stochastic depth that does not compute what it drops."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.surgery.block_survey import require_blocks
from skipway.surgery.operation import Operation
from skipway.surgery.preconditions import refuse_branching, require_operable
from skipway.surgery.transaction import transaction
from skipway.tracing import Example, as_example

__all__ = ["skip_compute"]


def skip_compute(model: nn.Module, example: Example, rate: float, *, rising: bool = True) -> Operation:
    """Let blocks of any network skip a share of the samples in training, in place: stochastic depth that saves time.

    In training a block sees only k = ⌈n(1 − p)⌉ of the n samples, drawn anew in each pass, and the others carry x:
    y = x, and on the drawn ones y = x + (n/k)(block(x) − x), so that the expectation is the block's own output. k does
    not depend on what is drawn, and is at least 1: shapes stay static for `torch.compile`, and every parameter has a
    gradient for DDP. In evaluation the block is what it was. Stochastic depth of the block's own is best switched off.

    Args:
        model: any module that `chain` can read, with blocks that carry x itself.
        example: what the model is called with.
        rate: p of the last block, 0 < p < 1.
        rising: p_l = p · l/L, as in Huang et al. 2016 (https://arxiv.org/abs/1603.09382, eq. 4); else p everywhere.

    Raises:
        SkipwayError: the rate is not between 0 and 1, or the model has no such block; the model is as before.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    >>> operation = skip_compute(model, torch.randn(8, 3, 8), rate=0.5)
    >>> [round(block.skipped, 3) for block in model.layers]
    [0.125, 0.25, 0.375, 0.5]
    """
    if not 0 < rate < 1:
        raise SkipwayError(f"rate={rate}: the rule is a share of samples between 0 and 1, 0.1 for example")
    model, example = require_operable(model), as_example(example)
    refuse_branching(model, example, "skip_compute")
    blocks = require_blocks(model, example).calls
    title = f"{type(model).__name__} skips up to {rate:g} of its blocks' samples"
    with transaction(model, example, title=title) as change:
        for number, name in enumerate(blocks, start=1):
            block, own = model.get_submodule(name), rate * (number / len(blocks) if rising else 1)
            change.set_class(block, skipping(type(block)))
            change.set_attribute(block, "skipped", own)
            change.touched[name] = f"rate {own:.3g}"
        return change.commit()


@cache
def skipping(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `kind` that computes only some of the samples in training."""

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
