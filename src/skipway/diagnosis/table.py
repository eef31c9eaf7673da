"""A diagnosis as lines of text: the verdict, a row with bars for each connection, the findings."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from skipway.diagnosis.findings import LEVELS, Finding, Level, number

if TYPE_CHECKING:
    from rich.console import Console

    from skipway.diagnosis.diagnosis import Diagnosis, Treatment

__all__ = [
    "LEAST_SPAN",
    "SYMBOLS",
    "Row",
    "counted",
    "findings_text",
    "fitted",
    "heading",
    "marks_text",
    "remarks",
    "render",
    "rows_of",
    "short",
    "side_by_side",
    "table",
    "verdict_text",
]

WIDTH = 100
# rows that a table shows one by one; beyond that stretches of them are folded
UNFOLDED = 40
SHORTEST_FOLD = 3
FOLDS = 12
SHORTEST_NAME = 16
SYMBOLS: dict[Level, str] = {"fatal": "✗", "serious": "!", "note": "·"}
# styles of rich: of verdicts, of levels, and of the two directions of the signal
STYLES = {
    "trains": "bold green",
    "trains if": "bold yellow",
    "will not train": "bold red",
    "fatal": "bold red",
    "serious": "yellow",
    "note": "cyan",
    "forward": "blue",
    "backward": "magenta",
    "label": "bold",
    "dim": "dim",
}
BLOCKS = " ▏▎▍▌▋▊▉█"
# bars span two decades at least, so that a stream that hardly changes is drawn so
LEAST_SPAN = 100.0

Segment = tuple[str, str]
Line = list[Segment]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One place along the depth: a residual connection, or a layer of a network that has none.

    Args:
        name: of the connection or module.
        form: what the branch does, and what the skip is where it is not the identity; "layer" for a layer.
        norms: where the branch's norms stand.
        skip, branch: sizes of x and F(x).
        forward: size of the stream behind it; deviation of the output for a layer.
        backward: size of the loss's gradient there.
        through: size of the gradient's part that comes through the branch.
        distinct: 1 − mean cosine between samples there.
        marks: numbers of the findings that point here, from 1.
    """

    name: str
    form: str
    norms: str = ""
    skip: float = math.nan
    branch: float = math.nan
    forward: float = math.nan
    backward: float = math.nan
    through: float = math.nan
    distinct: float = math.nan
    marks: tuple[int, ...] = ()

    @property
    def ratio(self) -> float:
        """|F(x)| / |x|."""
        return self.branch / self.skip if self.skip else math.nan


def rows_of(diagnosis: Diagnosis) -> list[Row]:
    """The rows of a diagnosis in order: its connections, or its layers where it has none."""
    measured = diagnosis.measurement
    marks = marks_of(diagnosis)
    if not measured.connections:
        return [
            Row(
                name=layer.name,
                form="layer",
                forward=layer.std,
                backward=layer.gradient,
                distinct=layer.distinct,
                marks=marks.get(layer.name, ()),
            )
            for layer in measured.layers
        ]
    return [
        Row(
            name=signal.name,
            form=connection.seen.kind + ("" if connection.seen.skip == "identity" else f" {connection.seen.skip}"),
            norms="+".join(connection.seen.norms) or "none",
            skip=signal.skip,
            branch=signal.branch,
            forward=signal.stream,
            backward=signal.gradient_after,
            through=signal.gradient_branch,
            distinct=signal.distinct,
            marks=marks.get(signal.name, ()),
        )
        for connection, signal in zip(diagnosis.chain, measured.connections, strict=True)
    ]


def marks_of(diagnosis: Diagnosis) -> dict[str, tuple[int, ...]]:
    """The numbers of the findings that point to a connection or layer, itself or something in it, by its name."""
    homes = homes_of(diagnosis)
    marks: dict[str, list[int]] = {}
    for count, finding in enumerate(diagnosis.findings, 1):
        places = (homes.get(where) or homes.get(where.rpartition(".")[0]) for where in finding.where)
        for name in dict.fromkeys(place for place in places if place is not None):
            marks.setdefault(name, []).append(count)
    return {name: tuple(found) for name, found in marks.items()}


def homes_of(diagnosis: Diagnosis) -> dict[str, str]:
    """The row in which a connection, module or parameter that a finding names is found."""
    layers = {layer.name: layer.name for layer in diagnosis.measurement.layers}
    if not diagnosis.measurement.connections:
        return layers
    homes = {connection.name: connection.name for connection in diagnosis.chain}
    for connection in diagnosis.chain:
        scale = () if connection.seen.scale is None else connection.seen.scale.parameters
        for inner in (*connection.seen.maps, *scale, *connection.seen.shortcut):
            homes.setdefault(inner, connection.name)
    # what several branches run in, a stage or the model itself, belongs to none of them
    shared: dict[str, set[str]] = {}
    for connection in diagnosis.chain:
        for inner in connection.seen.modules:
            shared.setdefault(inner, set()).add(connection.name)
    for inner, owners in shared.items():
        if inner and len(owners) == 1:
            homes.setdefault(inner, *owners)
    return homes


def verdict_text(diagnosis: Diagnosis) -> str:
    """The verdict as a sentence, without its conditions."""
    return {"trains": "It trains.", "trains if": "It trains if:", "will not train": "It will not train."}[
        diagnosis.verdict
    ]


def counted(count: int, thing: str) -> str:
    """A number with its noun.

    >>> counted(1, "connection"), counted(2000, "connection")
    ('1 connection', '2,000 connections')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def heading(diagnosis: Diagnosis) -> list[str]:
    """What was asked about: the model, its connections, the training and the batch, a few words each."""
    subject, chain = diagnosis.subject, diagnosis.chain
    parts = [type(subject.model).__name__, counted(len(chain), "residual connection")]
    if not len(chain):
        parts = [parts[0], "no residual connection", counted(len(diagnosis.measurement.layers), "layer")]
    if chain.refused:
        parts.append(f"{counted(len(chain.refused), 'addition')} refused")
    parts += [str(diagnosis.settings), counted(subject.size, "sample")]
    return parts if subject.training else [*parts, "evaluation mode"]


def remarks(diagnosis: Diagnosis) -> list[tuple[str, float]]:
    """The main numbers of the whole network, with their names."""
    measured = diagnosis.measurement
    found = [
        ("loss", measured.loss),
        ("|∇ loss|", measured.gradient),
        ("rms output", measured.logits),
        ("distinct outputs", measured.distinct),
        ("agreement of half-batch gradients", measured.noise.agreement),
        ("sharpness λ", measured.curvature.sharpness),
        ("2/λ", measured.curvature.largest_rate),
        ("effective path", measured.effective_path),
    ]
    if measured.jacobians.shattering is not None:
        found.append(("gradient at a neighbour", measured.jacobians.shattering))
    return [(name, value) for name, value in found if not math.isnan(value) or name in ("loss", "|∇ loss|")]


def table(diagnosis: Diagnosis) -> str:
    """A diagnosis as plain text: its verdict, a row with bars for each connection, its findings.

    At most 100 columns wide, without colours. Networks of more than 40 connections are folded where the same findings
    hold along a stretch; those without connections show their layers.

    Args:
        diagnosis: what `diagnose` gave.
    """
    return text_of(lines_of(diagnosis))


def side_by_side(treatment: Treatment) -> str:
    """What remedies did, as plain text: the remedies, and verdict and main numbers before and after.

    Args:
        treatment: what `Diagnosis.fix` gave.
    """
    return text_of(treatment_lines(treatment))


def findings_text(findings: Sequence[Finding]) -> str:
    """Findings alone, as the linter gives them, as plain text.

    Args:
        findings: in the order in which they are shown.
    """
    return text_of(lines_of_findings(findings))


def render(shown: Diagnosis | Treatment | Sequence[Finding], console: Console) -> None:
    """Print a diagnosis, a treatment or findings on a terminal, in colours and as wide as it is, up to 100 columns.

    Args:
        shown: what `diagnose`, `Diagnosis.fix` or `lint` gave.
        console: of rich.
    """
    from rich.text import Text

    from skipway.diagnosis.diagnosis import Diagnosis, Treatment

    width = min(WIDTH, console.width)
    if isinstance(shown, Diagnosis):
        lines = lines_of(shown, width)
    elif isinstance(shown, Treatment):
        lines = treatment_lines(shown, width)
    else:
        lines = lines_of_findings(shown, width)
    for line in lines:
        segments = [(text, STYLES.get(style, "")) for text, style in line]
        console.print(Text.assemble(*segments), highlight=False, soft_wrap=True)


def text_of(lines: Iterable[Line]) -> str:
    """Lines without their styles."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines)


def lines_of(diagnosis: Diagnosis, width: int = WIDTH) -> Iterator[Line]:
    """The lines of a diagnosis with their styles."""
    for text in joined(heading(diagnosis), " · ", width):
        yield [(text, "label")]
    yield [(verdict_text(diagnosis), diagnosis.verdict)]
    for condition in diagnosis.conditions:
        yield from hanging("  → ", condition, width)
    for text in joined([f"{name} {number(value)}" for name, value in remarks(diagnosis)], "   ", width):
        yield [(text, "dim")]
    yield []
    yield from row_lines(rows_of(diagnosis), diagnosis, width)
    if diagnosis.findings:
        yield []
        yield from lines_of_findings(diagnosis.findings, width)


def lines_of_findings(findings: Sequence[Finding], width: int = WIDTH) -> Iterator[Line]:
    """All findings, numbered, with empty lines between them."""
    for count, finding in enumerate(findings, 1):
        if count > 1:
            yield []
        yield from finding_lines(count, finding, width)


def finding_lines(count: int, finding: Finding, width: int = WIDTH) -> Iterator[Line]:
    """One finding: level, rule and place, what and why, the source, the remedies."""
    start = f"{SYMBOLS[finding.level]}{count} "
    yield [(start, finding.level), (finding.level, finding.level), (f" · {finding.rule} · {finding.place}", "label")]
    indent = " " * len(start)
    yield from hanging(indent, finding.what, width)
    yield from hanging(indent, f"why: {finding.why}", width)
    yield from hanging(indent, f"source: {finding.source}", width, "dim")
    for remedy in finding.remedies:
        yield from hanging(f"{indent}→ ", str(remedy), width)


def wrapped(text: str, width: int) -> list[str]:
    """Text in lines that break between words; links stay whole."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def joined(parts: Iterable[str], separator: str, width: int) -> list[str]:
    """Parts in lines that break between parts.

    >>> joined(["one part", "another part"], " · ", 15)
    ['one part ·', 'another part']
    """
    unbroken = "\N{NO-BREAK SPACE}"
    text = separator.join(part.replace(" ", unbroken) for part in parts)
    return [line.replace(unbroken, " ") for line in wrapped(text, width)]


def hanging(start: str, text: str, width: int, style: str = "") -> Iterator[Line]:
    """Text behind a start, further lines indented as deep."""
    for count, line in enumerate(wrapped(text, width - len(start))):
        yield [((start if count == 0 else " " * len(start)) + line, style)]


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, what stands in it, where it stands, its style."""

    title: str
    cell: Callable[[Row], str]
    right: bool = False
    style: str = ""


def row_lines(rows: Sequence[Row], diagnosis: Diagnosis, width: int) -> Iterator[Line]:
    """The table of connections or layers, with folds."""
    if not rows:
        return
    columns = columns_of(rows, diagnosis)
    shown = folded(rows) if len(rows) > UNFOLDED else list(rows)
    present = [row for row in shown if isinstance(row, Row)]
    widths = [max(len(column.title), *(len(column.cell(row)) for row in present)) for column in columns]
    room = width - sum(widths[1:]) - 2 * (len(columns) - 1)
    widths[0] = min(widths[0], max(SHORTEST_NAME, room))
    yield [(f"{fitted(c.title, size, c.right)}  ", "label") for c, size in zip(columns, widths, strict=True)]
    for entry in shown:
        if isinstance(entry, Row):
            cells = zip(columns, widths, strict=True)
            yield [(f"{fitted(c.cell(entry), size, c.right)}  ", style_of(c, entry, diagnosis)) for c, size in cells]
        else:
            yield [(fold_text(entry, diagnosis), "dim")]


def columns_of(rows: Sequence[Row], diagnosis: Diagnosis) -> list[Column]:
    """The columns that this network's rows need."""
    connected = rows[0].form != "layer"
    forward, backward = bars([row.forward for row in rows]), bars([row.backward for row in rows])
    columns = [Column("connection" if connected else "layer", lambda row: row.name)]
    if connected:
        columns += [
            Column("branch", lambda row: row.form),
            Column("norm", lambda row: row.norms),
            Column("|F|/|x|", lambda row: short(row.ratio), right=True),
        ]
    return [
        *columns,
        Column("|y|" if connected else "std", lambda row: short(row.forward), right=True),
        Column("forward", lambda row: forward(row.forward), style="forward"),
        Column("|∂L/∂y|", lambda row: short(row.backward), right=True),
        Column("backward", lambda row: backward(row.backward), style="backward"),
        Column("distinct", lambda row: short(row.distinct), right=True),
        Column("", lambda row: marks_text(row, diagnosis.findings), style="mark"),
    ]


def marks_text(row: Row, findings: Sequence[Finding]) -> str:
    """The marks of the findings that point to a row, the worst two."""
    text = "".join(f"{SYMBOLS[findings[mark - 1].level]}{mark}" for mark in row.marks[:2])
    return text + ("…" if len(row.marks) > 2 else "")


def style_of(column: Column, row: Row, diagnosis: Diagnosis) -> str:
    """A column's own style; marks, and the names that they stand at, in that of the worst finding."""
    if row.marks and (column.style == "mark" or column.title in ("connection", "layer")):
        return min((diagnosis.findings[mark - 1].level for mark in row.marks), key=LEVELS.index)
    return column.style


def bars(values: Sequence[float], size: int = 8) -> Callable[[float], str]:
    """A function from a value to its bar, on the logarithmic scale of all values.

    >>> draw = bars([1.0, 10.0, 100.0], size=4)
    >>> draw(1.0), draw(10.0), draw(100.0), draw(0.0), draw(math.inf), draw(math.nan)
    ('▎   ', '██▏ ', '████', '0   ', 'inf ', '–   ')
    """
    finite = [value for value in values if 0 < value < math.inf]
    high = max(finite, default=1.0)
    low = min([*finite, high / LEAST_SPAN])
    step = 1 / (4 * size)

    def draw(value: float) -> str:
        if not 0 < value < math.inf:
            return f"{'–' if math.isnan(value) else number(value):<{size}}"
        share = step + (1 - step) * math.log(value / low) / math.log(high / low)
        whole, part = divmod(round(8 * size * share), 8)
        return f"{'█' * whole}{BLOCKS[part] if part else ''}"[:size].ljust(size)

    return draw


def short(value: float) -> str:
    """A number in seven characters at most; what was not measured is a dash.

    >>> short(0.0123456), short(1234567.0), short(math.nan), short(math.inf)
    ('0.0123', '1.2e+06', '–', 'inf')
    """
    if math.isnan(value):
        return "–"
    text = number(value)
    return f"{value:.1e}" if len(text) > 7 else text


def fitted(text: str, size: int, right: bool = False) -> str:
    """Text at a width; what is too long loses its middle.

    >>> fitted("stages.0", 10), fitted("encoder.layers.encoder_layer_11", 16)
    ('stages.0  ', 'encoder…layer_11')
    """
    if len(text) > size:
        tail = size // 2
        text = f"{text[: size - tail - 1]}…{text[-tail:]}"
    return text.rjust(size) if right else text.ljust(size)


def folded(rows: Sequence[Row]) -> list[Row | list[Row]]:
    """Rows, folded into lists along stretches at which the same findings point.

    First and last of a stretch stay, and about a dozen in all, so that the bars still show the signal's course.
    """
    step = max(SHORTEST_FOLD + 1, math.ceil(len(rows) / FOLDS))
    shown: list[Row | list[Row]] = []
    for _, group in groupby(rows, key=lambda row: row.marks):
        stretch = list(group)
        folds = max(1, (len(stretch) - 1) // step)
        kept = sorted({round(fold * (len(stretch) - 1) / folds) for fold in range(folds + 1)})
        for start, stop in zip(kept, [*kept[1:], len(stretch)], strict=True):
            inside = stretch[start + 1 : stop]
            shown += [stretch[start], inside] if len(inside) >= SHORTEST_FOLD else [stretch[start], *inside]
    return shown


def fold_text(hidden: Sequence[Row], diagnosis: Diagnosis) -> str:
    """What a fold hides: how many rows, and between what their sizes lie."""
    parts = [f"… {len(hidden)} alike"]
    for name, values in (
        ("|F|/|x|", [row.ratio for row in hidden]),
        ("|y|", [row.forward for row in hidden]),
        ("|∂L/∂y|", [row.backward for row in hidden]),
    ):
        known = [value for value in values if not math.isnan(value)]
        if known:
            parts.append(f"{name} {short(min(known))} to {short(max(known))}")
    marks = marks_text(hidden[0], diagnosis.findings)
    return ", ".join(parts) + (f"  {marks}" if marks else "")


def treatment_lines(treatment: Treatment, width: int = WIDTH) -> Iterator[Line]:
    """The lines of a treatment with their styles."""
    before, after = treatment.before, treatment.after
    model = type(before.subject.model).__name__
    yield [(f"{model}, what was done:", "label")]
    for remedy in treatment.applied:
        yield from hanging("  → ", str(remedy), width)
    yield []
    rows = comparison(before, after)
    first = max(len(name) for name, _, _ in rows) + 2
    second = min(max(len(old) for _, old, _ in rows) + 2, (width - first) // 2)
    yield [(" " * first, ""), (f"{'before':<{second}}after", "label")]
    for name, old, new in rows:
        styles = (before.verdict, after.verdict) if name == "verdict" else ("", "")
        yield [
            (f"{name:<{first}}", "label" if name == "verdict" else ""),
            (fitted(old, second - 2) + "  ", styles[0]),
            (fitted(new, width - first - second).rstrip(), styles[1]),
        ]
    for finding in after.findings:
        if finding.level != "note":
            yield []
            yield from finding_lines(after.findings.index(finding) + 1, finding, width)


def comparison(before: Diagnosis, after: Diagnosis) -> list[tuple[str, str, str]]:
    """What stands side by side: name, before, after; what neither has is left out."""
    lines: list[tuple[str, Callable[[Diagnosis], str]]] = [
        ("verdict", lambda diagnosis: diagnosis.verdict),
        ("on condition", lambda diagnosis: "; ".join(diagnosis.conditions)),
        ("training", lambda diagnosis: str(diagnosis.settings)),
        ("loss", lambda diagnosis: number(diagnosis.measurement.loss)),
        ("|∇ loss|", lambda diagnosis: number(diagnosis.measurement.gradient)),
        ("stream, first → last", lambda diagnosis: ends([row.forward for row in rows_of(diagnosis)])),
        ("gradient, first → last", lambda diagnosis: ends([row.backward for row in rows_of(diagnosis)])),
        ("distinct outputs", lambda diagnosis: number(diagnosis.measurement.distinct)),
        ("loss, some steps ahead", ahead_text),
        ("worst findings", lambda diagnosis: ", ".join(worst(diagnosis)) or "none"),
    ]
    found = [(name, say(before), say(after)) for name, say in lines]
    return [(name, old or "–", new or "–") for name, old, new in found if old or new]


def ends(values: Sequence[float]) -> str:
    """The first and the last value that were measured."""
    known = [value for value in values if not math.isnan(value)]
    return f"{number(known[0])} → {number(known[-1])}" if known else ""


def ahead_text(diagnosis: Diagnosis) -> str:
    """The losses of the first steps, the first and the last."""
    ahead = diagnosis.measurement.ahead
    return "" if ahead is None else f"{number(ahead.losses[0])} → {number(ahead.losses[-1])}"


def worst(diagnosis: Diagnosis) -> list[str]:
    """The rules of the worst level that was found, notes aside."""
    serious = [finding for finding in diagnosis.findings if finding.level != "note"]
    return list(dict.fromkeys(finding.rule for finding in serious if finding.level == serious[0].level))
