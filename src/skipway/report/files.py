"""`save(diagnosis, "report.html")`: write a result to a file in the format of its ending."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from skipway.checkpoint.files import file_aside
from skipway.errors import SkipwayError

if TYPE_CHECKING:
    from skipway.depth_transfer import DepthTransfer
    from skipway.diagnosis import Comparison, Diagnosis, Treatment
    from skipway.monitoring import Watch, WatchHistory
    from skipway.report.chart import Figure

__all__ = ["BY_MATPLOTLIB", "ENDINGS", "save"]

ENDINGS = (".json", ".html", ".htm", ".png", ".svg", ".pdf")
OF_TRANSFERS = (".json", ".html", ".htm", ".svg")
BY_MATPLOTLIB = (".png", ".pdf")
"""Pictures that need the extra `plot`."""


def save(
    result: Diagnosis | Treatment | Comparison | DepthTransfer | Watch | WatchHistory,
    path: str | Path,
    *,
    command: str = "",
    name: str = "",
) -> Path:
    """Write a result to a file: .json, .html (a self-contained page), or a picture (.svg, of a diagnosis or comparison
    .png and .pdf, too); of a monitor the page.

    Args:
        result: of `skipway.diagnose`, of one model or several, or of `Diagnosis.fix`: the page then shows before and
            after, the other formats the diagnosis after; or of `skipway.transfer`; or what `skipway.monitor` has seen,
            also while it runs.
        path: of the file; missing folders are created.
        command: command line that produced it, for the page.
        name: of the network, such as the argument of the command line, for the title of the page.

    Returns:
        the path.

    Raises:
        SkipwayError: the ending is not one of these, or the file cannot be written; one that was there before stays.
        MissingExtraError: a .png or .pdf is asked for, and matplotlib is not installed (`pip install 'skipway[plot]'`).
    """
    from skipway.depth_transfer import DepthTransfer
    from skipway.diagnosis import Treatment
    from skipway.monitoring import Watch, WatchHistory

    path = Path(path)
    if isinstance(result, Watch | WatchHistory):
        return save_watch(result.history if isinstance(result, Watch) else result, path, command, name)
    endings = OF_TRANSFERS if isinstance(result, DepthTransfer) else ENDINGS
    if path.suffix not in endings:
        raise SkipwayError(f"path={path}: the rule is one of the endings {' '.join(endings)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_aside(path) as file:
        if path.suffix == ".json":
            last = result.after if isinstance(result, Treatment) else result
            write_utf8(file, last.to_json() + "\n")
        elif path.suffix in (".html", ".htm"):
            write_utf8(file, page_of(result, command, name))
        else:
            from skipway.argument_names import spelled
            from skipway.report.pyplot import save_picture
            from skipway.report.svg import svg_file

            figures, *words = picture_of(result)
            title, note = (spelled(each, command) for each in words)
            if path.suffix == ".svg":
                write_utf8(file, svg_file(*figures, title=title, note=note))
            else:
                save_picture(file, figures, title=title, note=note)
    return path


def write_utf8(file: Path, text: str) -> None:
    """Write a text; bytes of a file name that are no text, and that Python keeps as halves of surrogate pairs, become
    escapes.
    """
    file.write_text(text, encoding="utf-8", errors="backslashreplace")


def page_of(result: Diagnosis | Treatment | Comparison | DepthTransfer, command: str, name: str) -> str:
    """The page of a result."""
    from skipway.depth_transfer import DepthTransfer
    from skipway.diagnosis import Comparison
    from skipway.report.comparison import comparison_page
    from skipway.report.diagnosis import diagnosis_page
    from skipway.report.transfer import transfer_page

    if isinstance(result, DepthTransfer):
        return transfer_page(result, command, name)
    if isinstance(result, Comparison):
        return comparison_page(result, command, name)
    return diagnosis_page(result, command, name)


def picture_of(result: Diagnosis | Treatment | Comparison | DepthTransfer) -> tuple[list[Figure], str, str]:
    """Figures, title and note of the picture of a result."""
    from skipway.depth_transfer import DepthTransfer
    from skipway.diagnosis import Comparison, Treatment
    from skipway.report.comparison import comparison_figures
    from skipway.report.diagnosis import diagnosis_figures
    from skipway.report.transfer import transfer_figures

    if isinstance(result, DepthTransfer):
        return transfer_figures(result), result.sentence, "\n".join(result.remarks)
    if isinstance(result, Comparison):
        return comparison_figures(result), result.answer, "\n".join(result.remarks)
    diagnosis = result.after if isinstance(result, Treatment) else result
    return diagnosis_figures(diagnosis), picture_title(diagnosis), picture_note(diagnosis)


def save_watch(history: WatchHistory, path: Path, command: str, name: str) -> Path:
    """Write the page of a monitor."""
    from skipway.report.watch_page import watch_page

    if path.suffix not in (".html", ".htm"):
        raise SkipwayError(f"path={path}: of a monitor the rule is a page, with the ending .html")
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_aside(path) as file:
        write_utf8(file, watch_page(history, command, name))
    return path


def picture_title(diagnosis: Diagnosis) -> str:
    """Return the verdict with its grounds."""
    text = ": ".join(filter(None, [diagnosis.verdict, "; ".join(diagnosis.grounds)]))
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
