"""A reporter that keeps what a training says."""

from __future__ import annotations

from skipway.training.reporter import SilentReporter

__all__ = ["Notes"]


class Notes(SilentReporter):
    """Keeps the text of every message; work for the display alone is done as on a terminal."""

    quiet = False

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def message(self, label: str, text: str) -> None:
        self.lines.append((label, text))

    def said(self, words: str) -> list[str]:
        """The messages that contain the words."""
        return [text for _, text in self.lines if words in text]
