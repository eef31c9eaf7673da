"""What is kept in the user's cache folder: which files are sound, and decoded pixels."""

__all__: list[str] = []
