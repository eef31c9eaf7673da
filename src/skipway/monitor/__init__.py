"""Measurements of a network while it trains, which leave the training as it is."""

from skipway.monitor.health import Health, sample_health

__all__ = ["Health", "sample_health"]
