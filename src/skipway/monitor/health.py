"""How every connection fares while a network trains: sampled now and then, beside the run and without a trace in it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipway.tracing import preserved_state
from skipway.tracing.chain import chain

__all__ = ["Health", "sample_health"]

# images that are sent through for a sample
IMAGES = 32
# steps in front of the first sample, when the network is warm
FIRST = 20
# a stream or a gradient that has grown by this factor since the first sample is on its way out of float's range
GROWN = 1e3
# a share of the largest number of the arithmetic; sums of squares overflow before the values do
NEAR_OVERFLOW = 1 / 16


def sample_health(model: nn.Module, inputs: Tensor, loss_of: Callable[[Tensor], Tensor]) -> dict[str, dict[str, float]]:
    """Forward and backward once, and of every connection: root mean squares of the stream behind it, of its branch, of
    the gradient behind it, and the largest magnitude in the stream. Weights, buffers, modes, random state stay.

    >>> import skipway as sw
    >>> rows = sample_health(sw.build("resnet20"), torch.randn(4, 3, 8, 8), lambda logits: logits.square().mean())
    >>> list(rows["stages.0.0"])
    ['stream', 'largest', 'branch', 'gradient']
    """
    rows: dict[str, dict[str, float]] = {}
    streams: list[tuple[str, Tensor]] = []
    with ExitStack() as stack:
        for connection in chain(model):
            name, branch = connection.name, connection.residual.scale

            def behind(_: nn.Module, given: Any, out: Tensor, name: str = name) -> None:
                row = rows.setdefault(name, {})
                row["stream"], row["largest"] = size(out), float(out.detach().abs().max())
                streams.append((name, out))

            def scaled(_: nn.Module, given: Any, out: Tensor, name: str = name) -> None:
                rows.setdefault(name, {})["branch"] = size(out)

            stack.callback(connection.residual.register_forward_hook(behind).remove)
            stack.callback(branch.register_forward_hook(scaled).remove)
        with preserved_state(model), torch.enable_grad():
            loss = loss_of(model(inputs))
            grads = torch.autograd.grad(loss, [out for _, out in streams], allow_unused=True)
    order = ("stream", "largest", "branch", "gradient")
    for (name, _), grad in zip(streams, grads, strict=True):
        rows[name]["gradient"] = 0.0 if grad is None else size(grad)
    return {name: {key: row[key] for key in order if key in row} for name, row in rows.items()}


def size(values: Tensor) -> float:
    """The root mean square."""
    return float(values.detach().float().square().mean().sqrt())


@dataclass
class Health:
    """When to look, and what to say about it.

    Args:
        share: of the training time that looking may take, 0 <= share < 1; 0 never looks.
        dtype: of the forward passes: what can overflow.
    """

    share: float
    dtype: torch.dtype = torch.float32
    first: dict[str, dict[str, float]] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)
    spent: float = 0.0
    steps: int = 0

    def due(self) -> bool:
        """Whether it is time for a look: the earlier ones took less than the share."""
        self.steps += 1
        if self.share == 0 or self.steps < FIRST:
            return False
        return self.spent <= self.share * (time.monotonic() - self.began)

    def look(
        self, model: nn.Module, inputs: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[dict[str, dict[str, float]], list[str]]:
        """A sample, and one sentence for each thing that is new and wrong."""
        start = time.monotonic()
        few = min(IMAGES, len(inputs))
        rows = sample_health(model, inputs[:few], lambda logits: loss(logits, labels[:few]))
        if not self.first:
            # the first look pays for what is done once; it does not count
            self.first, self.began = rows, time.monotonic()
            return rows, []
        self.spent += time.monotonic() - start
        return rows, self.warnings(rows)

    def warnings(self, rows: dict[str, dict[str, float]]) -> list[str]:
        """Each warning names the first connection that it holds for, and is given once.

        >>> health = Health(0.01, first={"blocks.0": {"stream": 1.0, "largest": 3.0, "branch": 1.0, "gradient": 1.0}})
        >>> health.warnings({"blocks.0": {"stream": 2e3, "largest": 9e3, "branch": 1.0, "gradient": 1.0}})
        ['the stream behind blocks.0 has grown from 1 to 2e+03 since the start']
        """
        most = torch.finfo(self.dtype).max * NEAR_OVERFLOW
        found: dict[str, str] = {}
        for name, row in rows.items():
            early = self.first.get(name, row)
            for key, what in (("stream", "stream behind"), ("gradient", "gradient behind")):
                if not math.isfinite(row[key]):
                    found.setdefault(f"{key} not finite", f"the {what} {name} is not finite")
                elif row[key] > GROWN * early[key] > 0:
                    text = f"the {what} {name} has grown from {early[key]:.3g} to {row[key]:.3g} since the start"
                    found.setdefault(f"{key} grown", text)
            if row["largest"] > most:
                text = f"{name} puts out {row['largest']:.3g}, near the largest number of {self.dtype}"
                found.setdefault("overflow", text)
        new = {key: text for key, text in found.items() if key not in self.warned}
        self.warned |= new.keys()
        return list(new.values())
