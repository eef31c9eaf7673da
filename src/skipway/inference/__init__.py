"""Trained networks in use: predict, evaluate, optimize, export, publish."""

__all__: list[str] = []
