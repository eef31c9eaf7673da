"""The page of a study: verdicts, figures, published numbers beside ours, means with their spread, every row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from skipway._version import __version__
from skipway.checkpoint.files import write_atomically
from skipway.report.figure import Figure, Sample, grouped, number
from skipway.report.sheet import definitions, document, size_cell, word_cell
from skipway.report.svg import colour_rules, kinds_of, picture, svg_file
from skipway.studies.cell import Budget, Choices, Row, Value
from skipway.studies.runner import read_rows
from skipway.studies.study import Study, Verdict

__all__ = ["KINDS", "STYLE", "answers", "sound", "write_page"]

STYLE = """
.verdict { margin: .6rem 0; padding: .7rem 1rem; border-radius: .5rem; border-left: .4rem solid; }
.verdict p { color: var(--ink); } .verdict .soft { color: var(--soft); }
.verdict.holds { background: var(--good-paper); color: var(--good); }
.verdict.when { background: var(--fair-paper); color: var(--fair); }
.verdict.fails { background: var(--bad-paper); color: var(--bad); }
.verdict.open { background: var(--card); color: var(--soft); }
.answers { list-style: none; padding: 0; margin: .8rem 0; }
.answers li { display: grid; grid-template-columns: 9.5rem minmax(0, 1fr); gap: .2rem .6rem; margin: .35rem 0; }
.answer { font-weight: 700; } .answer.holds { color: var(--good); } .answer.when { color: var(--fair); }
.answer.fails { color: var(--bad); } .answer.open { color: var(--soft); }
@media (max-width: 32rem) { .answers li { grid-template-columns: minmax(0, 1fr); gap: 0; } }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.6rem; }
figure { margin: 0; min-width: 0; } figcaption { margin-bottom: .3rem; } figcaption b { display: block; }
.keys { display: flex; flex-wrap: wrap; gap: .1rem .8rem; font-size: .82rem; margin-top: .2rem; }
button.key { all: unset; cursor: pointer; color: var(--soft); line-height: 1.5; }
button.key::before { content: ""; display: inline-block; width: .8rem; height: .55rem; margin-right: .3rem;
  border-radius: 2px; background: var(--kind); } button.key:focus-visible { outline: 2px solid var(--stream); }
button.key[aria-pressed="false"] { opacity: .4; text-decoration: line-through; }
svg .off { display: none; } svg .near { stroke: var(--ink); stroke-width: 2; }
.reading { display: block; min-height: 1.3em; font-size: .82rem; }
.note { font-size: .82rem; color: var(--soft); } code { font-size: .82rem; overflow-wrap: anywhere; }
code, pre { background: var(--card); border-radius: .25rem; padding: .1rem .3rem; }
pre { padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; }
summary { cursor: pointer; color: var(--soft); margin: .6rem 0; }
td.words { white-space: normal; min-width: 9rem; }
@media (max-width: 32rem) { th, td { padding: .25rem .35rem; } }
""" + colour_rules()
# the value nearest to the pointer is read out below the figure; a press on a name hides and shows its lines
SCRIPT = """
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg"), out = figure.querySelector(".reading"), rest = out.textContent;
  const marks = [...svg.querySelectorAll("[data-x]")];
  const read = (event) => {
    const box = svg.getBoundingClientRect(), unit = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * unit, y = (event.clientY - box.top) * unit;
    let best = null, least = 40 ** 2;
    for (const mark of marks) {
      if (mark.parentElement.classList.contains("off")) continue;
      const distance = (mark.dataset.x - x) ** 2 + (mark.dataset.y - y) ** 2;
      if (distance < least) [least, best] = [distance, mark];
    }
    for (const mark of marks) mark.classList.toggle("near", mark === best);
    out.textContent = best ? best.querySelector("title").textContent : rest;
  };
  svg.addEventListener("pointermove", read);
  svg.addEventListener("pointerdown", read);
  for (const key of figure.querySelectorAll("button.key")) key.addEventListener("click", () => {
    const shown = key.ariaPressed !== "true";
    key.ariaPressed = String(shown);
    for (const line of svg.querySelectorAll(`g.${key.dataset.kind}`)) line.classList.toggle("off", !shown);
  });
}
"""
KINDS = {"holds": "holds", "does not hold": "fails", "holds only when": "when", "open": "open"}
# columns of a row that say where it was measured, not what
ABOUT = frozenset(
    ("study", "key", "error", "seconds", "budget", "date", "device", "machine", "skipway", "torch", "python", "losses")
)


def write_page(study: Study, folder: Path) -> Path | None:
    """Write `NAME.html` and a file `NAME-FIGURE.svg` for each figure into `folder`, from its tables.

    Returns:
        the page; None where nothing is measured yet.
    """
    rows = read_rows(folder, study)
    if not rows:
        return None
    figures = study.figures(sound(rows))
    path = folder / f"{study.name}.html"
    for figure in figures:
        content = svg_file(figure).encode("utf-8", "backslashreplace")
        write_atomically(
            folder / f"{study.name}-{figure.name}.svg", lambda aside, content=content: aside.write_bytes(content)
        )
    content = page(study, rows, figures).encode("utf-8", "backslashreplace")
    write_atomically(path, lambda aside: aside.write_bytes(content))
    return path


def sound(rows: Sequence[Row]) -> list[Row]:
    """The rows without an error."""
    return [row for row in rows if not row.get("error")]


def page(study: Study, rows: Sequence[Row], figures: Sequence[Figure]) -> str:
    """The page as text."""
    fine = sound(rows)
    command, verdicts = command_for(study, rows), study.conclude(fine)
    parts = [
        f"<h1>{escape(study.title)}</h1>",
        f'<p>{escape(study.claim)}</p><p class="soft">{escape(study.source)}</p>',
        *answers(verdicts),
        '<h2>Figures</h2><div class="figures">',
        *(drawn(figure, command, study.name) for figure in figures),
        "</div>",
        '<p class="note">A mark is the mean over the seeds, the bar their range.</p>',
        "<h2>Verdicts in numbers</h2>",
        *(banner(verdict) for verdict in verdicts),
        *summary(study, fine),
        *published(study, fine),
        *means(study, fine),
        *failed(rows),
        "<h2>How it was measured</h2>",
        definitions(about(rows)),
        f"<pre>{escape(study.opening())}</pre>",
        *every_row(study, rows),
        f'<footer>Skipway {escape(__version__)} · <a href="index.html">all studies</a></footer>',
    ]
    return document(study.title, parts, style=STYLE, script=SCRIPT)


def answers(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The verdicts, a line each."""
    yield '<ul class="answers">'
    for verdict in verdicts:
        yield (
            f'<li><span class="answer {KINDS[verdict.answer]}">{escape(verdict.answer)}</span>'
            f"<span>{escape(verdict.claim)}{condition(verdict)}</span></li>"
        )
    yield "</ul>"


def condition(verdict: Verdict) -> str:
    """Of a claim that holds only sometimes, when."""
    if verdict.answer != "holds only when":
        return ""
    return f' <span class="soft">Only when {escape(verdict.text.partition(". ")[0])}.</span>'


def banner(verdict: Verdict) -> str:
    """A claim with its verdict."""
    return (
        f'<div class="verdict {KINDS[verdict.answer]}"><strong>{escape(verdict.answer)}</strong>'
        f'<p>{escape(verdict.claim)}</p><p class="soft">{escape(verdict.text)}</p></div>'
    )


def command_for(study: Study, rows: Sequence[Row]) -> str:
    """The command that measures these rows: the budget's grid, with options where other depths or seeds were asked."""
    budgets: tuple[Budget, ...] = ("cpu", "gpu", "paper")
    budget: Budget = next((each for each in budgets if rows[-1].get("budget") == each), "cpu")
    data = next((str(row["data"]) for row in rows if row.get("data")), None)
    own = {cell.key for cell in study.cells(budget, Choices(data=data))}
    choices = Choices(data=data)
    if {row["key"] for row in rows} != own:
        choices = Choices(depths=whole(rows, "depth"), seeds=whole(rows, "seed"), data=data)
    return f"skipway study {study.name} --budget {budget}{choices.options()}"


def whole(rows: Sequence[Row], name: str) -> tuple[int, ...] | None:
    """The whole numbers in a column, in order; None where there are none."""
    found = sorted({value for row in rows if isinstance(value := row.get(name), int)})
    return tuple(found) or None


def drawn(figure: Figure, command: str, study: str) -> str:
    """A figure with its legend, the command that makes it, and its file."""
    keys = "".join(
        f'<button type="button" class="key {kind}" data-kind="{kind}" aria-pressed="true">{escape(name)}</button>'
        for name, kind in kinds_of(figure).items()
    )
    note = f'<p class="note">{escape(figure.note)}</p>' if figure.note else ""
    up = "" if figure.up.lower() in figure.title.lower() else escape(figure.up)
    file = escape(f"{study}-{figure.name}")
    return (
        f'<figure id="{escape(figure.name)}"><figcaption><b>{escape(figure.title)}</b>'
        f'<span class="note">{up}</span><span class="keys">{keys}</span></figcaption>'
        f'{picture(figure)}<output class="reading"></output>{note}'
        f'<p class="note"><code>{escape(command)}</code> · <a href="{file}.svg">SVG</a></p></figure>'
    )


def summary(study: Study, rows: Sequence[Row]) -> Iterator[str]:
    """The study's own table, if it has one."""
    lines = study.summary(rows)
    if not lines:
        return
    yield '<h2>In one table</h2><div class="scroll"><table><thead><tr>'
    columns = list(dict.fromkeys(name for line in lines for name in line))
    for name in columns:
        kind = "number" if all(is_number(line.get(name)) or line.get(name) is None for line in lines) else ""
        yield f'<th class="{kind}"><button type="button">{escape(name)}</button></th>'
    yield "</tr></thead><tbody>"
    for line in lines:
        yield f"<tr>{''.join(cell(line.get(name)) for name in columns)}</tr>"
    yield "</tbody></table></div>"


def published(study: Study, rows: Sequence[Row]) -> Iterator[str]:
    """Published numbers beside ours."""
    if not study.published:
        return
    yield "<h2>Published and ours</h2>"
    yield '<div class="scroll"><table><thead><tr>'
    for title in ("what", "published", "ours", "difference", "source"):
        kind = "" if title in ("what", "source") else "number"
        yield f'<th class="{kind}"><button type="button">{title}</button></th>'
    yield "</tr></thead><tbody>"
    missing = False
    for each in study.published:
        ours = each.ours(rows)
        missing |= ours is None
        mean, off = (ours.mean, ours.mean - each.value) if ours else (float("nan"), float("nan"))
        yield (
            f'<tr><td class="words" data-value="{escape(each.what)}">{escape(each.what)}</td>'
            + size_cell(each.value, number(each.value))
            + size_cell(mean, ours.text() if ours else "—")
            + size_cell(off, f"{off:+.3g}" if ours else "—")
            + f"{word_cell(escape(each.source), each.source)}</tr>"
        )
    yield "</tbody></table></div>"
    if missing:
        yield '<p class="note">— not measured here: the published number is about other data or another size.</p>'


def means(study: Study, rows: Sequence[Row]) -> Iterator[str]:
    """The results of each setting, mean and standard deviation over its seeds."""
    by = [name for name in study.settings if name != "seed" and len({row.get(name) for row in rows}) > 1]
    values = [name for name in study.results if any(is_number(row.get(name)) for row in rows)]
    samples = {name: grouped(rows, by, name) for name in values}
    flags = [name for name in values if all(isinstance(row.get(name), bool | type(None)) for row in rows)]
    yield "<h2>Means and spread</h2>"
    yield '<div class="scroll"><table><thead><tr>'
    for name in (*by, *values):
        kind = "number" if all(is_number(row.get(name)) or row.get(name) is None for row in rows) else ""
        yield f'<th class="{kind}"><button type="button">{escape(name.replace("_", " "))}</button></th>'
    yield "</tr></thead><tbody>"
    keys = {tuple(row.get(name) for name in by) for row in rows}
    for key in sorted(
        keys, key=lambda key: [(isinstance(value, str), is_number(value) and value, str(value)) for value in key]
    ):
        cells = [cell(value) for value in key] + [sample_cell(samples[name].get(key), name in flags) for name in values]
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"


def is_number(value: Value) -> bool:
    """Whether there is something to take a mean of."""
    return isinstance(value, int | float)


def sample_cell(sample: Sample | None, flag: bool) -> str:
    """A mean with its standard deviation; of a yes or no, how often it was yes."""
    if flag and sample is not None:
        return size_cell(sample.mean, f"{sum(sample.values):.0f} of {len(sample.values)}")
    return size_cell(float("nan"), "") if sample is None else size_cell(sample.mean, sample.text().partition(" (")[0])


def cell(value: Value) -> str:
    """A cell with a value."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return size_cell(value, number(value) if isinstance(value, float) else str(value))
    text = "" if value is None else str(value)
    return word_cell(escape(text), text)


def failed(rows: Sequence[Row]) -> Iterator[str]:
    """The cells that could not be measured."""
    broken = [row for row in rows if row.get("error")]
    if not broken:
        return
    yield "<h2>Failed cells</h2><ul>"
    for row in broken:
        yield f"<li><code>--cell {escape(str(row['key']))}</code> {escape(str(row['error']))}</li>"
    yield "</ul>"


def about(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """How many cells, when, where."""
    seconds = sum(float(row.get("seconds") or 0) for row in rows)
    named = [
        (name, ", ".join(dict.fromkeys(str(row[key]) for row in rows if row.get(key) is not None)))
        for name, key in (
            ("budget", "budget"),
            ("date", "date"),
            ("device", "device"),
            ("machine", "machine"),
            ("data", "dataset"),
            ("torch", "torch"),
        )
    ]
    seeds = len({row.get("seed") for row in rows})
    times = f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
    return [
        ("cells", f"{len(rows):,}"),
        ("seeds", str(seeds)),
        ("time of all cells", times),
        *((name, text) for name, text in named if text),
    ]


def every_row(study: Study, rows: Sequence[Row]) -> Iterator[str]:
    """All rows; where they are many, in the table beside the page only."""
    most = 400
    yield f"<details><summary>All {len(rows):,} rows</summary>"
    yield f'<p class="note">One again: <code>skipway study {study.name} --cell KEY</code> · '
    yield f'<a href="{escape(study.name)}.csv">the table</a></p>'
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ABOUT]
    shown = [name for name in names if len({row.get(name) for row in rows}) > 1]
    yield '<div class="scroll"><table><thead><tr>'
    for name in ("key", *shown, "seconds"):
        yield f'<th><button type="button">{escape(name.replace("_", " "))}</button></th>'
    yield "</tr></thead><tbody>"
    for row in rows[:most]:
        yield f"<tr>{''.join(cell(row.get(name)) for name in ('key', *shown, 'seconds'))}</tr>"
    yield "</tbody></table></div>"
    if len(rows) > most:
        yield f'<p class="note">The first {most}; all are in the table.</p>'
    yield "</details>"
