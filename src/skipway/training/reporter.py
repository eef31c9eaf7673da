"""What training has to say, apart from how it is shown; the command line shows it, a library call stays silent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Screen", "Silent", "StepReport"]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """How a run stands after a step.

    Args:
        epoch: running number of the epoch, from 1.
        epochs: of the whole run.
        step: steps done in this epoch.
        steps: in an epoch.
        loss: mean over this epoch so far.
        accuracy: on the varied training images of this epoch so far, 0 to 1.
        images_per_second: in this epoch so far.
        seconds_left: estimate until the run ends.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_second: float
    seconds_left: float


class Screen(Protocol):
    """Where training reports to.

    `quiet` says that nobody looks: what is made for the eye alone is left out.
    """

    quiet: bool

    def say(self, label: str, text: str) -> None:
        """One labelled line, before or after training."""

    def reading(self, done: int, total: int) -> None:
        """Image files read so far."""

    def step(self, report: StepReport) -> None:
        """After a step; called often."""

    def estimate(self, seconds: float) -> None:
        """Once, when enough steps are timed: how long the rest will take."""

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """After an epoch, with its line of the metrics."""


class Silent:
    """Shows nothing."""

    quiet = True

    def say(self, label: str, text: str) -> None:
        pass

    def reading(self, done: int, total: int) -> None:
        pass

    def step(self, report: StepReport) -> None:
        pass

    def estimate(self, seconds: float) -> None:
        pass

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        pass
