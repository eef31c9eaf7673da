"""The index page of the studies in a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from markupsafe import Markup

from skipway.errors import counted
from skipway.report.page import PageTable, TableCell, number_cell, text_cell, write_page
from skipway.studies.grid import describe_others, judge, split_by_grid
from skipway.studies.page import score_text, shown_verdicts, write_study_page
from skipway.studies.runner import read_rows
from skipway.studies.study import Answer, Study, Verdict, studies
from skipway.studies.table import StudyTable, parts_of

__all__ = ["merge_shares", "write_index"]


def write_index(folder: Path) -> tuple[Path, list[Path]]:
    """Merge the shares of job arrays, and write the page of every study with rows and `index.html`.

    Returns:
        paths of the index and of the pages.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pages, entries, lines = [], [], []
    verdicts: list[Verdict] = []
    for study in studies().values():
        merge_shares(folder, study)
        parts = split_by_grid(study, read_rows(folder, study))
        path = write_study_page(study, folder, parts)
        if path is not None:
            judged = parts[0]
            found = judge(study, judged.measured, judged.gap)
            verdicts += found
            lines.append(overview_row(study, found, len(judged.rows)))
            entries.append(
                {
                    "study": study,
                    "cells": len(judged.rows),
                    "verdicts": shown_verdicts(found),
                    "gap": "" if judged.gap is None else judged.gap.text,
                    "others": describe_others(parts),
                    "figure": next(iter(study.figures(judged.measured)), None),
                }
            )
            pages.append(path)
    command = f"skipway report {folder.name}"
    overview = PageTable(["study", *get_args(Answer), "cells"], lines)
    title, score = counted(len(entries), "study", "studies"), score_text(verdicts)
    values = {"title": title, "score": score, "command": command, "entries": entries, "overview": overview}
    return write_page(folder / "index.html", "index.html.j2", **values), pages


def overview_row(study: Study, verdicts: Sequence[Verdict], cells: int) -> list[TableCell]:
    """Return the number of claims with each answer."""
    link = Markup('<a href="#{}">{}</a>').format(study.name, study.title)
    counts = Counter(each.answer for each in verdicts)
    numbers = [number_cell(counts[answer], str(counts[answer] or "")) for answer in get_args(Answer)]
    return [text_cell(link, study.title), *numbers, number_cell(cells, f"{cells:,}")]


def merge_shares(folder: Path, study: Study) -> None:
    """Merge the tables of a job array into one; the shares are kept, since a job may still be writing to one."""
    if any(path.name != f"{study.name}.csv" for path in parts_of(folder, study.name)):
        StudyTable(folder / f"{study.name}.csv", study.settings).rewrite(read_rows(folder, study))
