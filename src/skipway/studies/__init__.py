"""Studies: tests of published claims about residual learning.

    rows = skipway.studies.run(skipway.studies.find_study("propagation"), Path("studies"))

A study is an instance of a subclass of `Study` in a module of `studies.catalogue`; no other module knows its name. The
names below are imported at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipway.studies.cell import Cell, Choices
    from skipway.studies.index import write_index
    from skipway.studies.page import write_study_page
    from skipway.studies.runner import run
    from skipway.studies.study import STUDIES, Published, Study, Verdict, find_study, studies
    from skipway.studies.table import StudyTable

HOMES = {
    "STUDIES": "study",
    "Cell": "cell",
    "Choices": "cell",
    "Published": "study",
    "Study": "study",
    "StudyTable": "table",
    "Verdict": "study",
    "find_study": "study",
    "run": "runner",
    "studies": "study",
    "write_index": "index",
    "write_study_page": "page",
}

__all__ = [
    "STUDIES",
    "Cell",
    "Choices",
    "Published",
    "Study",
    "StudyTable",
    "Verdict",
    "find_study",
    "run",
    "studies",
    "write_index",
    "write_study_page",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
