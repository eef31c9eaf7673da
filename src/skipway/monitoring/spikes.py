"""Spikes of a loss or norm against its own recent past."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

__all__ = ["SPIKE", "WINDOW", "SpikeScore"]

SPIKE = 6.0
"""Standard deviations above the mean from which a value is a spike."""
WINDOW, FEWEST = 128, 32
FLAT = 1e-10


@dataclass
class SpikeScore:
    """(value − mean) / σ over the last 128 values; above 6 a value is a spike.

    Mean and σ are those of the values before. From 32 values on; OLMo-core, whose `StabilityMonitorCallback` has these
    numbers, waits for 128. A value that is not finite scores infinity and is not remembered.

    Source: allenai/OLMo-core, train/callbacks/stability_monitor.py; OLMo 2, https://arxiv.org/abs/2501.00656, sec. 3.

    >>> spikes = SpikeScore()
    >>> all(spikes.score(value) < SPIKE for value in [1.0, 1.1] * 40)
    True
    >>> round(spikes.score(1.55))
    10
    """

    values: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def score(self, value: float) -> float:
        """The score of the next value; 0 while there are too few, or where they are all the same."""
        if not math.isfinite(value):
            return math.inf
        count = len(self.values)
        # no square and no sum of large values, which would overflow
        mean = math.fsum(each / count for each in self.values)
        deviation = math.hypot(*(each - mean for each in self.values)) / math.sqrt(count) if count else 0.0
        self.values.append(value)
        return (value - mean) / deviation if count >= FEWEST and FLAT < deviation < math.inf else 0.0
