"""A full reading of the last batch of a training, on demand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from skipway.probes import Signals

__all__ = ["DeepReading", "largest_gradients"]

SHOWN = 10


@dataclass(frozen=True)
class DeepReading:
    """What `Watch.deep` has read.

    Args:
        step: the last one.
        rows: of each connection, as in a sample.
        culprit: the first value that is not finite, in words; empty where all are.
        gradients: the parameters with the largest gradients: name, norm, share of the squared norm of all.
        scores: of loss and gradient norm, in standard deviations above the mean of the last 128 steps.
    """

    step: int
    rows: Mapping[str, Mapping[str, float]]
    culprit: str
    gradients: tuple[tuple[str, float, float], ...]
    scores: Mapping[str, float]

    def __str__(self) -> str:
        lines = [f"step {self.step}", *(f"{name}: {score:.1f} σ" for name, score in self.scores.items())]
        lines += [f"first value that is not finite: {self.culprit}"] if self.culprit else []
        lines += [str(Signals({name: dict(row) for name, row in self.rows.items()})), "largest gradients"]
        lines += [f"  {share:6.1%}  {norm:9.3g}  {name}" for name, norm, share in self.gradients]
        return "\n".join(lines)

    def to_record(self) -> dict[str, Any]:
        """What is written of it."""
        return {
            "step": self.step, "rows": self.rows, "culprit": self.culprit, "gradients": self.gradients,
            "scores": self.scores,
        }  # fmt: skip


def largest_gradients(names: Sequence[str], norms: Tensor | None) -> tuple[tuple[str, float, float], ...]:
    """The parameters with the largest gradients; those that are not finite come first."""
    if norms is None:
        return ()
    values = norms.tolist()
    whole = math.fsum(each**2 for each in values if math.isfinite(each)) or 1.0
    order = sorted(range(len(values)), key=lambda place: -(values[place] if math.isfinite(values[place]) else math.inf))
    return tuple((names[place], values[place], values[place] ** 2 / whole) for place in order[:SHOWN])
