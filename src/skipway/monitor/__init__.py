"""Measurements taken while a network trains, beside the run and without a trace in it."""

__all__: list[str] = []
