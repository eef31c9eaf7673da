"""The bars of a benchmark: best peer, the same under our switches, ours, and the ceiling over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.race.summary import RaceResult, with_device
from skipway.errors import MissingExtraError, SkipwayError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_chart"]

BARS = (
    ("peer", "best peer", "#a0a6ab"),
    ("switched", "best peer under our switches", "#56b4e9"),
    ("engine", "best peer in another engine", "#009e73"),
    ("ours", "Skipway", "#c65300"),
)
INK, SOFT, RULE = "#1d1f21", "#5c6166", "#dfe3e6"
WIDTH = 0.27
TITLES = {"infer": "Inference", "train": "Training"}


def draw_chart(results: Sequence[RaceResult], path: str | Path) -> Path:
    """Bars of images a second, a panel for each of inference and training in each precision.

    Args:
        results: of networks; those of chains of a given number of branches are left out.
        path: where to, by its ending: .png, .svg, .pdf.

    Raises:
        MissingExtraError: matplotlib is not installed (`pip install 'skipway[plot]'`).
        SkipwayError: there is nothing to draw.

    >>> draw_chart([], "speed.png")
    Traceback (most recent call last):
    skipway.errors.SkipwayError: no race of a network to draw; run python -m benchmarks.speed first
    """
    panels: dict[str, list[RaceResult]] = {}
    for each in results:
        workload = each.race.workload
        if "@" not in workload.network:
            panels.setdefault(
                with_device(f"{TITLES[workload.what]}, {workload.precision}", workload.device), []
            ).append(each)
    if not panels:
        raise SkipwayError("no race of a network to draw; run python -m benchmarks.speed first")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "the chart of a benchmark") from error
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    with rc_context({"font.size": 9, "text.color": INK, "axes.labelcolor": SOFT, "xtick.color": INK}):
        figure = Figure(figsize=(6.2 * across, 3.6 * down + 0.5), layout="constrained", facecolor="white")
        axes = figure.subplots(down, across, squeeze=False).flat
        for axis, (title, chosen) in zip(axes, panels.items(), strict=False):
            draw_panel(axis, title, chosen)
        for axis in list(axes)[len(panels) :]:
            axis.set_axis_off()
        first = figure.axes[0]
        handles, labels = first.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2 * across, frameon=False)
        path = Path(path)
        figure.savefig(path, dpi=150)
    return path


def draw_panel(axis: Axes, title: str, results: Sequence[RaceResult]) -> None:
    """A group of bars for each workload."""
    places = range(len(results))
    present = [bar for bar in BARS if any(math.isfinite(each.rate(bar[0])) for each in results)]
    width = 3 * WIDTH / max(3, len(present))
    for number, (side, name, colour) in enumerate(present):
        rates = [each.rate(side) for each in results]
        at = [place + (number - (len(present) - 1) / 2) * width for place in places]
        heights = [rate if math.isfinite(rate) else 0.0 for rate in rates]
        bars = axis.bar(at, heights, width * 0.92, label=name, color=colour)
        axis.bar_label(bars, labels=bar_labels(results, side, rates), fontsize=7.5, padding=1, color=INK)
    ceilings = [each.ceiling or math.nan for each in results]
    axis.hlines(
        ceilings,
        [place - 1.6 * WIDTH for place in places],
        [place + 1.6 * WIDTH for place in places],
        colors=INK,
        linestyles=(0, (3, 2)),
        linewidth=1,
        label="ceiling: products alone",
    )
    axis.set_xticks(list(places), [workload_label(each, results) for each in results])
    axis.set_title(title, loc="left", fontweight="bold", fontsize=10)
    axis.set_ylabel("images a second")
    axis.margins(y=0.12)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", color=RULE)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", colors=SOFT, length=0)


def bar_labels(results: Sequence[RaceResult], side: str, rates: Sequence[float]) -> list[str]:
    """The rate, and over ours how many times the best peer's it is."""
    texts = []
    for each, rate in zip(results, rates, strict=True):
        gain: Any = each.gain(each.best.get("ours", ""), "peer") if side == "ours" else None
        number = f"{rate:.3g}" if rate < 1000 else f"{rate:,.0f}"
        texts.append("" if not math.isfinite(rate) else number if gain is None else f"{number}\n{gain.median:.2f}x")
    return texts


def workload_label(each: RaceResult, results: Sequence[RaceResult]) -> str:
    """A workload by its network, and by what else tells it apart."""
    workload = each.race.workload
    alone = sum(other.race.workload.network == workload.network for other in results) == 1
    return workload.network if alone else f"{workload.network}\n{workload.batch}x{workload.size}"
