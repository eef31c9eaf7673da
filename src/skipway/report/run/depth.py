"""Signal and gradient along the depth of a network during training, and the gains that its connections have learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from skipway.nn import Gain, Residual
from skipway.report.chart import Figure, Point, Series
from skipway.report.run.curves import number_of

__all__ = ["GainRow", "gain_figures", "gain_rows", "signal_figures"]

QUANTITIES = (
    ("stream", "Stream after each connection, rms"),
    ("branch", "Branch of each connection, rms"),
    ("gradient", "Gradient after each connection, rms"),
)


def signal_figures(samples: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Return figures of root mean squares by depth in the first, the middle and the last sample; none without samples.

    Args:
        samples: the lines of `health.jsonl`.
    """
    samples = [sample for sample in samples if isinstance(sample.get("connections"), dict) and sample["connections"]]
    if not samples:
        return []
    shown = [samples[place] for place in sorted({0, (len(samples) - 1) // 2, len(samples) - 1})]
    figures = []
    for key, title in QUANTITIES:
        series, names = [], ()
        for sample in shown:
            rows = {str(name): row for name, row in sample["connections"].items() if isinstance(row, dict)}
            points = tuple(
                Point(float(place), number_of(row, key), name=name) for place, (name, row) in enumerate(rows.items(), 1)
            )
            series.append(Series(f"step {sample.get('step')}", points))
            names = names or tuple(rows)
        hollow = any(point.y == 0 or math.isinf(point.y) for each in series for point in each.points)
        note = "Hollow markers lie outside the axis: 0 below, infinity above." if hollow else ""
        figure = Figure(
            title=title, x_label="depth", series=tuple(series), log_y=True, span=(0.5, len(names) + 0.5),
            categories=names, note=note,
        )  # fmt: skip
        figures += [figure] if figure.drawn else []
    return figures


@dataclass(frozen=True)
class GainRow:
    """The gains of one connection: root mean square, smallest and largest magnitude, and the initial one."""

    name: str
    mean: float
    low: float
    high: float
    start: float


def gain_rows(model: nn.Module) -> list[GainRow]:
    """Return the learned gains after the branches in the order of the chain; none if the network has none.

    >>> import skipway as sw
    >>> [row.start for row in gain_rows(sw.build("resnet", depth=8, scheme="layerscale(init=0.1)"))]
    [0.1, 0.1, 0.1]
    """
    rows = []
    for name, residual in model.named_modules():
        if not isinstance(residual, Residual):
            continue
        gains = [module for module in residual.scale.modules() if isinstance(module, Gain)]
        if gains:
            sizes = torch.cat([(gain.factor * gain.gain.detach()).float().abs().flatten() for gain in gains])
            mean = float(sizes.square().mean().sqrt())
            start = abs(gains[0].factor * gains[0].init)
            rows.append(GainRow(name, mean, float(sizes.min()), float(sizes.max()), start))
    return rows


def gain_figures(model: nn.Module) -> list[Figure]:
    """Return the figure of the gains by depth before and after training; none without gains."""
    rows = gain_rows(model)
    if not rows:
        return []
    last = [Point(place, row.mean, row.low, row.high, name=row.name) for place, row in enumerate(rows, 1)]
    start = [Point(place, row.start, name=row.name) for place, row in enumerate(rows, 1)]
    return [
        Figure(
            title="Learned gain of each branch, rms",
            x_label="depth",
            series=(Series("after training", tuple(last)), Series("at initialisation", tuple(start), "theory")),
            log_y=None if all(row.mean > 0 for row in rows) else False,
            span=(0.5, len(rows) + 0.5),
            categories=tuple(row.name for row in rows),
            note="Bars: smallest and largest magnitude." if any(row.low != row.high for row in rows) else "",
        )
    ]
