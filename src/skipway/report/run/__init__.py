"""`report.html`: the results of a training run on a self-contained page."""

from __future__ import annotations

from skipway.report.run.page import write_report

__all__ = ["write_report"]
