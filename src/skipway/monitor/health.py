"""The health of every connection while a network trains, sampled now and then on a few images."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from skipway.nn.warmup import warmup_state
from skipway.probes import probe
from skipway.probes.objective import Loss
from skipway.tracing import Example, as_example
from skipway.tracing.chain import Chain, WatchedConnection, chain
from skipway.tracing.containers import map_tensors

__all__ = ["Health", "sample_health"]

# images in a sample
IMAGES = 32
# steps before the first sample, while the network warms up
FIRST = 20
# growth of a stream or gradient since the first sample that is on the way out of float's range
GROWN = 1e3
# share of the largest number of the arithmetic; sums of squares overflow before the values do
NEAR_OVERFLOW = 1 / 16

Rows = dict[str, dict[str, float]]


def sample_health(
    model: nn.Module,
    example: Example,
    targets: Any = None,
    loss: Loss | None = None,
    connections: Iterable[WatchedConnection] | None = None,
) -> Rows:
    """One forward and one backward pass through any network, which is left alone: four numbers per connection.

    "stream" is the root mean square of the sum y = x + F(x), "largest" its largest magnitude, "branch" the root mean
    square of F(x), "gradient" that of ∂loss/∂y, 0 where no gradient arrives. A network of ours without skips is
    measured at the outputs of its blocks.

    Args:
        model: any network.
        example: what it is called with.
        targets: what the loss compares the output with.
        loss: (output, targets) → a number; None: see `skipway.probes.compute_loss`.
        connections: `chain(model, example)`, where it is known already.

    >>> import skipway as sw
    >>> rows = sample_health(sw.build("resnet20"), torch.randn(4, 3, 8, 8))
    >>> list(rows["stages.0.0"])
    ['stream', 'largest', 'branch', 'gradient']
    """
    measures = ("stream", "largest", "branch", "gradient_after")
    signals = probe(model, example, targets, loss, measures, connections=connections)
    rows: Rows = {}
    for name, row in (signals.connections or signals.modules).items():
        gradient = row.pop("gradient_after", 0.0)
        rows[name] = {key: row[key] for key in measures if key in row} | {"gradient": gradient}
    return rows


@dataclass
class Health:
    """Decides when to take a sample of a network in training, and warns about what it shows.

    Args:
        share: of the training time that samples may take, 0 <= share < 1; 0 takes none.
        dtype: of the forward passes, for the largest number before overflow.
    """

    share: float
    dtype: torch.dtype = torch.float32
    first: Rows = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)
    spent: float = 0.0
    steps: int = 0
    connections: Chain[WatchedConnection] | None = None
    clock: int | None = None

    def due(self) -> bool:
        """Whether it is time for a sample: the earlier ones took less than the share. Counts the steps."""
        self.steps += 1
        if self.share == 0 or self.steps < FIRST:
            return False
        return self.spent <= self.share * (time.monotonic() - self.began)

    def sample(self, model: nn.Module, example: Example, targets: Any, loss: Loss) -> tuple[Rows, list[str]]:
        """Take a sample of the first images of a batch: its rows, and one sentence for each new warning."""
        start = time.monotonic()
        batch = as_example(example), targets
        example, targets = map_tensors(lambda each: each[:IMAGES] if each.ndim else each, batch)
        if self.connections is None:
            self.connections = chain(model, example)
        rows = sample_health(model, example, targets, loss, self.connections)
        still = self.clock_warnings(model)
        if not self.first:
            # the first sample pays for what is done once, so its time does not count
            self.first, self.began = rows, time.monotonic()
            return rows, still
        self.spent += time.monotonic() - start
        return rows, [*still, *self.warnings(rows)]

    def clock_warnings(self, model: nn.Module) -> list[str]:
        """A warning, once, about a residual warm-up that stands still between samples, or at 0 in the first one."""
        state, before = warmup_state(model), self.clock
        if state is None or not state.running:
            return []
        self.clock = state.step
        moved = state.step != before if before is not None else state.step > 0 or not self.steps
        if moved or "clock" in self.warned:
            return []
        self.warned.add("clock")
        return [
            f"the residual warm-up stands still at {state}: call skipway.set_step(model, step, total) after each "
            "optimizer step"
        ]

    def warnings(self, rows: Rows) -> list[str]:
        """New warnings; each names the first connection that it holds for, and is given once.

        >>> health = Health(0.01, first={"blocks.0": {"stream": 1.0, "largest": 3.0, "branch": 1.0, "gradient": 1.0}})
        >>> health.warnings({"blocks.0": {"stream": 2e3, "largest": 9e3, "branch": 1.0, "gradient": 1.0}})
        ['the stream after blocks.0 has grown from 1 to 2e+03 since the start']
        """
        most = torch.finfo(self.dtype).max * NEAR_OVERFLOW
        found: dict[str, str] = {}
        for name, row in rows.items():
            early = self.first.get(name, row)
            for key in ("stream", "gradient"):
                if not math.isfinite(row[key]):
                    found.setdefault(f"{key} not finite", f"the {key} after {name} is not finite")
                elif row[key] > GROWN * early[key] > 0:
                    text = f"the {key} after {name} has grown from {early[key]:.3g} to {row[key]:.3g} since the start"
                    found.setdefault(f"{key} grown", text)
            if row["largest"] > most:
                text = f"the stream after {name} reaches {row['largest']:.3g}, near the largest number of {self.dtype}"
                found.setdefault("overflow", text)
        new = {key: text for key, text in found.items() if key not in self.warned}
        self.warned |= new.keys()
        return list(new.values())
