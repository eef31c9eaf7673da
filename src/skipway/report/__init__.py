"""Pages, pictures and text of results: one frame, one set of charts."""

from skipway.report.files import save

__all__ = ["save"]
