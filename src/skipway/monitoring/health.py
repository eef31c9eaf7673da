"""The health of every connection while a network trains, sampled now and then on a few images."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from skipway.monitoring.rules import RULES, Evidence, WarningLog
from skipway.monitoring.sample import SAMPLES
from skipway.monitoring.warmup_clock import WarmupClock
from skipway.probes import probe
from skipway.probes.objective import Loss
from skipway.tracing import Example, as_example
from skipway.tracing.chain import Chain, WatchedConnection, chain
from skipway.tracing.containers import map_tensors

__all__ = ["Health", "sample_health"]

# steps before the first sample, while the network warms up
FIRST = 20
SIZES = tuple(rule for rule in RULES if rule.name.partition(" ")[0] in ("stream", "gradient", "overflow"))
"""The rules that read sizes alone."""

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
    rules: WarningLog = field(default_factory=lambda: WarningLog(SIZES))
    clock: WarmupClock = field(default_factory=WarmupClock)
    began: float = field(default_factory=time.monotonic)
    spent: float = 0.0
    steps: int = 0
    connections: Chain[WatchedConnection] | None = None

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
        example, targets = map_tensors(lambda each: each[:SAMPLES] if each.ndim else each, batch)
        if self.connections is None:
            self.connections = chain(model, example)
        rows = sample_health(model, example, targets, loss, self.connections)
        still = list(filter(None, [self.clock.warning(model, self.steps)]))
        if not self.first:
            # the first sample pays for what is done once, so its time does not count
            self.first, self.began = rows, time.monotonic()
            return rows, still
        self.spent += time.monotonic() - start
        return rows, [*still, *self.warnings(rows)]

    def warnings(self, rows: Rows) -> list[str]:
        """New warnings, of the rules of `skipway.monitoring.rules` that read sizes. Each names the first connection
        that it holds for, and is given again after 1,000 steps.

        >>> health = Health(0.01, first={"blocks.0": {"stream": 1.0, "largest": 3.0, "branch": 1.0, "gradient": 1.0}})
        >>> health.warnings({"blocks.0": {"stream": 2e3, "largest": 9e3, "branch": 1.0, "gradient": 1.0}})
        ['the stream after blocks.0 has grown from 1 to 2e+03 since the start']
        """
        found = self.rules.find(self.steps, Evidence(self.first, rows, dtype=self.dtype))
        return [text for _, _, text in found]
