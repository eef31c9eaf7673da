"""The page of a comparison: which design to train, their first steps, and what is wrong with each."""

from __future__ import annotations

import math

from skipway.diagnosis.comparison import ComparedModel, Comparison
from skipway.diagnosis.findings import format_number, format_share
from skipway.diagnosis.table import SYMBOLS, offer_text
from skipway.report.chart import Figure, Series
from skipway.report.page import PageTable, number_cell, render, text_cell

__all__ = ["comparison_figures", "comparison_page"]


def comparison_page(comparison: Comparison, command: str = "", name: str = "") -> str:
    """Render the page of a comparison as text.

    Args:
        comparison: result of `skipway.diagnose` for several models.
        command: command line that produced it, shown in the footer.
        name: of what was compared, for the title; empty for the names of the models.
    """
    title = name or " or ".join(row.name for row in comparison)
    return render(
        "comparison.html.j2",
        title=title,
        command=command,
        comparison=comparison,
        color="good" if comparison.best else "fair" if comparison.undecided else "bad",
        heading=list(dict.fromkeys(str(row.diagnosis.settings) for row in comparison if row.diagnosis is not None)),
        table=comparison_table(comparison),
        figures=comparison_figures(comparison),
        symbols=SYMBOLS,
        offer_text=offer_text,
    )


def comparison_table(comparison: Comparison) -> PageTable:
    """Build the table of designs."""
    against = comparison.differences
    columns = ["design", "verdict", "odds", "loss", "against the first", "steps", "steps/s", "parameters"]
    columns += ["stream", "gradient"]
    rows = []
    for row in comparison:
        looked_at = row.diagnosis
        signals = row.signals
        rows.append(
            [
                text_cell(row.name),
                text_cell(row.verdict if looked_at is None else looked_at.verdict),
                number_cell(math.nan, "–")
                if looked_at is None
                else number_cell(looked_at.odds, format_share(looked_at.odds)),
                number_cell(row.loss, "–" if math.isnan(row.loss) else format_number(row.loss)),
                text_cell(str(against[row.name]) if row.name in against else "–"),
                number_cell(row.steps, f"{row.steps:,}"),
                number_cell(1 / row.step_seconds, speed_text(row)),
                number_cell(row.parameters or 0, "–" if row.parameters is None else f"{row.parameters:,}"),
                text_cell(signals.get("stream", "–")),
                text_cell(signals.get("gradient", "–")),
            ]
        )
    return PageTable(columns, rows)


def speed_text(row: ComparedModel) -> str:
    """Trial steps per second."""
    return "–" if math.isnan(row.step_seconds) else format_number(1 / row.step_seconds)


def comparison_figures(comparison: Comparison) -> list[Figure]:
    """Return the losses of the trial steps of all designs over their time, beside the best constant answers."""
    looked_at = [row for row in comparison if row.curve and row.diagnosis is not None]
    if not looked_at:
        return []
    series = [
        Series.of(row.name, [((step + 1) * row.step_seconds, loss) for step, loss in enumerate(row.curve)])
        for row in looked_at
    ]
    end = max(row.steps * row.step_seconds for row in looked_at)
    known = {
        f"{ahead.constant:.4g}": ahead.constant
        for row in looked_at
        if row.diagnosis is not None
        and (ahead := row.diagnosis.measurement.ahead) is not None
        and ahead.constant is not None
    }
    for text, constant in known.items():
        name = "best constant answer" + (f" ({text})" if len(known) > 1 else "")
        series.append(Series.of(name, [(0.0, constant), (end, constant)], "theory"))
    return [
        Figure(
            name="trial",
            title="Loss of each trial step",
            x_label="seconds of trial steps",
            y_label="loss",
            series=tuple(series),
            span=(0.0, end),
            log_y=None,
            note="Every design had the same time and the same batches. A network that learns falls below the best "
            "constant answer, which ignores the input.",
        )
    ]
