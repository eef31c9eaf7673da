"""Optimizers, schedules, gradient clipping, and parameter groups by role."""

__all__: list[str] = []
