"""`save(diagnosis, "report.html")`: a result as a file of the kind that its ending says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from skipway.errors import SkipwayError

if TYPE_CHECKING:
    from skipway.diagnosis import Diagnosis

__all__ = ["ENDINGS", "save"]

PICTURES = (".png", ".svg", ".pdf")
ENDINGS = (".json", ".html", ".htm", *PICTURES)


def save(diagnosis: Diagnosis, path: str | Path) -> Path:
    """Write a diagnosis to a file: .json, .html (one page that loads nothing), or a picture (.png, .svg, .pdf).

    Args:
        diagnosis: result of `skipway.diagnose`.
        path: of the file; missing folders are made.

    Returns:
        the path.

    Raises:
        SkipwayError: another ending.
        MissingExtraError: a picture is asked for, and matplotlib is not installed (`pip install 'skipway[plot]'`).
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise SkipwayError(f"path={path}: the rule is one of the endings {' '.join(ENDINGS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(diagnosis.to_json() + "\n", encoding="utf-8")
    elif path.suffix in PICTURES:
        from skipway.report.pyplot import plot

        plot(diagnosis, path)
    else:
        from skipway.report.diagnosis import page

        path.write_text(page(diagnosis), encoding="utf-8")
    return path
