"""The page of a study: verdicts, figures, published and measured numbers, means with their spread, all rows."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from skipway.checkpoint.files import write_atomically
from skipway.errors import counted
from skipway.report.chart import format_value
from skipway.report.page import PageTable, TableCell, number_cell, text_cell, write_page
from skipway.report.svg import svg_file
from skipway.studies.cell import BUDGETS, Choices, Row, Value
from skipway.studies.grid import GridRows, describe_others, judge, measured_rows, split_by_grid
from skipway.studies.runner import read_rows
from skipway.studies.statistics import SeedValues, group_values
from skipway.studies.study import Answer, Study, Verdict

__all__ = ["ShownVerdict", "measured_rows", "score_text", "shown_verdicts", "write_study_page"]

MOST_ROWS = 400
COLORS: dict[Answer, str] = {"holds": "good", "does not hold": "bad", "holds only when": "fair", "open": "open"}
CIRCUMSTANCES = frozenset(
    (
        *("study", "key", "fingerprint", "error", "seconds", "budget", "date", "device", "machine", "skipway", "torch"),
        *("python", "losses", "chance_error", "chance_loss"),
    )
)
"""Columns that record where, when and on what data a row was measured, and `losses`."""
ENTRY = re.compile(r"\n([A-Z]\w+): +")
"""The beginning of an entry in the docstring of a study."""


@dataclass(frozen=True)
class ShownVerdict:
    """A verdict with its colour on the page and, for "holds only when", its condition."""

    claim: str
    answer: Answer
    text: str
    color: str
    condition: str


def shown_verdicts(verdicts: Sequence[Verdict]) -> list[ShownVerdict]:
    """Prepare verdicts for a page."""
    return [
        ShownVerdict(
            each.claim,
            each.answer,
            each.text,
            COLORS[each.answer],
            each.text.partition(". ")[0] if each.answer == "holds only when" else "",
        )
        for each in verdicts
    ]


def score_text(verdicts: Sequence[Verdict]) -> str:
    """Count the answers.

    >>> score_text([Verdict("a", "holds", ""), Verdict("b", "holds", ""), Verdict("c", "open", "")])
    '2 of 3 claims hold, 1 is open.'
    """
    counts = Counter(each.answer for each in verdicts)
    words: dict[Answer, tuple[str, str]] = {
        "holds": ("holds", "hold"),
        "holds only when": ("holds only under a condition", "hold only under a condition"),
        "does not hold": ("does not", "do not"),
        "open": ("is open", "are open"),
    }
    if not verdicts:
        return "No claim has been measured."
    given = [(counts[answer], forms[counts[answer] != 1]) for answer, forms in words.items() if counts[answer]]
    (number, first), *others = given
    rest = "".join(f", {count} {each}" for count, each in others)
    return f"{number} of {counted(len(verdicts), 'claim')} {first}{rest}."


def method_of(study: Study) -> tuple[str, list[tuple[str, str]]]:
    """Return the first sentence of a study's docstring, and its entries: claim, source, rule, command and so on."""
    opening, _, entries = study.opening().partition("\n\n")
    parts = ENTRY.split(f"\n{entries}")
    return " ".join(opening.split()), [
        (label, " ".join(text.split())) for label, text in zip(parts[1::2], parts[2::2], strict=True)
    ]


def write_study_page(study: Study, folder: Path, parts: Sequence[GridRows] | None = None) -> Path | None:
    """Write `NAME.html` and one `NAME-FIGURE.svg` per figure into `folder`, from the tables of the study there.

    Where those hold several budgets or data sets, the page is of one of them (`split_by_grid`) and names the others.

    Args:
        study: whose page it is.
        folder: of the tables.
        parts: what `split_by_grid` makes of the rows there; None: they are read.

    Returns:
        path of the page; None if nothing has been measured yet.
    """
    parts = split_by_grid(study, read_rows(folder, study)) if parts is None else parts
    if not parts:
        return None
    rows, measured, gap = parts[0].rows, parts[0].measured, parts[0].gap
    figures = study.figures(measured)
    for figure in figures:
        content = svg_file(figure).encode("utf-8", "backslashreplace")
        write_atomically(
            folder / f"{study.name}-{figure.name}.svg", lambda aside, content=content: aside.write_bytes(content)
        )
    published, unmatched = published_table(study, measured)
    verdicts = judge(study, measured, gap)
    opening, method = method_of(study)
    values: dict[str, Any] = {
        "title": study.title,
        "study": study,
        "command": study_command(study, parts[0]),
        "score": score_text(verdicts),
        "gap": "" if gap is None else gap.text,
        "others": describe_others(parts),
        "verdicts": shown_verdicts(verdicts),
        "opening": opening,
        "method": method,
        "figures": figures,
        "repeated": any(point.count > 1 for figure in figures for line in figure.series for point in line.points),
        "summary": summary_table(study.summary(measured)),
        "published": published,
        "unmatched": unmatched,
        "means": means_table(study, measured),
        "failed": [row for row in rows if row.get("error")],
        "facts": list(facts(rows)),
        "rows": rows_table(rows),
        "row_count": len(rows),
    }
    return write_page(folder / f"{study.name}.html", "study.html.j2", **values)


def study_command(study: Study, part: GridRows) -> str:
    """Return the command that measures these rows, or resumes them where they are a part of a budget's grid.

    Where they are none, the fewest options are given whose cells are exactly these. Rows of several commands have no
    such options: then it is the command of the budget.
    """
    keys = {row["key"] for row in part.rows}
    budget = part.budget or next((each for each in BUDGETS if part.rows[-1].get("budget") == each), "cpu")
    values = {name: list(dict.fromkeys(row.get(name) for row in part.rows)) for name in ("depth", "scheme", "seed")}
    own = {
        "depths": tuple(sorted(each for each in values["depth"] if isinstance(each, int))) or None,
        "schemes": tuple(each for each in values["scheme"] if isinstance(each, str)) or None,
        "seeds": tuple(sorted(each for each in values["seed"] if isinstance(each, int))) or None,
    }
    plain = Choices(data=part.data)
    chosen = plain
    if not keys <= {cell.key for cell in study.cells(budget, plain)}:
        subsets = (names for count in range(1, 4) for names in combinations(own, count))
        tried = (Choices(data=part.data, **{name: own[name] for name in names}) for names in subsets)  # type: ignore[arg-type]
        chosen = next((each for each in tried if keys == {cell.key for cell in study.cells(budget, each)}), plain)
    return f"skipway study {study.name} --budget {budget}{chosen.options()}"


def summary_table(lines: Sequence[Row]) -> PageTable:
    """Build the summary table of a study."""
    columns = list(dict.fromkeys(name for line in lines for name in line))
    return PageTable(columns, [[value_cell(line.get(name)) for name in columns] for line in lines])


def published_table(study: Study, rows: Sequence[Row]) -> tuple[PageTable, bool]:
    """Build the table of published and measured numbers, and report whether one was not measured."""
    lines, unmatched = [], False
    for each in study.published:
        ours = each.measured_values(rows, study.criterion)
        unmatched |= ours is None
        mean, difference = (ours.mean, ours.mean - each.value) if ours else (math.nan, math.nan)
        lines.append(
            [
                text_cell(each.what),
                number_cell(each.value, format_value(each.value)),
                number_cell(mean, ours.text() if ours else "—"),
                number_cell(difference, f"{difference:+.3g}" if ours else "—"),
                text_cell(each.source),
            ]
        )
    return PageTable(["quantity", "published", "measured", "difference", "source"], lines), unmatched


def means_table(study: Study, rows: Sequence[Row]) -> PageTable:
    """Build the table of mean and standard deviation over seeds for each combination of settings."""
    by = [name for name in study.settings if name != "seed" and len({row.get(name) for row in rows}) > 1]
    results = [name for name in study.results if any(is_number(row.get(name)) for row in rows)]
    values = {name: group_values(rows, by, name) for name in results}
    flags = {name for name in results if all(isinstance(row.get(name), bool | type(None)) for row in rows)}
    keys = {tuple(row.get(name) for name in by) for row in rows}
    lines = [
        [*map(value_cell, key), *(seeds_cell(values[name].get(key), name in flags) for name in results)]
        for key in sorted(keys, key=lambda key: [(isinstance(v, str), is_number(v) and v, str(v)) for v in key])
    ]
    return PageTable([name.replace("_", " ") for name in (*by, *results)], lines)


def rows_table(rows: Sequence[Row]) -> PageTable:
    """Build the table of the first rows, without constant columns."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in CIRCUMSTANCES]
    shown = ["key", *(name for name in names if len({row.get(name) for row in rows}) > 1), "seconds"]
    lines = [[value_cell(row.get(name)) for name in shown] for row in rows[:MOST_ROWS]]
    return PageTable([name.replace("_", " ") for name in shown], lines)


def is_number(value: Value) -> bool:
    """Return whether a value is a number or a flag."""
    return isinstance(value, int | float)


def seeds_cell(values: SeedValues | None, flag: bool) -> TableCell:
    """Show mean and standard deviation; for a flag, the number of seeds for which it is true."""
    if values is None:
        return number_cell(math.nan, "")
    if flag:
        return number_cell(values.mean, f"{sum(values.values):.0f} of {len(values.values)}")
    return number_cell(values.mean, values.text().partition(" (")[0])


def value_cell(value: Value) -> TableCell:
    """Show a value; an absent one is empty and sorts as a number."""
    if value is None:
        return number_cell(math.nan, "")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number_cell(value, format_value(value) if isinstance(value, float) else str(value))
    return text_cell(str(value))


def facts(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Number of cells and seeds, measuring time, dataset, date and hardware."""
    seconds = sum(float(row.get("seconds") or 0) for row in rows)
    yield "cells", f"{len(rows):,}"
    yield "seeds", str(len({row.get("seed") for row in rows}))
    yield "time, all cells added up", f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
    columns = {"data": "dataset", **{name: name for name in ("budget", "date", "device", "machine", "torch")}}
    for name, column in columns.items():
        text = ", ".join(dict.fromkeys(str(row[column]) for row in rows if row.get(column) is not None))
        if text:
            yield name, text
