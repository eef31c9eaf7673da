"""Pages and text that show what was found: one frame, one set of charts."""

__all__: list[str] = []
