"""Figures as pictures for papers and slides (.png, .pdf), drawn by matplotlib from the same data as in the pages."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipway.errors import MissingExtraError
from skipway.report.chart import Band, Figure, Series, format_tick
from skipway.report.svg_style import COLORS, clipped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

__all__ = ["save_picture"]

LEVELS = {"fatal": "#b2182b", "serious": "#c98500", "note": "#5c6166"}
MARKERS, DASHES = "osD^v", ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.5, 2)))
INK, EDGE, FAINT = "#333333", "#888888", "#b9bfc5"
WIDTH, PANEL, RESOLUTION = 6.4, 1.9, 200
FONT = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": EDGE}
MOST_MARKERS, MOST_NAMES, NAME_LETTERS, LETTERS, MOST_LANES = 60, 9, 24, 74, 4


def save_picture(
    path: str | Path, figures: Sequence[Figure], *, columns: int = 1, title: str = "", note: str = ""
) -> Picture:
    """Draw figures into one picture and write it, by the ending of `path`; returns the matplotlib figure.

    Args:
        path: of the file.
        figures: panels, row by row.
        columns: panels beside each other; panels in one column share their horizontal axis.
        title, note: above and below the panels.

    Raises:
        MissingExtraError: matplotlib is not installed (`pip install 'skipway[plot]'`).
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure as Picture
        from matplotlib.text import Text
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "a picture") from error
    rows = max(1, math.ceil(len(figures) / columns))
    with rc_context(FONT):
        height = (PANEL if columns == 1 else 3.6) * rows + 0.4
        picture = Picture(figsize=(WIDTH, height), dpi=RESOLUTION, facecolor="white", layout="constrained")
        panels = picture.subplots(rows, columns, sharex=columns == 1, squeeze=False).flat
        for place, (axes, figure) in enumerate(zip_longest(panels, figures)):
            if figure is None:
                axes.set_axis_off()
                continue
            draw_panel(axes, figure, outermost=columns > 1 or place == len(figures) - 1, labelled=place == 0)
        lines = textwrap.wrap(title, 62, max_lines=2, placeholder=" …")
        picture.suptitle("\n".join(lines), fontsize=11, fontweight="bold", x=0.01, ha="left")
        below = [line for part in note.splitlines() for line in textwrap.wrap(part, 92, max_lines=2, placeholder=" …")]
        picture.supxlabel("\n".join(below), x=0.01, ha="left", fontsize=8, color=INK)
        for text in picture.findobj(Text):
            if not (shown := text.get_text()).isascii():  # halves of surrogate pairs, as in names of files, are no text
                text.set_text(shown.encode("utf-8", "backslashreplace").decode())
        picture.savefig(path)
    return picture


def draw_panel(axes: Axes, figure: Figure, *, outermost: bool, labelled: bool) -> None:
    """One figure; names along the horizontal axis on the outermost panel, labels of bands on the first."""
    y_axis, names = figure.y_axis(0.0, 1.0), figure.names
    axes.set_xscale("log" if figure.log_x else "linear")
    axes.set_yscale("log" if y_axis.log else "linear")
    axes.set_ylim(y_axis.low, y_axis.high)
    if y_axis.log:  # the labels of the page; matplotlib's own are 6 × 10⁻¹ where the axis is short
        axes.set_yticks(y_axis.ticks, [format_tick(value) for value in y_axis.ticks])
        axes.yaxis.set_minor_formatter("")
    if figure.span:
        axes.set_xlim(*figure.span)
    for series in figure.series:
        draw_series(axes, series, names.index(series.name) if series.name in names else -1, figure)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(figure.title, fontsize=9, loc="left", pad=4 + 11 * draw_bands(axes, figure, labelled))
    if figure.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    for mark in figure.marks:
        axes.axvline(mark.x, color=EDGE, linewidth=0.8, linestyle="--")
    if outermost:
        axes.set_xlabel(figure.x_label)
    if figure.categories:
        name_ticks(axes, figure.categories)
    if len(names) > 1:
        beside: dict[str, Any] = (
            {"loc": "upper left", "bbox_to_anchor": (1.0, 1.03)} if labelled or figure.bands else {}
        )
        axes.legend(frameon=False, fontsize=8, handlelength=2.2, **beside)


def draw_series(axes: Axes, series: Series, index: int, figure: Figure) -> None:
    """A line with markers and error bars; arrows at the edge for 0 on a logarithmic axis and for infinity."""
    points = series.points
    log = axes.get_yscale() == "log"
    values = [point.y if math.isfinite(point.y) and not (log and point.y <= 0) else math.nan for point in points]
    look: dict[str, Any] = {"color": FAINT, "linewidth": 0.9}
    if series.style != "faint":
        dash = (0, (4, 3)) if series.style == "theory" else DASHES[index // len(COLORS) % len(DASHES)]
        look = {"color": COLORS[index % len(COLORS)][0], "linestyle": dash, "linewidth": 1.5}
    if series.style == "measured" and len(points) <= MOST_MARKERS:
        look |= {"marker": MARKERS[index % len(MARKERS)], "markersize": 3}
    x = [point.x for point in points]
    axes.plot(x, values, label=series.name, **look)
    if any(point.low < point.high for point in points):
        axes.vlines(x, [p.low for p in points], [p.high for p in points], color=look["color"], linewidth=0.8, alpha=0.6)
    for edge, shape, height in ((math.inf, "^", 0.96), (0.0, "v", 0.04)):
        outside = [point.x for point in points if point.y == edge] if log or edge else []
        if outside:
            where = axes.get_xaxis_transform()
            axes.plot(outside, [height] * len(outside), shape, color=look["color"], markersize=4, transform=where)


def draw_bands(axes: Axes, figure: Figure, labelled: bool) -> int:
    """Shade the bands, label them above the panel, and return the number of lanes that the labels take."""
    ends: list[float] = []
    count = max(1.0, (figure.span or (0.0, 1.0))[1] - 0.5)
    for band in sorted(figure.bands, key=lambda band: band.first):
        color = LEVELS[band.level]
        axes.axvspan(band.first - 0.5, band.last + 0.5, color=color, alpha=0.13, linewidth=0)
        for side in (band.first - 0.5, band.last + 0.5):
            axes.axvline(side, color=color, linewidth=0.5, alpha=0.6)
        if labelled:
            label_band(axes, band, ends, count)
    return len(ends)


def label_band(axes: Axes, band: Band, ends: list[float], count: float) -> None:
    """Label a band in the first lane with room for it; not at all where the lanes are used up."""
    middle, half = (band.first + band.last) / 2, len(band.label) * count / LETTERS / 2
    middle = min(max(middle, 0.5 + half), count + 0.5 - half)
    lane = next((lane for lane, end in enumerate(ends) if end < middle - half), len(ends))
    if lane == MOST_LANES:
        return
    ends[lane : lane + 1] = [middle + half]
    where: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
    look = {"ha": "center", "va": "bottom", "fontsize": 8, "color": LEVELS[band.level]}
    axes.annotate(band.label, (middle, 1), xytext=(0, 3 + 11 * lane), **where, **look)


def name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """As many names along the horizontal axis as have room, the first and the last among them."""
    longest = min(max(map(len, names)), NAME_LETTERS)
    most = max(2, min(MOST_NAMES, len(names), LETTERS // (longest + 1)))
    places = sorted({round(tick * (len(names) - 1) / (most - 1)) for tick in range(most)})
    axes.set_xticks([place + 1 for place in places])
    axes.set_xticklabels([clipped(names[place], NAME_LETTERS) for place in places], fontsize=8)
