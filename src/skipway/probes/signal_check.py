"""`check_signal(model, example)`: does the signal keep its size from stage to stage of an untrained network?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from torch import nn

from skipway.probes.signals import probe
from skipway.tracing import Example, preserved_state, unwrap

__all__ = ["StageSignal", "check_signal"]

# factor by which a stream may grow or shrink within one stage, and a branch exceed its stream
MANY_ORDERS = 1e4
# more stages than this are merged
MOST_STAGES = 8


@dataclass(frozen=True)
class StageSignal:
    """What one stage does to the signal.

    Args:
        name: module path of the stage.
        connections: how many residual connections it holds.
        std_in: standard deviation of the skip x at its first addition x + F(x), ≥ 0.
        std_out: standard deviation of the sum at its last addition, ≥ 0.
        ratio: std(F(x)) / std(x), the median of its connections, ≥ 0; inf where x is constant, nan without skips.
    """

    name: str
    connections: int
    std_in: float
    std_out: float
    ratio: float

    @property
    def warning(self) -> str:
        """ "not finite", "explodes", "vanishes", or an empty string."""
        if not (math.isfinite(self.std_in) and math.isfinite(self.std_out)) or self.ratio == math.inf:
            return "not finite"
        if self.std_out > MANY_ORDERS * self.std_in or self.ratio > MANY_ORDERS:
            return "explodes"
        if self.std_out * MANY_ORDERS < self.std_in:
            return "vanishes"
        return ""


def check_signal(model: nn.Module, example: Example) -> list[StageSignal]:
    """Send one batch through any network in training mode, measure the stream at every connection, change nothing.

    A network of ours without skips is measured at the outputs of its blocks. Connections whose addition cannot be
    observed (see `Observer`) are left out.

    Args:
        model: any network.
        example: what it is called with.

    >>> import torch, skipway as sw
    >>> rows = check_signal(sw.build("resnet20"), torch.randn(4, 3, 8, 8))
    >>> [(row.name, row.connections) for row in rows]
    [('stages.0', 3), ('stages.1', 3), ('stages.2', 3)]
    """
    model = unwrap(model)
    with preserved_state(model):
        model.train()
        signals = probe(model, example, measures=("variance_before", "variance_branch", "variance_after"))
    rows = {name: row for name, row in (signals.connections or signals.modules).items() if row}
    stages: dict[str, list[dict[str, float]]] = {}
    for stage, row in zip(stages_of(list(rows)), rows.values(), strict=True):
        stages.setdefault(stage, []).append({key: math.sqrt(value) for key, value in row.items()})
    return [
        StageSignal(
            name=name,
            connections=len(inside),
            std_in=inside[0].get("variance_before", inside[0]["variance_after"]),
            std_out=inside[-1]["variance_after"],
            ratio=median(map(branch_share, inside)),
        )
        for name, inside in stages.items()
    ]


def branch_share(row: dict[str, float]) -> float:
    """std(F(x)) / std(x) of a connection; nan without a skip."""
    branch, skip = row.get("variance_branch", math.nan), row.get("variance_before", math.nan)
    return branch / skip if skip else math.inf


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
    return paths if len(set(paths)) <= MOST_STAGES else ["network"] * len(paths)
