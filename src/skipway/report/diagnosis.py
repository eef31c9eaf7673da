"""A diagnosis as one page of HTML that loads nothing: verdict, findings, signal by depth, connections, refusals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from skipway._version import __version__
from skipway.diagnosis.findings import Finding, counted, format_number
from skipway.diagnosis.rows import SignalRow
from skipway.diagnosis.table import LEAST_SPAN, SENTENCES, SYMBOLS, compact, marks_text
from skipway.report.sheet import definitions, document, linked, listed, size_cell, word_cell
from skipway.tracing.residual_adds import REASONS

if TYPE_CHECKING:
    from skipway.diagnosis.diagnosis import Diagnosis

__all__ = ["page"]

WIDTH, LEFT, RIGHT, TOP = 920, 64, 12, 24
# heights of the panels forward, backward and distinct, and the gap between two of them
HEIGHTS, GAP, BOTTOM = (190, 190, 90), 26, 40
# what a letter takes of the width, and how many refused places are named
LETTER = 7.2
NAMED = 8
# the columns of the table that hold words
WORDS = frozenset({"name", "branch", "norm", "findings"})
MOST_TICKS = 6
DOTS = 80
KIND = {"trains": "good", "trains if": "fair", "will not train": "bad"}
MEANING = {
    "trains": "Nothing that was measured stands in the way.",
    "trains if": "",
    "will not train": "Something at its start keeps it from learning; see the findings.",
}

# beside the style that all pages share
STYLE = """
.verdict { margin: 1rem 0; padding: .9rem 1.1rem; border-radius: .5rem; border-left: .4rem solid; }
.verdict strong { font-size: 1.25rem; } .verdict.good { background: var(--good-paper); color: var(--good); }
.verdict.fair { background: var(--fair-paper); color: var(--fair); }
.verdict.bad { background: var(--bad-paper); color: var(--bad); }
.card { background: var(--card); border: 1px solid var(--line); border-left: .3rem solid var(--note);
  border-radius: .4rem; padding: .8rem 1rem; margin: .7rem 0; }
.card.fatal { border-left-color: var(--fatal); } .card.serious { border-left-color: var(--serious); }
.level { font-weight: 700; } .level.fatal, td .fatal { color: var(--fatal); }
.level.serious, td .serious { color: var(--serious); } .level.note, td .note { color: var(--note); }
.place { color: var(--soft); font-weight: 400; overflow-wrap: anywhere; } .remedies { list-style: "→ "; }

"""


def page(diagnosis: Diagnosis) -> str:
    """A diagnosis as one page of HTML: inline style and pictures, light and dark, nothing fetched from anywhere.

    Args:
        diagnosis: what `diagnose` gave.
    """
    model = type(diagnosis.subject.model).__name__
    rows, numbers = diagnosis.rows, (*diagnosis.key_numbers, *ahead_numbers(diagnosis))
    parts = [
        f"<h1>{escape(model)}</h1>",
        f'<p class="asked">{escape(" · ".join(diagnosis.heading[1:]))}</p>',
        *banner(diagnosis),
        definitions((name, format_number(value)) for name, value in numbers),
        *cards(diagnosis.findings),
        *picture_section(rows, diagnosis),
        *table_section(rows, diagnosis),
        *refusals(diagnosis),
        footer(diagnosis),
    ]
    return document(f"{model}: {diagnosis.verdict}", parts, style=STYLE)


def banner(diagnosis: Diagnosis) -> Iterator[str]:
    """The verdict with its conditions."""
    verdict = diagnosis.verdict
    yield f'<div class="verdict {KIND[verdict]}" role="status">'
    yield f"<strong>{escape(SENTENCES[verdict])}</strong>"
    if MEANING[verdict]:
        yield f"<p>{escape(MEANING[verdict])}</p>"
    if diagnosis.conditions:
        yield listed(diagnosis.conditions, "remedies")
    yield "</div>"


def ahead_numbers(diagnosis: Diagnosis) -> list[tuple[str, float]]:
    """Where the optimizer's first steps led."""
    ahead = diagnosis.measurement.ahead
    if ahead is None:
        return []
    return [
        (f"loss after {counted(len(ahead.losses) - 1, 'step')} of {diagnosis.settings.optimizer}", ahead.losses[-1])
    ]


def cards(findings: Sequence[Finding]) -> Iterator[str]:
    """A card for each finding."""
    yield "<h2>Findings</h2>"
    if not findings:
        yield '<p class="soft">None.</p>'
    for count, finding in enumerate(findings, 1):
        level = finding.level
        yield f'<section class="card {level}" id="finding-{count}">'
        yield (
            f'<h3><span class="level {level}">{SYMBOLS[level]}{count} {level}</span> · {escape(finding.rule)} '
            f'<span class="place" title="{escape(", ".join(finding.where))}">at {escape(finding.place)}</span></h3>'
        )
        yield f"<p>{escape(finding.what)}</p>"
        yield definitions((name, format_number(value)) for name, value in finding.evidence.items())
        yield f'<p class="soft">Why: {escape(finding.why)}</p>'
        yield f'<p class="soft">Source: {linked(finding.source)}</p>'
        if finding.remedies:
            yield listed(finding.remedies, "remedies")
        yield "</section>"


@dataclass(frozen=True)
class Line:
    """A line of a panel: its class in the style sheet, what it shows, a value for each row that it is about."""

    kind: str
    title: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis from `low` at `bottom` to `high` at `top`, in the picture's units."""

    low: float
    high: float
    top: float
    bottom: float

    def at(self, value: float) -> float:
        """Where a value stands; 0 and infinity at the edges."""
        share = math.log(min(max(value, self.low), self.high) / self.low) / math.log(self.high / self.low)
        return self.bottom - share * (self.bottom - self.top)

    @property
    def ticks(self) -> list[int]:
        """Powers of ten to be marked."""
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        return list(range(first, last + 1, max(1, math.ceil((last - first + 1) / MOST_TICKS))))


def scale_for(values: Iterable[float], top: float, bottom: float) -> Scale:
    """A scale on which all finite values lie, two decades at least."""
    known = [value for value in values if 0 < value < math.inf]
    low, high = (min(known), max(known)) if known else (0.1, 10.0)
    missing = math.sqrt(max(1.0, LEAST_SPAN / (high / low)))
    # room for what lies at the edges: 0 and infinity
    room = (high / low * missing**2) ** 0.06
    return Scale(low / missing / room, high * missing * room, top, bottom)


def picture_section(rows: Sequence[SignalRow], diagnosis: Diagnosis) -> Iterator[str]:
    """The signal by depth, forward, backward and how distinct samples stay."""
    if not rows:
        return
    connected = bool(diagnosis.measurement.connections)
    forward = [Line("stream", "stream, rms |y|" if connected else "output, deviation", [row.forward for row in rows])]
    backward = [Line("stream", "gradient, rms |∂loss/∂y|", [row.backward for row in rows])]
    if connected:
        forward += branch_lines(rows, "{} branch, rms |F(x)|", [row.branch for row in rows])
        backward += branch_lines(rows, "through {}", [row.through for row in rows])
    distinct = [Line("distinct", "distinct: 1 − similarity of samples", [row.distinct for row in rows])]
    height = TOP + sum(HEIGHTS) + 2 * GAP + BOTTOM
    yield "<h2>Signal by depth</h2>"
    yield (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Size of the signal forward and of the gradient '
        'backward at each place, on logarithmic scales; 0 and infinity lie at the edges">'
    )
    yield from band_marks(rows, diagnosis, height - BOTTOM)
    top = TOP
    for lines, size in zip((forward, backward, distinct), HEIGHTS, strict=True):
        yield from panel(lines, rows, top + 20, top + size)
        top += size + GAP
    yield from name_labels(rows, height - BOTTOM + 18)
    yield "</svg>"
    shown = (value for line in (*forward, *backward, *distinct) for value in line.values)
    if any(value in (0.0, math.inf) for value in shown):
        yield '<p class="soft">Hollow points lie at the edges: 0 below, infinite above.</p>'


def branch_lines(rows: Sequence[SignalRow], title: str, values: Sequence[float]) -> Iterator[Line]:
    """A line for each kind of branch, attention and mlp apart."""
    kinds = [row.form.split()[0] for row in rows]
    for count, kind in enumerate(dict.fromkeys(kinds), 1):
        own = [value if mine == kind else None for value, mine in zip(values, kinds, strict=True)]
        yield Line(f"through kind{count}", title.format(kind), own)


def panel(lines: Sequence[Line], rows: Sequence[SignalRow], top: float, bottom: float) -> Iterator[str]:
    """One panel: grid, title, lines, and a point with a tooltip for each row."""
    scale = scale_for((value for line in lines for value in line.values if value is not None), top, bottom)
    for power in scale.ticks:
        y = scale.at(10.0**power)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>'
    left = float(LEFT)
    for line in lines:
        yield f'<path class="{line.kind}" d="M{left:.0f} {top - 16:.0f}h20"/>'
        yield f'<text class="title" x="{left + 26:.0f}" y="{top - 12:.0f}">{escape(line.title)}</text>'
        left += 50 + LETTER * len(line.title)
        yield f'<path class="{line.kind}" d="{path_of(line.values, scale)}"/>'
    for line in lines:
        yield from points(line, rows, scale)


def points(line: Line, rows: Sequence[SignalRow], scale: Scale) -> Iterator[str]:
    """A point with a tooltip at each value: unseen where they are many, hollow at the edge for 0 and infinity."""
    for place, value in enumerate(line.values):
        if value is None or math.isnan(value):
            continue
        kind = "" if 0 < value < math.inf else " edge"
        kind = kind or ("" if len(rows) <= DOTS else " unseen")
        told = f"{rows[place].name}: {line.title.partition(':')[0]} {format_number(value)}"
        yield (
            f'<circle class="dot {line.kind}{kind}" cx="{across(place, len(rows)):.1f}" cy="{scale.at(value):.1f}" '
            f'r="{5 if kind == " unseen" else 3.5}"><title>{escape(told)}</title></circle>'
        )


def path_of(values: Sequence[float | None], scale: Scale) -> str:
    """The path through the finite values, with gaps at what is 0, infinite or was not measured."""
    steps, pen = [], "M"
    for place, value in enumerate(values):
        if value is None:
            continue
        drawn = 0 < value < math.inf
        if drawn:
            steps.append(f"{pen}{across(place, len(values)):.1f} {scale.at(value):.1f}")
        pen = "L" if drawn else "M"
    return "".join(steps)


def across(place: float, count: int) -> float:
    """Where the row with that number, from 0, stands along the depth."""
    return LEFT + (place + 0.5) * (WIDTH - LEFT - RIGHT) / max(count, 1)


def name_labels(rows: Sequence[SignalRow], y: float) -> Iterator[str]:
    """As many of the rows' names as have room, first and last among them, within the picture."""
    longest = max(len(row.name) for row in rows) + 2
    most = max(2, min(len(rows), int((WIDTH - LEFT) / (longest * LETTER))))
    for place in sorted({round(label * (len(rows) - 1) / (most - 1)) for label in range(most)}):
        half = len(rows[place].name) * LETTER / 2
        x = min(max(across(place, len(rows)), half), WIDTH - half)
        yield f'<text x="{x:.1f}" y="{y:.0f}" text-anchor="middle">{escape(rows[place].name)}</text>'


def band_marks(rows: Sequence[SignalRow], diagnosis: Diagnosis, bottom: float) -> Iterator[str]:
    """A band at each row to which a finding points, with the findings' numbers where a stretch of them begins."""
    width = (WIDTH - LEFT - RIGHT) / max(len(rows), 1)
    before: tuple[int, ...] = ()
    for place, row in enumerate(rows):
        if row.marks:
            level = diagnosis.findings[row.marks[0] - 1].level
            told = "; ".join(f"{mark} {diagnosis.findings[mark - 1].rule}" for mark in row.marks)
            x = across(place, len(rows)) - width / 2
            yield (
                f'<rect class="band {level}" x="{x:.1f}" y="{TOP}" width="{width:.2f}" height="{bottom - TOP:.0f}">'
                f"<title>{escape(f'{row.name}: {told}')}</title></rect>"
            )
            if row.marks != before:
                yield f'<text class="mark {level}" x="{x + 2:.1f}" y="14">{",".join(map(str, row.marks))}</text>'
        before = row.marks


def table_section(rows: Sequence[SignalRow], diagnosis: Diagnosis) -> Iterator[str]:
    """All connections, or layers, as a table that a press on a heading sorts."""
    if not rows:
        return
    connected = bool(diagnosis.measurement.connections)
    titles = ["#", "name", *(["branch", "norm", "|F|/|x|", "|F|"] if connected else [])]
    titles += ["|y|" if connected else "std", "|∂loss/∂y|", *(["through branch"] if connected else [])]
    titles += ["distinct", "findings"]
    yield f"<h2>{'Connections' if connected else 'Layers'}</h2>"
    yield '<div class="scroll"><table><thead><tr>'
    for title in titles:
        kind = "" if title in WORDS else ' class="number"'
        yield f'<th{kind}><button type="button">{title}</button></th>'
    yield "</tr></thead><tbody>"
    for count, row in enumerate(rows, 1):
        sizes: list[float] = [row.ratio, row.branch] if connected else []
        sizes += [row.forward, row.backward, *([row.through] if connected else []), row.distinct]
        names = [row.name or "the model", *([row.form, row.norms] if connected else [])]
        cells = [size_cell(count, str(count)), *(word_cell(escape(name), name) for name in names)]
        cells += [size_cell(size, compact(size)) for size in sizes]
        cells.append(word_cell(mark_links(row, diagnosis), marks_text(row.marks, diagnosis.findings)))
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"


def mark_links(row: SignalRow, diagnosis: Diagnosis) -> str:
    """Links to the findings that point to a row."""
    levels = [(mark, diagnosis.findings[mark - 1].level) for mark in row.marks]
    return " ".join(f'<a class="{level}" href="#finding-{mark}">{SYMBOLS[level]}{mark}</a>' for mark, level in levels)


def refusals(diagnosis: Diagnosis) -> Iterator[str]:
    """The additions that are no residual connections, by reason."""
    refused = diagnosis.chain.refused
    if not refused:
        return
    yield "<h2>Additions that are no residual connections</h2>"
    for reason, count in Counter(refusal.reason for refusal in refused).most_common():
        owners = list(dict.fromkeys(each.owner or "the model" for each in refused if each.reason == reason))
        shown = ", ".join(owners[:NAMED]) + (f" and {len(owners) - NAMED} more" if len(owners) > NAMED else "")
        yield f'<p>{count:,} × {escape(REASONS[reason])}<br><span class="soft">{escape(shown)}</span></p>'


def footer(diagnosis: Diagnosis) -> str:
    """What made this page, and what it took."""
    passes = diagnosis.measurement.passes
    return (
        f"<footer>Skipway {escape(__version__)} · {passes:.3g} forward-backward passes · {diagnosis.seconds:.1f} s"
        "</footer>"
    )
