"""`save(diagnosis, "report.html")`: write a result to a file in the format of its ending."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from skipway.checkpoint.files import file_aside
from skipway.errors import SkipwayError

if TYPE_CHECKING:
    from skipway.diagnosis import Diagnosis, Treatment

__all__ = ["ENDINGS", "save"]

ENDINGS = (".json", ".html", ".htm", ".png", ".svg", ".pdf")


def save(result: Diagnosis | Treatment, path: str | Path, *, command: str = "", name: str = "") -> Path:
    """Write a diagnosis to a file: .json, .html (a self-contained page), or a picture (.png, .svg, .pdf).

    Args:
        result: of `skipway.diagnose`, or of `Diagnosis.fix`: the page then shows before and after, the other formats
            the diagnosis after.
        path: of the file; missing folders are created.
        command: command line that produced it, for the page.
        name: of the network, such as the argument of the command line, for the title of the page.

    Returns:
        the path.

    Raises:
        SkipwayError: the ending is not one of these, or the file cannot be written; one that was there before stays.
        MissingExtraError: a .png or .pdf is asked for, and matplotlib is not installed (`pip install 'skipway[plot]'`).
    """
    from skipway.diagnosis import Treatment

    path = Path(path)
    if path.suffix not in ENDINGS:
        raise SkipwayError(f"path={path}: the rule is one of the endings {' '.join(ENDINGS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    diagnosis = result.after if isinstance(result, Treatment) else result
    with file_aside(path) as file:
        if path.suffix == ".json":
            file.write_text(diagnosis.to_json() + "\n", encoding="utf-8")
        elif path.suffix in (".html", ".htm"):
            from skipway.report.diagnosis import diagnosis_page

            file.write_text(diagnosis_page(result, command, name), encoding="utf-8")
        else:
            from skipway.report.diagnosis import diagnosis_figures
            from skipway.report.pyplot import save_picture
            from skipway.report.svg import svg_file

            figures, title, note = diagnosis_figures(diagnosis), picture_title(diagnosis), picture_note(diagnosis)
            if path.suffix == ".svg":
                file.write_text(svg_file(*figures, title=title, note=note), encoding="utf-8")
            else:
                save_picture(file, figures, title=title, note=note)
    return path


def picture_title(diagnosis: Diagnosis) -> str:
    """Return the verdict with its conditions."""
    text = ": ".join(filter(None, [diagnosis.verdict, "; ".join(diagnosis.conditions)]))
    return text[0].upper() + text[1:]


def picture_note(diagnosis: Diagnosis) -> str:
    """Describe what was diagnosed, and list the findings about the whole network."""
    marked = {mark for row in diagnosis.rows for mark in row.marks}
    whole = [f"{number} {each.rule}" for number, each in enumerate(diagnosis.findings, 1) if number not in marked]
    lines = [
        " · ".join(diagnosis.heading),
        *diagnosis.remarks,
        *([f"about the whole network: {', '.join(whole)}"] if whole else []),
    ]
    return "\n".join(lines)
