"""The cache in the user's cache folder: inspections of files, and decoded pixels."""

__all__: list[str] = []
