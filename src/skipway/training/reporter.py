"""The interface through which training reports; the command line prints, a library call is silent by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Reporter", "SilentReporter", "StepReport"]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The progress of a run after a step.

    Args:
        epoch: current epoch, from 1.
        epochs: epochs of the run.
        step: finished steps of this epoch.
        steps: steps per epoch.
        loss: mean training loss of this epoch so far.
        accuracy: training accuracy of this epoch so far, on augmented images, 0 to 1.
        unit: what is predicted: "image" or "token".
        per_second: their number per second in this epoch so far.
        bits_per_byte: the loss as bits per byte of text; None for images.
        seconds_left: estimated seconds until the end of the run.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    unit: str
    per_second: float
    seconds_left: float
    bits_per_byte: float | None = None


class Reporter(Protocol):
    """Receives messages and progress of training.

    Whoever shows them also shows that the latest activity or step goes on while nothing is reported.

    If `quiet` is true, work that only serves the display is skipped. The run sets `item`, the word for what activities
    count.
    """

    quiet: bool
    item: str

    def message(self, label: str, text: str) -> None:
        """A message with a label."""

    def activity(self, label: str, done: int = 0, total: int = 0) -> None:
        """What is being done now, in a word, and how many items of it are done; called often."""

    def step(self, report: StepReport) -> None:
        """Called after steps, often."""

    def estimate(self, seconds: float) -> None:
        """Called once, when enough steps are timed, with the estimated remaining time."""

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Called after an epoch with its row of the metrics."""


class SilentReporter:
    """Ignores everything."""

    quiet = True
    item = "image"

    def message(self, label: str, text: str) -> None:
        pass

    def activity(self, label: str, done: int = 0, total: int = 0) -> None:
        pass

    def step(self, report: StepReport) -> None:
        pass

    def estimate(self, seconds: float) -> None:
        pass

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        pass
