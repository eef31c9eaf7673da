"""One batch through an untrained network: does the signal keep its size from stage to stage?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from skipway.tracing import preserved_state
from skipway.tracing.chain import chain

__all__ = ["StageSignal", "first_non_finite", "signal_check"]

# a stream that grows or shrinks by this factor within one stage, or a branch that outweighs its stream by it
MANY_ORDERS = 1e4
# more stages than this are taken together
MOST_STAGES = 8


@dataclass(frozen=True)
class StageSignal:
    """What one stage does to the signal.

    Args:
        name: module path of the stage.
        connections: how many residual connections it holds.
        std_in: standard deviation of the stream in front of its first connection.
        std_out: the same behind its last.
        ratio: standard deviation of branch over that of shortcut, the median of its connections.
        warning: "not finite", "explodes", "vanishes", or an empty string.
    """

    name: str
    connections: int
    std_in: float
    std_out: float
    ratio: float

    @property
    def warning(self) -> str:
        if not all(map(math.isfinite, (self.std_in, self.std_out, self.ratio))):
            return "not finite"
        if self.std_out > MANY_ORDERS * self.std_in or self.ratio > MANY_ORDERS:
            return "explodes"
        if self.std_out * MANY_ORDERS < self.std_in:
            return "vanishes"
        return ""


def signal_check(model: nn.Module, batch: Tensor) -> list[StageSignal]:
    """Send `batch` through the network in training mode and measure the stream at every residual connection.

    Weights, running statistics, training mode and random state are left as they were.

    >>> import skipway as sw
    >>> rows = signal_check(sw.build("resnet20"), torch.randn(4, 3, 8, 8))
    >>> [(row.name, row.connections) for row in rows]
    [('stages.0', 3), ('stages.1', 3), ('stages.2', 3)]
    """
    stages: dict[str, list[dict[str, float]]] = {}
    measured = measure(model, batch)
    for stage, row in zip(stages_of(list(measured)), measured.values(), strict=True):
        stages.setdefault(stage, []).append(row)
    return [
        StageSignal(
            name=name,
            connections=len(rows),
            std_in=rows[0]["in"],
            std_out=rows[-1]["out"],
            ratio=median(row["branch"] / row["shortcut"] if row["shortcut"] else math.inf for row in rows),
        )
        for name, rows in stages.items()
    ]


def stages_of(names: list[str]) -> list[str]:
    """The stage of each connection: the path that owns it, shortened until there are few enough to read.

    >>> stages_of(["stages.0.0", "stages.0.1", "stages.1.0"])
    ['stages.0', 'stages.0', 'stages.1']
    >>> set(stages_of([f"blocks.{number}.attention" for number in range(12)]))
    {'blocks'}
    """
    paths = [name.rpartition(".")[0] or name for name in names]
    while len(set(paths)) > MOST_STAGES and any("." in path for path in paths):
        paths = [path.rpartition(".")[0] or path for path in paths]
    return paths


def first_non_finite(model: nn.Module, batch: Tensor) -> str | None:
    """The name of the first connection that puts out a value that is not finite; None if all are."""
    for name, measured in measure(model, batch).items():
        if not math.isfinite(measured["out"]):
            return name
    return None


def measure(model: nn.Module, batch: Tensor) -> dict[str, dict[str, float]]:
    """Standard deviation at "in", "branch", "shortcut" and "out" of every connection, in order of the chain."""
    measured: dict[str, dict[str, float]] = {}
    handles: list[Any] = []
    for connection in chain(model):
        row = measured[connection.name] = {}
        residual = connection.residual
        # behind the scale and in front of stochastic depth, which would drop what is to be measured
        places = {"branch": residual.scale, "shortcut": residual.shortcut}
        handles.append(
            residual.register_forward_pre_hook(lambda _, given, row=row: row.update(**{"in": std(given[0])}))
        )
        handles.append(residual.register_forward_hook(lambda _, given, out, row=row: row.update(out=std(out))))
        for key, module in places.items():
            handles.append(
                module.register_forward_hook(lambda _, given, out, row=row, key=key: row.update({key: std(out)}))
            )
    try:
        with preserved_state(model), torch.no_grad():
            model.train()
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return measured


def std(values: Tensor) -> float:
    """The standard deviation over all elements."""
    return float(values.float().std(correction=0))
