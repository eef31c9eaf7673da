"""What becomes of the signal and of the gradient along the depth, and what the connections' gains have learned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from skipway.nn import Gain
from skipway.report.charts import Series, chart
from skipway.report.run.curves import value
from skipway.tracing.chain import chain

__all__ = ["GainRow", "gains_of", "gains_section", "signal_section"]

Sample = dict[str, Any]


def signal_section(samples: Sequence[Sample]) -> Iterator[str]:
    """Root mean squares by depth, at the first sample, in the middle, and at the last.

    Args:
        samples: the lines of `health.jsonl`.
    """
    samples = [sample for sample in samples if isinstance(sample.get("connections"), dict) and sample["connections"]]
    if not samples:
        yield '<p class="soft">The connections were not watched in this run: too few steps, or health = 0.</p>'
        return
    places = sorted({0, (len(samples) - 1) // 2, len(samples) - 1})
    kinds = ("faint", "c", "b")[-len(places) :]
    for key, title in (
        ("stream", "Signal behind each connection, rms"),
        ("branch", "Branch of each connection, rms"),
        ("gradient", "Gradient behind each connection, rms"),
    ):
        series = []
        for kind, place in zip(kinds, places, strict=True):
            rows = {str(name): row for name, row in samples[place]["connections"].items() if isinstance(row, dict)}
            points = [(float(count), value(row, key)) for count, row in enumerate(rows.values(), 1)]
            step = samples[place].get("step")
            series.append(Series(kind, f"step {step}", points, names=list(rows), dots=len(points) < 60))
        names = series[0].names or ("",)
        ends = (names[0], names[-1])
        hollow = any(y == 0 or math.isinf(y) for each in series for _, y in each.points)
        note = "Hollow points lie outside: 0 below, infinite above." if hollow else ""
        yield chart(title, series, across="depth", log=True, ends=ends, note=note)


@dataclass(frozen=True)
class GainRow:
    """The gains of one connection: root mean square, smallest and largest magnitude, and the one it started at."""

    name: str
    mean: float
    low: float
    high: float
    start: float


def gains_of(model: nn.Module) -> list[GainRow]:
    """The learned gains behind the branches, in the order of the chain; empty where the network has none.

    >>> import skipway as sw
    >>> [row.start for row in gains_of(sw.build("resnet", depth=8, scheme="layerscale(init=0.1)"))]
    [0.1, 0.1, 0.1]
    """
    rows = []
    for connection in chain(model):
        gains = [module for module in connection.residual.scale.modules() if isinstance(module, Gain)]
        if gains:
            sizes = torch.cat([(gain.factor * gain.gain.detach()).float().abs().flatten() for gain in gains])
            mean = float(sizes.square().mean().sqrt())
            start = abs(gains[0].factor * gains[0].init)
            rows.append(GainRow(connection.name, mean, float(sizes.min()), float(sizes.max()), start))
    return rows


def gains_section(model: nn.Module) -> str:
    """The gains by depth, before and after training; empty without any."""
    rows = gains_of(model)
    if not rows:
        return ""
    names = [row.name for row in rows]

    def line(kind: str, title: str, values: Sequence[float], dots: bool = False) -> Series:
        return Series(kind, title, list(enumerate(values, 1)), names=names, dots=dots)

    series = [line("faint", "at the start", [row.start for row in rows])]
    if any(row.low != row.high for row in rows):
        series += [
            line("c", "smallest and largest", [row.low for row in rows]),
            line("c", "smallest and largest", [row.high for row in rows]),
        ]
    series.append(line("b", "at the end, rms", [row.mean for row in rows], dots=len(rows) < 60))
    log = all(row.mean > 0 for row in rows) and None
    return chart("Learned gain of each branch", series, across="depth", log=log, ends=(names[0], names[-1]))
