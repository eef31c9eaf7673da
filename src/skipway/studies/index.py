"""The page over all studies of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from skipway._version import __version__
from skipway.checkpoint.files import write_atomically
from skipway.report.sheet import document
from skipway.report.svg import picture
from skipway.studies.page import STYLE, answers, sound, write_page
from skipway.studies.runner import read_rows
from skipway.studies.study import Study, studies
from skipway.studies.table import Table, parts_of

__all__ = ["merge_shares", "write_index"]

INDEX_STYLE = STYLE + (
    ".study { border-top: 1px solid var(--line); padding: 1rem 0; display: grid; gap: .4rem 1.4rem;"
    " grid-template-columns: minmax(0, 1fr) minmax(0, 20rem); } .study h2 { margin: 0 0 .3rem; }\n"
    "@media (max-width: 42rem) { .study { grid-template-columns: minmax(0, 1fr); } }\n"
)


def write_index(folder: Path) -> tuple[Path, list[Path]]:
    """Merge the shares of arrays, write the page of every study that has rows, and `index.html` over them.

    Returns:
        the index, and the pages.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pages, entries = [], []
    for study in studies().values():
        merge_shares(folder, study)
        path = write_page(study, folder)
        if path is not None:
            pages.append(path)
            entries += entry(study, folder)
    parts = [
        "<h1>Studies</h1>",
        "<p>What the literature says about residual learning, tested. Each claim with its verdict on our data; the "
        "numbers, their spread and the command behind every figure are on the study's page.</p>",
        *(entries or ["<p>Nothing is measured yet: <code>skipway study all</code></p>"]),
        f"<footer>Skipway {escape(__version__)}</footer>",
    ]
    content = document("Studies", parts, style=INDEX_STYLE).encode("utf-8", "backslashreplace")
    index = folder / "index.html"
    write_atomically(index, lambda aside: aside.write_bytes(content))
    return index, pages


def entry(study: Study, folder: Path) -> Iterator[str]:
    """A study in the index: its verdicts and its first figure."""
    rows = read_rows(folder, study)
    fine = sound(rows)
    yield f'<section class="study"><div><h2><a href="{escape(study.name)}.html">{escape(study.title)}</a></h2>'
    yield f'<p class="soft">{escape(study.source)} · {len(rows):,} cells</p>'
    yield from answers(study.conclude(fine))
    yield "</div><div>"
    figures = study.figures(fine)
    if figures:
        yield picture(figures[0])
        yield f'<p class="note">{escape(figures[0].title)}</p>'
    yield "</div></section>"


def merge_shares(folder: Path, study: Study) -> None:
    """Bring the tables of an array of jobs into one. The shares stay: a job may be writing to its own."""
    if any(path.name != f"{study.name}.csv" for path in parts_of(folder, study.name)):
        Table(folder / f"{study.name}.csv", study.settings).rewrite(read_rows(folder, study))
