"""The page of a depth transfer: answer, rates to use, losses by rate, coordinate check, how to set the rates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from skipway.depth_transfer.coordinates import COORDINATES
from skipway.depth_transfer.result import ANSWER_WORDS, Answer, DepthTransfer, SchemeRates
from skipway.depth_transfer.search import BestRate, TriedRate
from skipway.depth_transfer.table import RATE_COLUMNS, rate_cells
from skipway.report.chart import Figure, Point, Series
from skipway.report.page import PageTable, TableCell, number_cell, render, text_cell

__all__ = ["transfer_figures", "transfer_page"]

COLORS: dict[Answer, str] = {"carries": "good", "does not carry": "bad", "undecided": "open"}


def transfer_page(found: DepthTransfer, command: str = "", name: str = "") -> str:
    """The page as HTML in one file that loads nothing; `name` of the network is its title."""
    schemes = [
        {
            "title": "The network as it is made" if each.scheme == "own" else each.scheme,
            "color": COLORS[each.answer],
            "words": f"the best rate {ANSWER_WORDS[each.answer]}",
            "sentences": list(each.sentences(found.unit)),
            "table": rates_table(each),
            "notes": [f"Depth {rate.depth}: {rate.remark}." for rate in each.rates if rate.remark],
            "figure": losses_figure(each, found.unit),
            "code": each.code,
        }
        for each in found.schemes
    ]
    return render(
        "transfer.html.j2",
        title=name or found.name,
        command=command,
        found=found,
        color=COLORS[found.answer] if found.schemes else "open",
        schemes=schemes,
        overview=overview_figures(found),
        sizes=coordinate_figures(found),
        powers=powers_table(found),
        runs=runs_table(found),
        facts=list(found.settings.items()),
    )


def transfer_figures(found: DepthTransfer) -> list[Figure]:
    """All figures of the page."""
    by_rate = [losses_figure(each, found.unit) for each in found.schemes]
    return [*overview_figures(found), *by_rate, *coordinate_figures(found)]


def losses_figure(rates: SchemeRates, unit: str) -> Figure:
    """The loss over the lowest one by rate, a line for each depth; what learns nothing is above the axis."""
    series = [Series(f"depth {each.depth}", tuple(excess_points(each))) for each in rates.rates]
    title = f"{rates.scheme}: loss above the lowest, by rate"
    note = "Means and ranges over the seeds. A hollow marker at the top: nothing is learned at this rate."
    return Figure(
        name=f"losses-{rates.scheme.partition('(')[0]}",
        title=title,
        x_label="learning rate",
        y_label=unit,
        log_x=True,
        series=tuple(series),
        note=note,
    )


def excess_points(rate: BestRate) -> Iterator[Point]:
    """Losses above the lowest one at the rates where all steps were taken."""
    most = rate.first_loss - rate.loss
    for each in rate.tried:
        if each.seeds:
            low, y, high = (value - rate.loss for value in (each.low, each.mean, each.high))
            if y < most:
                yield Point(each.lr, y, low, min(high, most), each.seeds)
            else:
                yield Point(each.lr, math.inf, count=each.seeds)


def overview_figures(found: DepthTransfer) -> list[Figure]:
    """Best rates and losses by depth."""
    if not found.schemes:
        return []
    lines, losses = [], []
    for each in found.schemes:
        known = [rate for rate in each.rates if rate.known]
        points = [Point(rate.depth, rate.lr.value, rate.lr.low, rate.lr.high) for rate in known]
        lines.append(Series(each.scheme, tuple(points)))
        if each.fitted:
            lines.append(Series.of(each.scheme, each.fitted, "theory"))
        losses.append(Series.of(f"{each.scheme}, best rate", [(rate.depth, rate.loss) for rate in each.rates]))
        shallow = [(rate.depth, rate.loss + rate.lost.value) for rate in each.rates]
        losses.append(Series.of(f"{each.scheme}, rate of depth {each.rates[0].depth}", shallow))
    steps = found.settings["steps"].partition(",")[0]
    return [
        Figure(
            name="best-rates",
            title="Best rate by depth",
            x_label="depth",
            y_label="learning rate",
            log_x=True,
            log_y=True,
            series=tuple(lines),
            note="Bars: 95 % intervals. Dashed: the line through them, continued to four times the largest depth.",
        ),
        Figure(
            name="losses",
            title=f"Loss after {steps} steps by depth",
            x_label="depth",
            y_label=found.unit,
            log_x=True,
            series=tuple(losses),
            note="A hollow marker at the top: the training diverges.",
        ),
    ]


def coordinate_figures(found: DepthTransfer) -> list[Figure]:
    """Each size over the residual branches, a line for each scheme."""
    figures = []
    for name, words in COORDINATES.items():
        series = []
        for scheme in dict.fromkeys(row.scheme for row in found.sizes):
            own = [row for row in found.sizes if row.scheme == scheme and math.isfinite(row.sizes.get(name, math.nan))]
            counts = sorted({row.branches for row in own})
            values = [[row.sizes[name] for row in own if row.branches == count] for count in counts]
            points = (Point(n, fmean(v), min(v), max(v), len(v)) for n, v in zip(counts, values, strict=True))
            series.append(Series(scheme, tuple(points)))
        if any(each.points for each in series):
            figures.append(
                Figure(
                    name=name.replace(" ", "-"),
                    title=f"{words[0].upper()}{words[1:]}",
                    x_label="residual branches",
                    y_label="root mean square",
                    log_x=True,
                    log_y=True,
                    series=tuple(series),
                )
            )
    return figures


def rates_table(rates: SchemeRates) -> PageTable:
    """The rates to use."""
    rows = [
        [text_cell(cell, key) for cell, key in zip(cells, keyed(cells), strict=True)] for cells in rate_cells(rates)
    ]
    return PageTable(RATE_COLUMNS, rows)


def keyed(cells: tuple[str, ...]) -> Iterator[str]:
    """Sort keys of cells: numbers as numbers would sort."""
    for cell in cells:
        try:
            yield f"{float(cell):020.9f}"
        except ValueError:
            yield cell


def powers_table(found: DepthTransfer) -> PageTable:
    """How each size goes with depth, by scheme."""
    schemes = list(dict.fromkeys(each.scheme for each in found.coordinates))
    rows = []
    for name, words in COORDINATES.items():
        own = {each.scheme: str(each) for each in found.coordinates if each.name == name}
        if own:
            rows.append([text_cell(words), *(text_cell(own.get(scheme, "—")) for scheme in schemes)])
    return PageTable(["size", *schemes], rows)


def runs_table(found: DepthTransfer) -> PageTable:
    """The loss at every rate that was tried."""
    rows: list[list[TableCell]] = []
    for scheme in found.schemes:
        for rate in scheme.rates:
            rows += [run_cells(scheme.scheme, rate, each) for each in rate.tried]
    return PageTable(["scheme", "depth", "rate", "loss", "lowest", "highest", "seeds"], rows)


def run_cells(scheme: str, rate: BestRate, tried: TriedRate) -> list[TableCell]:
    """The cells of one rate."""
    losses = [
        number_cell(v, f"{v:.4g}" if math.isfinite(v) else "diverges") for v in (tried.mean, tried.low, tried.high)
    ]
    seeds = str(tried.seeds) if tried.seeds else "first quarter of one"
    depth = number_cell(rate.depth, str(rate.depth))
    return [text_cell(scheme), depth, number_cell(tried.lr, f"{tried.lr:.3g}"), *losses, text_cell(seeds)]
