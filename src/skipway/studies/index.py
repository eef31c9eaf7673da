"""The index page of the studies in a folder."""

from __future__ import annotations

from pathlib import Path

from skipway.report.page import write_page
from skipway.studies.page import measured_rows, shown_verdicts, write_study_page
from skipway.studies.runner import read_rows
from skipway.studies.study import Study, studies
from skipway.studies.table import StudyTable, parts_of

__all__ = ["merge_shares", "write_index"]


def write_index(folder: Path) -> tuple[Path, list[Path]]:
    """Merge the shares of job arrays, and write the page of every study with rows and `index.html`.

    Returns:
        paths of the index and of the pages.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pages, entries = [], []
    for study in studies().values():
        merge_shares(folder, study)
        path = write_study_page(study, folder)
        if path is not None:
            rows = read_rows(folder, study)
            measured = measured_rows(rows)
            entries.append(
                {
                    "study": study,
                    "cells": len(rows),
                    "verdicts": shown_verdicts(study.conclude(measured)),
                    "figure": next(iter(study.figures(measured)), None),
                }
            )
            pages.append(path)
    command = f"skipway report {folder.name}"
    return write_page(folder / "index.html", "index.html.j2", title="Studies", command=command, entries=entries), pages


def merge_shares(folder: Path, study: Study) -> None:
    """Merge the tables of a job array into one; the shares are kept, since a job may still be writing to one."""
    if any(path.name != f"{study.name}.csv" for path in parts_of(folder, study.name)):
        StudyTable(folder / f"{study.name}.csv", study.settings).rewrite(read_rows(folder, study))
