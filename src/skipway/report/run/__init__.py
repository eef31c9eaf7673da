"""`report.html`: what came of a run, on one page that loads nothing."""

from __future__ import annotations

from skipway.report.run.page import write_report

__all__ = ["write_report"]
