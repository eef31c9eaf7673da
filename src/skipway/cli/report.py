"""`skipway report`."""

from __future__ import annotations

import sys
from pathlib import Path

from skipway.errors import SkipwayError

__all__ = ["report"]


def report(folder: Path = Path("studies"), /) -> int:
    """Write the page of every study in a folder, and index.html.

    Also merges the tables that the jobs of an array wrote.

    Args:
        folder: Output folder of skipway study.
    """
    from skipway.studies.index import write_index

    if not folder.is_dir():
        raise SkipwayError(f"{folder} is not a folder; skipway study all --out {folder} creates it")
    index, pages = write_index(folder)
    for page in pages:
        sys.stdout.write(f"page   {page}\n")
    sys.stdout.write(f"index  {index}\n")
    return 0
