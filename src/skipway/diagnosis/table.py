"""Diagnoses, treatments and findings on a terminal: `rich` renderables, and the same as plain text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from skipway.diagnosis.findings import LEVELS, Finding, Level, Verdict, format_number, format_share
from skipway.diagnosis.rows import SignalRow, folded

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.measure import Measurement
    from rich.table import Table

    from skipway.diagnosis.comparison import Comparison
    from skipway.diagnosis.offers import Offer

__all__ = [
    "LEAST_SPAN",
    "SENTENCES",
    "SYMBOLS",
    "as_text",
    "compact",
    "comparison_view",
    "diagnosis_view",
    "elided",
    "findings_view",
    "marks_text",
    "offer_lines",
    "offer_text",
    "remedy_lines",
    "treatment_view",
    "verdict_sentence",
    "verdict_text",
]

WIDTH = 100
SHORTEST_NAME = 16
BAR = 8
SYMBOLS: dict[Level, str] = {"fatal": "✗", "serious": "!", "note": "·"}
SENTENCES: dict[Verdict, str] = {
    "trains": "The network trains",
    "will not train": "The network will not train",
    "undecided": "Whether the network trains is undecided",
}
LEVEL_STYLES: dict[Level, str] = {"fatal": "bold red", "serious": "yellow", "note": "cyan"}
VERDICT_STYLES: dict[Verdict, str] = {
    "trains": "bold green",
    "will not train": "bold red",
    "undecided": "bold yellow",
}
BLOCKS = " ▏▎▍▌▋▊▉█"
LEAST_SPAN = 100.0
"""Bars and axes span two decades at least, so that a stream that hardly changes looks so."""


def as_text(view: RenderableType, width: int = WIDTH) -> str:
    """A renderable as plain text, without colours or trailing blanks."""
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(view)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def diagnosis_view(
    heading: Sequence[str],
    verdict: Verdict,
    grounds: Sequence[str],
    numbers: Sequence[tuple[str, float]],
    rows: Sequence[SignalRow],
    findings: Sequence[Finding],
    *,
    remarks: Sequence[str] = (),
    offers: Sequence[str] = (),
) -> RenderableType:
    """A diagnosis: its heading, verdict and main numbers, a row with bars for each connection, its findings.

    Of more than 40 rows about 20 are shown.

    Args:
        heading: the network, the training and the batch, a few words each.
        verdict: "trains", "will not train" or "undecided".
        grounds: the odds, and what would decide an undecided verdict.
        numbers: of the whole network, with their names.
        rows: of `signal_rows`.
        findings: the worst first.
        remarks: on what was decided about the batch and the training.
        offers: remedies that were tried, with their odds.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [
        Flow(heading, " · ", "bold"),
        *(Text(remark, "dim") for remark in remarks),
        Text(verdict_sentence(verdict, grounds), VERDICT_STYLES[verdict]),
        *(bullet("  → ", offer) for offer in offers),
        Flow([f"{name} {format_number(value)}" for name, value in numbers], "   ", "dim"),
    ]
    if rows:
        parts += ["", signal_table(rows, findings)]
    if findings:
        parts += ["", findings_view(findings)]
    return Group(*parts)


def verdict_text(verdict: Verdict, odds: float) -> str:
    """A verdict with its odds.

    >>> verdict_text("trains", 0.974), verdict_text("will not train", 0.002)
    ('trains (odds 97 %)', 'will not train (odds below 1 %)')
    """
    return f"{verdict} (odds {format_share(odds)})"


def verdict_sentence(verdict: Verdict, grounds: Sequence[str]) -> str:
    """A verdict in a sentence, with its odds and what would decide it.

    >>> verdict_sentence("trains", ["odds 97 %"])
    'The network trains (odds 97 %).'
    """
    first, *others = grounds or [""]
    odds = f" ({first})" if first else ""
    return f"{SENTENCES[verdict]}{odds}{': ' + '; '.join(others) if others else '.'}"


def offer_text(offer: Offer, before: float) -> str:
    """A remedy that was tried, with the odds before and after, and the verdict on it."""
    return f"{offer.remedy}: odds {format_share(before)} → {format_share(offer.odds)}, {offer.verdict}"


def offer_lines(offers: Sequence[Offer], before: float) -> list[str]:
    """The offers in words, the best one first, which is marked where there are several."""
    lines = [offer_text(each, before) for each in offers]
    return [f"{lines[0]} (applied by fix)", *lines[1:]] if len(lines) > 1 else lines


def remedy_lines(findings: Sequence[Finding]) -> list[list[str]]:
    """The remedies of each finding in words; those of an earlier one, of two or more, by its rule."""
    shown: dict[tuple[Any, ...], str] = {}
    lines = []
    for finding in findings:
        earlier = shown.setdefault(finding.remedies, finding.rule) if len(finding.remedies) > 1 else finding.rule
        again = earlier != finding.rule
        lines.append([f"as for {earlier}"] if again else [str(remedy) for remedy in finding.remedies])
    return lines


def findings_view(findings: Sequence[Finding], first: int = 1) -> RenderableType:
    """Findings in full: level, rule and place, what and why, the source, the remedies.

    Args:
        findings: in the order in which they are shown.
        first: number of the first.
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = []
    for count, (finding, lines) in enumerate(zip(findings, remedy_lines(findings), strict=True), first):
        style = LEVEL_STYLES[finding.level]
        title = (f"{SYMBOLS[finding.level]}{count} ", style), (finding.level, style)
        details = [
            Text(finding.what),
            Text(f"why: {finding.why}"),
            Text(f"source: {finding.source}", "dim"),
            *(bullet("→ ", line) for line in lines),
        ]
        parts += [""] if parts else []
        parts += [
            Text.assemble(*title, (f" · {finding.rule} · {finding.place}", "bold")),
            Padding(Group(*details), (0, 0, 0, 3)),
        ]
    return Group(*parts)


def treatment_view(
    title: str,
    applied: Sequence[object],
    verdicts: tuple[Verdict, Verdict],
    pairs: Iterable[tuple[str, str, str]],
    findings: Sequence[Finding],
) -> RenderableType:
    """A treatment: the remedies, then verdict and main numbers before and after, then what is left to mend.

    Args:
        title: the network and what was done to it.
        applied: the remedies.
        verdicts: before and after.
        pairs: name, text before and text after of each further line.
        findings: after the treatment; notes are left out.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("", "before", "after"):
        table.add_column(name)
    table.add_row("verdict", *(Text(verdict, VERDICT_STYLES[verdict]) for verdict in verdicts))
    for pair in pairs:
        table.add_row(*map(Text, pair))
    left = [finding for finding in findings if finding.level != "note"]
    return Group(
        Text(title, "bold"),
        *(bullet("  → ", str(remedy)) for remedy in applied),
        "",
        table,
        *(["", findings_view(left)] if left else []),
    )


def comparison_view(comparison: Comparison) -> RenderableType:
    """A comparison: which to train, a row for each design, its best offer, why one failed."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("design", overflow="fold")
    table.add_column("verdict")
    for name in ("loss", "steps/s", "parameters"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("worst finding")
    lines: list[RenderableType] = []
    for row in comparison:
        if row.diagnosis is None:
            table.add_row(DesignName(row.name), Text("failed", "bold red"), "–", "–", "–", "")
            lines.append(bullet(f"  {SYMBOLS['fatal']} ", f"{row.name}: {row.reason}"))
            continue
        difference = comparison.differences.get(row.name)
        against = "" if difference is None else f" ({difference})"
        speed = compact(1 / row.step_seconds)
        table.add_row(
            DesignName(row.name),
            Text(row.verdict, VERDICT_STYLES[row.diagnosis.verdict]),
            f"{compact(row.loss)}{against}",
            speed,
            f"{row.parameters:,}",
            Text("") if row.finding is None else Text(row.finding.rule, LEVEL_STYLES[row.finding.level]),
        )
        if row.offer is not None:
            lines.append(bullet("  → ", f"{row.name}: {offer_text(row.offer, row.diagnosis.odds)}"))
    parts: list[RenderableType] = [Text(comparison.answer, "bold"), *(Text(each, "dim") for each in comparison.remarks)]
    return Group(*parts, "", table, *([""] if lines else []), *lines)


def bullet(mark: str, text: str) -> RenderableType:
    """Text after a mark, its further lines indented as far."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid()
    grid.add_column(width=len(mark), no_wrap=True)
    grid.add_column()
    grid.add_row(mark, Text(text))
    return grid


class Flow:
    """Parts on as many lines as they need, which break between parts only."""

    def __init__(self, parts: Iterable[str], separator: str, style: str) -> None:
        self.parts, self.separator, self.style = tuple(parts), separator, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        from rich.text import Text

        lines: list[str] = []
        for part in self.parts:
            longer = f"{lines[-1]}{self.separator}{part}" if lines else part
            lines[max(len(lines) - 1, 0) :] = [longer] if len(longer) <= options.max_width else [*lines[-1:], part]
        for line in lines:
            yield Text(line, self.style)


def signal_table(rows: Sequence[SignalRow], findings: Sequence[Finding]) -> Table:
    """The table of connections or layers, with folds where they are many."""
    from rich.table import Table
    from rich.text import Text

    connected = rows[0].form != "layer"
    forward, backward = bar_scale([row.forward for row in rows]), bar_scale([row.backward for row in rows])
    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("connection" if connected else "layer")
    for title in ("branch", "norm") if connected else ():
        table.add_column(title, no_wrap=True)
    if connected:
        table.add_column("|F|/|x|", justify="right", no_wrap=True)
    titles = "|y|" if connected else "std", "|∂L/∂y|"
    columns = [row.forward for row in rows], [row.backward for row in rows]
    widths = [max(len(title), *map(len, map(compact, column))) for title, column in zip(titles, columns, strict=True)]
    for title, width, bar in zip(titles, widths, ("forward", "backward"), strict=True):
        table.add_column(f"{title:>{width}} {bar}", no_wrap=True)
    table.add_column("distinct", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for entry in folded(rows):
        if isinstance(entry, list):
            marks = tuple(sorted({mark for row in entry for mark in row.marks}))
            ratio = [f"≤{compact(most(row.ratio for row in entry))}"] if connected else []
            cells: list[str | Text] = [*([""] * 2 if connected else []), *ratio]
            spans = interval([row.forward for row in entry]), interval([row.backward for row in entry])
            cells += [f"{low:>{width}}{high}" for (low, high), width in zip(spans, widths, strict=True)] + [""]
            name: Any = f"⋮ {len(entry)} more"
        else:
            marks = entry.marks
            cells = [entry.form, entry.norms, compact(entry.ratio)] if connected else []
            values = (entry.forward, forward, "blue"), (entry.backward, backward, "magenta")
            for (value, bar_of, color), width in zip(values, widths, strict=True):
                cells.append(Text.assemble(f"{compact(value):>{width}} ", (bar_of(value), color)))
            cells.append(compact(entry.distinct))
            name = ElidedName(entry.name or "the model", worst_style(marks, findings))
        style = "dim" if isinstance(entry, list) else ""
        mark = Text(marks_text(marks, findings), worst_style(marks, findings))
        table.add_row(name, *(Text(cell) if isinstance(cell, str) else cell for cell in cells), mark, style=style)
    return table


class DesignName(Flow):
    """A model with its options, on as many lines as it needs, which break behind brackets, commas and spaces only."""

    def __init__(self, name: str) -> None:
        super().__init__(re.split(r"(?<=[(,+ ])(?=[^ ])", name), "", "")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(max(map(len, self.parts)), sum(map(len, self.parts)))


class ElidedName:
    """A module path that loses its middle where its column is too narrow."""

    def __init__(self, name: str, style: str) -> None:
        self.name, self.style = name, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        from rich.text import Text

        yield Text(elided(self.name, options.max_width), self.style, no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(min(SHORTEST_NAME, len(self.name)), len(self.name))


def elided(text: str, size: int) -> str:
    """Text of at most a width; what is too long loses its middle.

    >>> elided("stages.0", 10), elided("encoder.layers.encoder_layer_11", 16)
    ('stages.0', 'encoder…layer_11')
    """
    tail = size // 2
    return text if len(text) <= size else f"{text[: size - tail - 1]}…{text[len(text) - tail :]}"


def marks_text(marks: Sequence[int], findings: Sequence[Finding]) -> str:
    """The first two marks, "✗1!2…": the symbol of each finding's level with its number."""
    text = "".join(f"{SYMBOLS[findings[mark - 1].level]}{mark}" for mark in marks[:2])
    return text + ("…" if len(marks) > 2 else "")


def worst_style(marks: Sequence[int], findings: Sequence[Finding]) -> str:
    """The style of the worst finding among those marked."""
    levels = [findings[mark - 1].level for mark in marks]
    return LEVEL_STYLES[min(levels, key=LEVELS.index)] if levels else ""


def bar_scale(values: Sequence[float], size: int = BAR) -> Callable[[float], str]:
    """A function from a value to its bar, on the logarithmic scale of all values.

    >>> draw = bar_scale([1.0, 10.0, 100.0], size=4)
    >>> draw(1.0), draw(10.0), draw(100.0), draw(0.0), draw(math.inf), draw(math.nan)
    ('▎', '██▏', '████', '0', 'inf', '–')
    """
    finite = [value for value in values if 0 < value < math.inf]
    high = max(finite, default=1.0)
    low = min([*finite, high / LEAST_SPAN])
    step = 1 / (4 * size)

    def draw(value: float) -> str:
        if not 0 < value < math.inf:
            return compact(value)
        share = step + (1 - step) * math.log(value / low) / math.log(high / low)
        full, part = divmod(round(8 * size * share), 8)
        return f"{'█' * full}{BLOCKS[part] if part else ''}"[:size]

    return draw


def compact(value: float) -> str:
    """A number in seven characters at most; a dash for what was not measured.

    >>> compact(0.0123456), compact(1234567.0), compact(math.nan), compact(math.inf)
    ('0.0123', '1.2e+06', '–', 'inf')
    """
    if math.isnan(value):
        return "–"
    text = format_number(value)
    return f"{value:.1e}" if len(text) > 7 else text


def most(values: Iterable[float]) -> float:
    """The largest of the measured values; NaN if none is."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def interval(values: Sequence[float]) -> tuple[str, str]:
    """The smallest measured value and, after a dash, the largest: "0.98", "–1.2"; the second is empty if they agree."""
    low, high = compact(-most(-value for value in values)), compact(most(values))
    return low, "" if low == high else f"–{high}"
