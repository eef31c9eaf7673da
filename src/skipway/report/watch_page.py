"""The page of a monitor: losses, gradient norms, spikes, warnings, and every signal by connection and step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from skipway.diagnosis.findings import format_share
from skipway.errors import counted
from skipway.monitoring import WatchHistory
from skipway.monitoring.history import Record
from skipway.monitoring.sample import SIGNALS_OF_A_SAMPLE
from skipway.probes import Signals
from skipway.report.chart import Band, Figure, HeatCell, Heatmap, Point, Series, format_value
from skipway.report.mixing_matrix import without_common_part
from skipway.report.page import PageTable, TableCell, number_cell, render, text_cell

__all__ = ["watch_page"]

MOST_ROWS, MOST_COLUMNS = 24, 24
"""Rows and columns of a heat map: connections next to each other share a row, samples in between are left out."""
FIRST_COLUMNS = ("ratio", "forward_gain", "backward_gain", "gradient", "update")


def watch_page(history: WatchHistory, command: str = "", name: str = "") -> str:
    """Render the page of a training that is or was monitored, as text.

    Args:
        history: of `Watch.history`, or `skipway.monitoring.read_history(FILE)`.
        command: command line that produced it, shown in the footer.
        name: of the training, shown in the title before the class of the model.
    """
    kind = str(history.start.get("model", "a model"))
    finished = bool(history.end)
    return render(
        "watch.html.j2",
        title=f"{name} ({kind})" if name else kind,
        command=command,
        finished=finished,
        headline=headline(history),
        numbers=list(key_numbers(history)),
        curves=list(curves(history)),
        maps=[heat_map(history.samples, key, title) for key, title in SIGNALS_OF_A_SAMPLE.items() if has(history, key)],
        warnings=history.warnings,
        deep=[(record["step"], deep_text(record)) for record in history.deep],
        thing=str(history.connections.get("thing", "connections")).capitalize(),
        rows=last_rows(history) if history.samples else None,
        remarks=history.remarks,
    )


def headline(history: WatchHistory) -> str:
    """What the page says first."""
    warned, spikes = (
        counted(len(each), word) for each, word in ((history.warnings, "warning"), (history.spikes, "spike"))
    )
    return f"{counted(history.steps, 'step')}, {warned}, {spikes}"


def key_numbers(history: WatchHistory) -> Iterator[tuple[str, str]]:
    """Names and values above the charts."""
    known = [value for value in history.losses if not math.isnan(value)]
    if known:
        yield "first loss", format_value(known[0])
        yield "last loss", format_value(known[-1])
    if history.samples:
        yield "samples", str(len(history.samples))
        yield "time of a sample", f"{history.samples[-1].get('seconds', math.nan):.2g} s"
    setup = history.connections.get("setup_seconds")
    if setup is not None:
        yield "to find the connections, once", f"{setup:.2g} s"
    share = history.end.get("share")
    if isinstance(share, float) and math.isfinite(share):
        yield "share of the time that the monitor took", format_share(share)


def curves(history: WatchHistory) -> Iterator[Figure]:
    """Loss and gradient norm over the steps, with spikes and warnings."""
    bands = tuple(
        Band(each["step"], each["step"], "serious", f"{each['rule']}: step {each['step']}: {each['text']}")
        for each in history.warnings
    )
    for what, title, values in (
        ("loss", "Loss", history.losses),
        ("gradient norm", "Norm of all gradients", history.norms),
    ):
        points = tuple(Point(float(history.first_step + place), value) for place, value in enumerate(values))
        series = [Series(what, tuple(point for point in points if not math.isnan(point.y)))]
        spikes = [each for each in history.spikes if each["what"] == what and math.isfinite(float(each["value"]))]
        if spikes:
            gaps = ((Point(each["step"], float(each["value"])), Point(each["step"], math.nan)) for each in spikes)
            series.append(Series("spike, 6 σ over 128 steps", tuple(point for pair in gaps for point in pair)))
        figure = Figure(
            title=title, x_label="step", series=tuple(series), log_y=None, bands=bands,
            note="Shaded: early warnings." if bands else "",
        )  # fmt: skip
        if figure.drawn:
            yield figure


def has(history: WatchHistory, key: str) -> bool:
    """Whether a signal was measured at all."""
    return any(key in row for sample in history.samples for row in sample["rows"].values())


def heat_map(samples: Sequence[Record], key: str, title: str) -> Heatmap:
    """A signal by connection and step, on a logarithmic scale of shades."""
    names = list(dict.fromkeys(name for sample in samples for name, row in sample["rows"].items() if key in row))
    size = math.ceil(len(names) / MOST_ROWS)
    groups = [names[start : start + size] for start in range(0, len(names), size)]
    shown = dict(zip(names, without_common_part(names), strict=True))
    count = min(len(samples), MOST_COLUMNS)
    chosen = [samples[round(place * (len(samples) - 1) / max(1, count - 1))] for place in range(count)]
    table = [[largest(sample, group, key) for sample in chosen] for group in groups]
    shade = shades([value for row in table for value in row])
    cells = tuple(
        tuple(
            cell(value, shade, f"{label(group)}, step {sample['step']}")
            for value, sample in zip(row, chosen, strict=True)
        )
        for row, group in zip(table, groups, strict=True)
    )
    notes = [f"A row is the largest value of {size} connections." if size > 1 else ""]
    notes += [f"{len(chosen)} of {len(samples)} samples." if len(chosen) < len(samples) else ""]
    return Heatmap(
        name=key, title=title, rows=tuple(label([shown[name] for name in group]) for group in groups),
        columns=tuple(str(sample["step"]) for sample in chosen),
        row_title="depth", column_title="step", cells=cells, note=" ".join(filter(None, notes)),
    )  # fmt: skip


def label(group: Sequence[str]) -> str:
    """The name of a row."""
    return group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}"


def largest(sample: Record, group: Sequence[str], key: str) -> float:
    """The largest value of a signal in some connections; one that is not finite before all others."""
    values = [sample["rows"].get(name, {}).get(key, None) for name in group]
    known = [value for value in values if value is not None]
    bad = [value for value in known if not math.isfinite(value)]
    return bad[0] if bad else max(known, default=-1.0)


def shades(values: Sequence[float]) -> Callable[[float], float]:
    """(value) → its shade, from the smallest to the largest of all on a logarithmic scale."""
    positive = [math.log(value) for value in values if value > 0 and math.isfinite(value)]
    low, high = (min(positive), max(positive)) if positive else (0.0, 1.0)
    return lambda value: 0.05 + 0.95 * (math.log(value) - low) / (high - low) if high > low else 0.5


def cell(value: float, shade: Callable[[float], float], words: str) -> HeatCell:
    """A cell: paper where nothing was measured or the value is 0, the colour of faults where it is not finite."""
    if not math.isfinite(value):
        return HeatCell(1.0, f"{words}: not finite", "miss")
    if value < 0:
        return HeatCell(0.0, f"{words}: not measured")
    return HeatCell(shade(value) if value > 0 else 0.0, f"{words}: {format_value(value)}")


def last_rows(history: WatchHistory) -> PageTable:
    """The newest sample as a table."""
    rows = history.samples[-1]["rows"]
    known = [key for key in SIGNALS_OF_A_SAMPLE if any(key in row for row in rows.values())]
    columns = [key for key in FIRST_COLUMNS if key in known] + [key for key in known if key not in FIRST_COLUMNS]

    def cells(place: int, name: str) -> Iterator[TableCell]:
        yield text_cell(name, f"{place:06d}")
        for key in columns:
            value = rows[name].get(key, math.nan)
            yield number_cell(value, "" if math.isnan(value) else format_value(value))

    titles = [key.replace("_", " ") for key in columns]
    return PageTable(["connection", *titles], [list(cells(place, name)) for place, name in enumerate(rows)])


def deep_text(record: Record) -> str:
    """A deep reading as text."""
    rows = {name: {key: float(value) for key, value in row.items()} for name, row in record["rows"].items()}
    lines = [f"first value that is not finite: {record['culprit']}"] if record["culprit"] else []
    lines += [str(Signals(rows)), "", "share   norm       largest gradients"]
    lines += [f"{float(share):6.1%}  {float(norm):9.3g}  {name}" for name, norm, share in record["gradients"]]
    return "\n".join(lines)
