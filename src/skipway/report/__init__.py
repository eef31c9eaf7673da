"""Results as pages, pictures and text, with one page layout and one chart module."""

from skipway.report.files import save

__all__ = ["save"]
