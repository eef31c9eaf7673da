"""A diagnosis as a picture: signal forward, gradient backward and distinctness by depth, with the findings marked."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from skipway.diagnosis.findings import Level
from skipway.diagnosis.rows import SignalRow
from skipway.diagnosis.table import LEAST_SPAN, elided
from skipway.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from skipway.diagnosis.diagnosis import Diagnosis

__all__ = ["Band", "bands_of", "plot"]

# Okabe & Ito's colours, which people with any kind of colour vision tell apart
STREAM, DISTINCT, INK, EDGE = "#0072B2", "#009E73", "#333333", "#888888"
# colour and marker of the first, second and third kind of branch
BRANCHES = (("#D55E00", "s"), ("#CC79A7", "D"), ("#56B4E9", "P"))
BAND: dict[Level, str] = {"fatal": "#CC3311", "serious": "#E69F00", "note": "#888888"}
VERDICT = {"trains": "#00664B", "trains if": "#8A5A00", "will not train": "#B2182B"}
SIZE = (8.6, 5.8)
RESOLUTION = 160
FONT = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": EDGE}
# up to so many places each is a dot on its line
DOTS = 60
MOST_NAMES = 9
LONGEST_NAME = 24
MOST_LANES = 4
# characters of a band's label that fit along the axis, and what a letter takes of it
LETTERS = 100
FOOT_LETTERS = 125
TITLE_LETTERS = 84


class Band(NamedTuple):
    """A stretch of rows, from `first` to `last`, to which finding `number` (from 1) points."""

    first: int
    last: int
    number: int
    level: Level
    label: str


def plot(diagnosis: Diagnosis, path: str | Path | None = None) -> Figure:
    """Draw the signal forward and backward by depth, on logarithmic scales, with the findings' places marked.

    Args:
        diagnosis: what `diagnose` gave.
        path: where to save it, by its ending (.png, .svg, .pdf); None: only return the figure.

    Returns:
        the matplotlib figure; it belongs to no window and needs no display.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "the picture of a diagnosis") from error
    with rc_context(FONT):
        figure = Figure(figsize=SIZE, dpi=RESOLUTION, facecolor="white", layout="constrained")
        draw(figure, diagnosis)
        if path is not None:
            figure.savefig(path)
    return figure


def draw(figure: Figure, diagnosis: Diagnosis) -> None:
    """Three panels along one depth axis."""
    rows = diagnosis.rows
    connected = bool(diagnosis.measurement.connections)
    panels: Any = figure.subplots(3, 1, sharex=True, height_ratios=(5, 5, 2))
    forward, backward, distinct = panels
    draw_curves(forward, forward_curves(rows, connected))
    draw_curves(backward, backward_curves(rows, connected))
    draw_curves(distinct, [Curve("", DISTINCT, [(n, row.distinct) for n, row in enumerate(rows, 1)])], ceiling=1.5)
    for panel, title in zip(panels, ("forward", "backward", "distinct"), strict=True):
        panel.set_ylabel(title)
        panel.grid(axis="y", color="#E5E5E5", linewidth=0.6)
        panel.set_axisbelow(True)
    mark_bands(panels, bands_of(diagnosis, rows), len(rows))
    name_ticks(distinct, rows, "residual connection" if connected else "layer")
    headline(figure, diagnosis)


class Curve(NamedTuple):
    """A line of a panel: its label, its colour, its points (place from 1, value); dashed with a marker for branches."""

    label: str
    colour: str
    points: Sequence[tuple[int, float]]
    marker: str = ""


def forward_curves(rows: Sequence[SignalRow], connected: bool) -> list[Curve]:
    """Sizes of the stream and the branches, or of the layers' outputs."""
    points = [(place, row.forward) for place, row in enumerate(rows, 1)]
    if not connected:
        return [Curve("layer's output, deviation", STREAM, points)]
    branches = [(place, row.form, row.branch) for place, row in enumerate(rows, 1)]
    return [Curve("stream, rms", STREAM, points), *branch_curves("{} branch, rms", branches)]


def backward_curves(rows: Sequence[SignalRow], connected: bool) -> list[Curve]:
    """Sizes of the gradient at the stream and through the branches, or at the layers' outputs."""
    points = [(place, row.backward) for place, row in enumerate(rows, 1)]
    if not connected:
        return [Curve("gradient at the layer's output", STREAM, points)]
    branches = [(place, row.form, row.through) for place, row in enumerate(rows, 1)]
    return [Curve("gradient at the stream", STREAM, points), *branch_curves("gradient through {}", branches)]


def branch_curves(label: str, branches: Sequence[tuple[int, str, float]]) -> Iterator[Curve]:
    """A curve for each kind of branch, attention and mlp apart."""
    kinds = list(dict.fromkeys(form.split()[0] for _, form, _ in branches))
    for kind, (colour, marker) in zip(kinds, BRANCHES, strict=False):
        points = [(place, value) for place, form, value in branches if form.split()[0] == kind]
        yield Curve(label.format(kind), colour, points, marker)


def draw_curves(axes: Axes, curves: Sequence[Curve], ceiling: float = math.inf) -> None:
    """Lines on a logarithmic axis; gaps where nothing was measured, arrows at the edge for 0 and infinity."""
    axes.set_yscale("log")
    edges: dict[str, str] = {}
    drawn: list[float] = []
    for curve in curves:
        places = [place for place, _ in curve.points]
        values = [value if 0 < value < math.inf else math.nan for _, value in curve.points]
        drawn += [value for value in values if value == value]
        if any(value == value for value in values):
            line: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 1.2} if curve.marker else {"linewidth": 1.6}
            dots = (curve.marker or "o") if len(values) <= DOTS else ""
            axes.plot(places, values, color=curve.colour, label=curve.label, marker=dots, markersize=3, **line)
        inset = 0.07 if curve.marker else 0.03
        for text, shape, height, wanted in (("∞", "^", 1 - inset, math.inf), ("0", "v", inset, 0.0)):
            found = [place for place, value in curve.points if value == wanted]
            if found:
                where = axes.get_xaxis_transform()
                axes.plot(found, [height] * len(found), shape, color=curve.colour, markersize=4, transform=where)
                edges[text] = shape
    for text, shape in edges.items():
        axes.plot([], [], shape, color=EDGE, markersize=4, label=text)
    axes.set_ylim(*limits(drawn, ceiling))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), frameon=False, fontsize=8, handlelength=2.2)


def limits(values: Sequence[float], ceiling: float = math.inf) -> tuple[float, float]:
    """Two decades at least, so that a signal that hardly changes looks so, with some room at both ends.

    >>> [round(limit, 3) for limit in limits([1.0, 1.0])]
    [0.069, 14.454]
    """
    if not values:
        return 0.1, 10.0
    low, high = min(values), max(values)
    missing = math.sqrt(max(1.0, LEAST_SPAN / (high / low)))
    room = (high / low * missing**2) ** 0.08
    return low / missing / room, max(min(high * missing * room, ceiling), high * 1.1)


def bands_of(diagnosis: Diagnosis, rows: Sequence[SignalRow]) -> list[Band]:
    """Where the findings point, as stretches of rows; findings about the whole have none."""
    bands = []
    for number, finding in enumerate(diagnosis.findings, 1):
        places = [place for place, row in enumerate(rows, 1) if number in row.marks]
        start = 0
        for index, place in enumerate(places):
            if index + 1 == len(places) or places[index + 1] != place + 1:
                label = f"{number} {finding.rule}" if start == 0 else str(number)
                bands.append(Band(places[start], place, number, finding.level, label))
                start = index + 1
    return bands


def mark_bands(panels: Sequence[Axes], bands: Sequence[Band], count: int) -> None:
    """Shade each band in all panels, and label it above the first."""
    panels[0].set_xlim(0.5 - 0.01 * count, count + 0.5 + 0.01 * count)
    ends: list[float] = []
    for band in sorted(bands, key=lambda band: band.first):
        for panel in panels:
            panel.axvspan(band.first - 0.5, band.last + 0.5, color=BAND[band.level], alpha=0.13, linewidth=0)
            for side in (band.first - 0.5, band.last + 0.5):
                panel.axvline(side, color=BAND[band.level], linewidth=0.5, alpha=0.6)
        middle, half = (band.first + band.last) / 2, len(band.label) * count / LETTERS / 2
        middle = min(max(middle, 0.5 + half), count + 0.5 - half)
        lane = next((lane for lane, end in enumerate(ends) if end < middle - half), len(ends))
        if lane == MOST_LANES:
            continue
        ends[lane : lane + 1] = [middle + half]
        panels[0].annotate(
            band.label,
            (middle, 1),
            xycoords=panels[0].get_xaxis_transform(),
            xytext=(0, 3 + 11 * lane),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
            color=INK
            if band.level == "note"
            else VERDICT["trains if" if band.level == "serious" else "will not train"],
        )


def name_ticks(axes: Axes, rows: Sequence[SignalRow], thing: str) -> None:
    """As many of the names along the depth axis as have room, first and last among them."""
    longest = max((len(row.name) for row in rows), default=1)
    most = max(2, min(MOST_NAMES, len(rows), LETTERS // (min(longest, LONGEST_NAME) + 1)))
    places = sorted({round(tick * (len(rows) - 1) / (most - 1)) for tick in range(most)}) if rows else []
    names = [rows[place].name or "the model" for place in places]
    axes.set_xticks([place + 1 for place in places])
    axes.set_xticklabels([elided(name, LONGEST_NAME) for name in names], fontsize=8)
    axes.set_xlabel(f"{thing}, from the input to the output")


def headline(figure: Figure, diagnosis: Diagnosis) -> None:
    """The verdict as title; below it what was asked, and the findings that point to no place."""
    conditions = "; ".join(diagnosis.conditions)
    verdict = f"{diagnosis.verdict}: {conditions}" if conditions else diagnosis.verdict
    verdict = verdict[0].upper() + verdict[1:]
    figure.suptitle(
        shortened(verdict, TITLE_LETTERS),
        fontsize=11,
        fontweight="bold",
        color=VERDICT[diagnosis.verdict],
        x=0.01,
        ha="left",
    )
    marked = {mark for row in diagnosis.rows for mark in row.marks}
    whole = [f"{n} {finding.rule}" for n, finding in enumerate(diagnosis.findings, 1) if n not in marked]
    lines = [" · ".join(diagnosis.heading), *([f"of the whole: {', '.join(whole)}"] if whole else [])]
    text = "\n".join(shortened(line, FOOT_LETTERS) for line in lines)
    figure.supxlabel(text, x=0.01, ha="left", fontsize=8, color=INK)


def shortened(text: str, width: int, most: int = 2) -> str:
    """Text in lines of a width, the first few of them."""
    return "\n".join(textwrap.wrap(text, width, max_lines=most, placeholder=" …"))
