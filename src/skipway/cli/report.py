"""`skipway report`."""

from __future__ import annotations

import sys
from pathlib import Path

from skipway.errors import SkipwayError, printable

__all__ = ["report"]


def report(folder: Path = Path("studies"), /) -> int:
    """Write the page of every study in a folder, and index.html.

    Also merges the tables that the jobs of an array wrote.

    Args:
        folder: Output folder of skipway study.
    """
    from skipway.studies.index import write_index
    from skipway.studies.study import studies
    from skipway.studies.table import parts_of

    if not folder.is_dir():
        raise SkipwayError(f"{folder} is not a folder; skipway study all --out {folder} creates it")
    own = folder / "report.html"
    if not any(parts_of(folder, name) for name in studies()) and own.exists():
        raise SkipwayError(
            f"{printable(folder)} holds no table of a study; its report is there already, as the training or diagnosis "
            f"wrote it: open {printable(own)} in a browser"
        )
    if not any(parts_of(folder, name) for name in studies()):
        raise SkipwayError(
            f"{printable(folder)} holds no table of a study, so nothing is written there; the rule is a folder of "
            "skipway study all --out FOLDER"
        )
    index, pages = write_index(folder)
    for page in pages:
        sys.stdout.write(f"page   {page}\n")
    sys.stdout.write(f"index  {index}\n")
    return 0
