"""When samples are taken: every so many steps, sooner at the beginning, more rarely where they cost too much."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

__all__ = ["SETTLED", "Schedule"]

FIRST_WAIT = 10
"""Steps between the first sample and the second one."""
SETTLED = 32
"""Steps after which the usual time of a step is known."""


@dataclass
class Schedule:
    """Plans the steps with samples.

    Args:
        every: steps between samples.
        budget: share of the time that they may take; None: any.
        next: step of the next sample.
        start: steps before the first one.
        spent: seconds that all samples took.
        other: seconds of other work in every step, which has at most half of the budget.
        agree: (number) → that of the first process, where several have to sample together.
    """

    every: int
    budget: float | None
    next: float = 1
    other: float = 0.0
    start: int = 0
    spent: float = 0.0
    agree: Callable[[int], int] = int
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=SETTLED))

    @property
    def usual(self) -> float:
        """The time of a step without the monitor, in seconds; 0 where it is not known."""
        return median(self.step_seconds) if self.step_seconds else 0.0

    @property
    def settled(self) -> bool:
        """Whether the usual time of a step is known."""
        return len(self.step_seconds) == SETTLED

    def plan(self, step: int, seconds: float) -> str:
        """Plan the sample after one at `step` that took so long; returns a remark where samples are rarer than asked.

        With the next one, all samples so far stay within the budget.

        >>> schedule = Schedule(100, 0.02)
        >>> schedule.step_seconds.extend([0.1] * SETTLED)
        >>> schedule.plan(200, 0.1), schedule.next
        ('', 300)
        >>> schedule.plan(300, 0.4), schedule.next
        ('samples take as long as 4 steps each: one is taken every 200 steps instead of 100, 2% of the time', 450)
        """
        begun, steady, least = step - self.start, 0, 0
        wait = min(self.every, max(FIRST_WAIT, begun // 2))
        self.spent += seconds
        if self.budget and self.usual:
            share = max(self.budget / 2, self.budget - self.other / self.usual)
            steady, least = (
                math.ceil(round(each / (share * self.usual), 6)) for each in (seconds, self.spent + seconds)
            )
        self.next = step + self.agree(max(wait, least - begun))
        if steady <= self.every or not self.settled:
            return ""
        return (
            f"samples take as long as {seconds / self.usual:.2g} steps each: one is taken every {steady} steps instead "
            f"of {self.every}, {self.budget:.0%} of the time"
        )

    def norm_interval(self, seconds: float) -> int:
        """Steps between gradient norms that take so long each, so that they have half of the budget."""
        if self.budget is None or not self.usual:
            return 1
        return max(1, math.ceil(2 * seconds / self.usual / self.budget))
