"""The page of a diagnosis or treatment: verdict, findings, signal by depth, connections, other additions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from markupsafe import Markup

from skipway.diagnosis import Diagnosis, Finding, Treatment
from skipway.diagnosis.diagnosis import summary_of
from skipway.diagnosis.findings import Verdict, format_number, format_share
from skipway.diagnosis.rows import SignalRow
from skipway.diagnosis.subject import Subject
from skipway.diagnosis.table import SYMBOLS, compact, marks_text, offer_lines, verdict_sentence
from skipway.errors import SkipwayError, counted
from skipway.nn import StreamEntry
from skipway.probes.stream_health import stream_health
from skipway.report.chart import Band, Figure, Point, Series
from skipway.report.mixing_matrix import measured_mixing
from skipway.report.page import PageTable, TableCell, number_cell, render, text_cell
from skipway.tracing.residual_adds import REASONS

__all__ = ["bands_of", "diagnosis_figures", "diagnosis_page", "trial_figures"]

MOST_OWNERS = 8
COLORS: dict[Verdict, str] = {"trains": "good", "undecided": "fair", "will not train": "bad"}


def diagnosis_page(shown: Diagnosis | Treatment, command: str = "", name: str = "") -> str:
    """Render the page of a diagnosis, or of a treatment with the diagnoses before and after, as text.

    Args:
        shown: result of `skipway.diagnose` or of `Diagnosis.fix`.
        command: command line that produced it, shown in the footer.
        name: of what was asked about, for the title; empty for the network's class.
    """
    treatment = shown if isinstance(shown, Treatment) else None
    diagnosis = treatment.after if treatment else shown
    assert isinstance(diagnosis, Diagnosis)
    figures = diagnosis_figures(diagnosis)
    figures_before = diagnosis_figures(treatment.before) if treatment else []
    subject = diagnosis.subject
    mixing, no_mixing = measured_mixing(subject.model, len(subject.chain), *subject.probed_part, loss=subject.loss)
    before = treatment.before if treatment else diagnosis
    kind = type(before.subject.model).__name__
    ahead = diagnosis.measurement.ahead
    numbers = [*diagnosis.key_numbers]
    if ahead is not None:
        steps = counted(len(ahead.losses) - 1, "step")
        numbers.append((f"loss after {steps} of {diagnosis.settings.optimizer}", ahead.losses[-1]))
    return render(
        "diagnosis.html.j2",
        title=name or kind,
        heading=before.heading if name else before.heading[1:],
        command=command,
        diagnosis=diagnosis,
        treatment=treatment,
        comparison=comparison_table(treatment) if treatment else None,
        color="fair" if treatment and treatment.before.verdict != diagnosis.verdict else COLORS[diagnosis.verdict],
        sentence=treatment_sentence(treatment) if treatment else verdict_sentence(diagnosis.verdict, diagnosis.grounds),
        meaning=meaning_of(diagnosis),
        offers=[] if treatment else offer_lines(diagnosis.offers, diagnosis.odds),
        trial=trial_figures(diagnosis, treatment.before if treatment else None),
        key_numbers=[(name, format_number(value)) for name, value in numbers],
        symbols=SYMBOLS,
        evidence=evidence_of,
        figures=figures,
        figures_before=figures_before,
        mixing=mixing,
        no_mixing=no_mixing if subject.chain else "",
        streams=streams_text(diagnosis.subject),
        note=chart_note(figures),
        note_before=chart_note(figures_before),
        thing="Connections" if diagnosis.measurement.connections else "Layers",
        rows=row_table(diagnosis) if diagnosis.rows else None,
        refused=list(refusals(diagnosis)),
    )


def meaning_of(diagnosis: Diagnosis) -> str:
    """Say what the odds are the odds of."""
    share = format_share(diagnosis.odds).replace("below", "fewer than").replace("above", "more than")
    learns = "at least half-way from the loss of the best constant answer to what a good recipe reaches"
    return f"Of trainings that begin like this one, {share} are expected to learn: to come {learns}."


def trial_figures(diagnosis: Diagnosis, before: Diagnosis | None = None) -> list[Figure]:
    """Return the losses of the trial steps beside that of the best constant answer; of a treatment both looks."""
    looks = {"as planned" if before is None else "with the remedies": diagnosis.measurement.ahead}
    if before is not None:
        looks = {"as it was": before.measurement.ahead, **looks}
    known = {name: ahead for name, ahead in looks.items() if ahead is not None and len(ahead.losses) > 1}
    if not known:
        return []
    end = max(len(ahead.losses) for ahead in known.values())
    series = [Series.of(name, enumerate(ahead.losses, 1)) for name, ahead in known.items()]
    constant = next((ahead.constant for ahead in reversed(known.values()) if ahead.constant is not None), None)
    if constant is not None:
        series.append(Series.of("best constant answer", [(1, constant), (end, constant)], "theory"))
    fresh = all(ahead.fresh for ahead in known.values())
    batches = "Every step took a fresh batch." if fresh else "The steps took turns on the parts of one batch."
    return [
        Figure(
            name="trial",
            title="Loss of each trial step",
            x_label="step of the planned training",
            y_label="loss",
            series=tuple(series),
            span=(1, max(end, 2)),
            log_y=None,
            note=f"{batches} A network that learns falls below the best constant answer, which ignores the input."
            if constant is not None
            else batches,
        )
    ]


def streams_text(subject: Subject) -> str:
    """Return the table of several streams of a diagnosed network; empty where it carries one."""
    ours = any(isinstance(module, StreamEntry) for module in subject.model.modules())
    if not ours and all(connection.seen.streams is None for connection in subject.chain):
        return ""
    try:
        return str(stream_health(subject.model, subject.probed_part[0]))
    except SkipwayError:
        return ""


def treatment_sentence(treatment: Treatment) -> str:
    """Return the headline of a treatment: the verdict before, and the one after the remedies."""
    before, after = treatment.before.verdict, treatment.after.verdict
    still = "still " if before == after else ""
    first: dict[Verdict, str] = {
        "trains": "trains",
        "will not train": "will not train",
        "undecided": "may or may not train",
    }
    last: dict[Verdict, str] = {
        "trains": f"{still}trains.",
        "will not train": f"{still}will not train.",
        "undecided": f"{still}may or may not train.",
    }
    return f"As it is, the network {first[before]}. With the remedies below it {last[after]}"


def chart_note(figures: Sequence[Figure]) -> str:
    """Explain the shading and the hollow markers of figures, where there are any."""
    parts = ["Shaded: rows that a finding refers to, with its number."] if any(each.bands for each in figures) else []
    outside = {side for each in figures for side in each.outside}
    sides = {"below": "below the axis, 0 or too small for it", "above": "above the axis, infinite"}
    if outside:
        parts.append(f"Hollow: {'; or '.join(sides[side] for side in sides if side in outside)}.")
    return " ".join(parts)


def evidence_of(finding: Finding) -> list[tuple[str, str]]:
    """Return the names and formatted numbers of a finding's evidence."""
    return [(name, format_number(value)) for name, value in finding.evidence.items()]


def comparison_table(treatment: Treatment) -> PageTable:
    """Build the table of verdict and key numbers before and after a treatment."""
    before, after = ({"verdict": each.verdict, **summary_of(each)} for each in (treatment.before, treatment.after))
    names = [name for name in before if before[name] or after[name]]
    return PageTable(
        ["", "before", "after"], [[text_cell(n), text_cell(before[n]), text_cell(after[n])] for n in names]
    )


def diagnosis_figures(diagnosis: Diagnosis) -> list[Figure]:
    """Return the figures of signal, gradient and distinctness of samples by depth, with the rows of findings shaded."""
    rows = diagnosis.rows
    if not rows:
        return []
    connected = bool(diagnosis.measurement.connections)
    forward = [signal_series("stream |y|" if connected else "output", rows, [row.forward for row in rows])]
    backward = [signal_series("|∂loss/∂y|" if connected else "gradient", rows, [row.backward for row in rows])]
    if connected:
        forward += branch_series("{} branch |F(x)|", rows, [row.branch for row in rows])
        backward += branch_series("through {} branch", rows, [row.through for row in rows])
    distinct = [signal_series("1 − cosine", rows, [row.distinct for row in rows])]
    size = "rms" if connected else "standard deviation"
    titles = f"Forward: signal, {size}", "Backward: gradient, rms", "Distinctness: 1 − cosine between samples"
    thing = "residual connection" if connected else "layer"
    figures = [
        Figure(
            name=name,
            title=title,
            x_label=f"{thing}, from input to output",
            series=tuple(series),
            log_y=True,
            span=(0.5, len(rows) + 0.5),
            categories=tuple(row.name or "the model" for row in rows),
            bands=tuple(bands_of(diagnosis)),
        )
        for name, title, series in zip(
            ("forward", "backward", "distinct"), titles, (forward, backward, distinct), strict=True
        )
    ]
    several = diagnosis.subject.stream_connections  # gradients at them may not be measured, as a remark says
    return [figure for figure in figures if figure.drawn or not several]


def signal_series(name: str, rows: Sequence[SignalRow], values: Sequence[float], kind: str = "") -> Series:
    """Return a series with a value for each row, or for each row whose branch is of the given kind."""
    pairs = enumerate(zip(rows, values, strict=True), 1)
    points = (Point(x, y, name=row.name) for x, (row, y) in pairs if not kind or row.form.split()[0] == kind)
    return Series(name, tuple(points))


def branch_series(name: str, rows: Sequence[SignalRow], values: Sequence[float]) -> Iterator[Series]:
    """Return one series per kind of branch, such as attention and mlp."""
    for kind in dict.fromkeys(row.form.split()[0] for row in rows):
        yield signal_series(name.format(kind), rows, values, kind)


def bands_of(diagnosis: Diagnosis) -> list[Band]:
    """Return the ranges of rows that findings refer to; findings about the whole network have none."""
    bands = []
    for number, finding in enumerate(diagnosis.findings, 1):
        places = [place for place, row in enumerate(diagnosis.rows, 1) if number in row.marks]
        start = 0
        for index, place in enumerate(places):
            if index + 1 == len(places) or places[index + 1] != place + 1:
                label = f"{number} {finding.rule}" if start == 0 else str(number)
                bands.append(Band(places[start], place, finding.level, label))
                start = index + 1
    return bands


def row_table(diagnosis: Diagnosis) -> PageTable:
    """Build the table of all connections, or of all layers if there are none."""
    connected = bool(diagnosis.measurement.connections)
    columns = ["name", "#", *(["branch", "norm", "|F|/|x|", "|F|"] if connected else [])]
    columns += ["|y|" if connected else "std", "|∂loss/∂y|", *(["through branch"] if connected else [])]
    rows = []
    for count, row in enumerate(diagnosis.rows, 1):
        sizes = [row.ratio, row.branch] if connected else []
        sizes += [row.forward, row.backward, *([row.through] if connected else []), row.distinct]
        cells = [text_cell(row.name or "the model"), number_cell(count, str(count))]
        cells += map(text_cell, [row.form, row.norms] if connected else [])
        cells += [number_cell(size, compact(size)) for size in sizes]
        rows.append([*cells, mark_cell(row, diagnosis.findings)])
    return PageTable([*columns, "distinct", "findings"], rows)


def mark_cell(row: SignalRow, findings: Sequence[Finding]) -> TableCell:
    """Return a cell with links to the findings that refer to a row."""
    links = [
        Markup('<a class="level {0}" href="#finding-{1}">{2}{1}</a>').format(level, mark, SYMBOLS[level])
        for mark in row.marks
        for level in [findings[mark - 1].level]
    ]
    return text_cell(Markup(" ").join(links), marks_text(row.marks, findings))


def refusals(diagnosis: Diagnosis) -> Iterator[tuple[str, str, str]]:
    """Return reason, number and modules of the additions that are not residual connections."""
    refused = diagnosis.chain.refused
    for reason, count in Counter(refusal.reason for refusal in refused).most_common():
        owners = list(dict.fromkeys(each.owner or "the model" for each in refused if each.reason == reason))
        more = f" and {len(owners) - MOST_OWNERS} more" if len(owners) > MOST_OWNERS else ""
        yield REASONS[reason], f"{count:,}", ", ".join(owners[:MOST_OWNERS]) + more
