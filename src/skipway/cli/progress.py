"""Where `skipway train` writes: a terminal with a live line at its bottom, or a file with one plain line at a time."""

from __future__ import annotations

import textwrap
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from skipway.cli.option_names import option_spelling
from skipway.inference.metrics import percent
from skipway.report.summary import duration
from skipway.training.reporter import SilentReporter, StepReport

__all__ = ["LineReporter", "LiveReporter", "QuietReporter", "choose_reporter"]

LABEL_WIDTH = 10
# how often a file gets a line while an epoch or the reading of images goes on
SECONDS_BETWEEN_LINES = 30.0


class QuietReporter(SilentReporter):
    """Shows nothing, as a context."""

    def __enter__(self) -> QuietReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class LineReporter(QuietReporter):
    """Plain lines: one per epoch, and one now and then while an epoch takes long."""

    quiet = False

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last_line = time.monotonic()
        # when the images began to be read, and how many were then
        self.reading: tuple[float, int] | None = None

    def write(self, text: Text) -> None:
        """One line, however long."""
        self.console.print(text, soft_wrap=True)
        self.last_line = time.monotonic()

    def message(self, label: str, text: str) -> None:
        self.write(Text(f"{label:<{LABEL_WIDTH}}{option_spelling(text)}".rstrip()))

    def images_read(self, done: int, total: int) -> None:
        if self.due():
            self.message("reading", self.reading_text(done, total))

    def reading_text(self, done: int, total: int) -> str:
        """How far the images are read, and how long it will take by the speed so far."""
        now = time.monotonic()
        if self.reading is None or done < self.reading[1]:
            self.reading = now, done
        began, before = self.reading
        left = (total - done) * (now - began) / (done - before) if done > before else 0
        return f"{done:,} of {total:,} images{f', {duration(left)} left' if left >= 1 else ''}"

    def step(self, report: StepReport) -> None:
        if self.due():
            self.write(Text(f"epoch {report.epoch}/{report.epochs}  {running(report)}"))

    def estimate(self, seconds: float) -> None:
        self.message("time", f"about {duration(seconds)} to go, by the first steps")

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        self.write(Text(epoch_line(row, epochs)))

    def due(self) -> bool:
        """Whether the last line is long enough ago."""
        return time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES


class LiveReporter(LineReporter):
    """The same lines, wrapped to the terminal, and below them one that is rewritten in place."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8 if console.width < 100 else 20),
            TextColumn("{task.fields[text]}"),
            console=console,
            transient=True,
            refresh_per_second=8,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> LiveReporter:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def message(self, label: str, text: str) -> None:
        lines = textwrap.wrap(option_spelling(text), max(40, self.console.width - LABEL_WIDTH - 1)) or [""]
        for number, line in enumerate(lines):
            start = f"{label if number == 0 else '':<{LABEL_WIDTH}}"
            self.write(Text.assemble((start, "bold cyan"), line))

    def images_read(self, done: int, total: int) -> None:
        self.show("reading", done, total, self.reading_text(done, total))

    def step(self, report: StepReport) -> None:
        done = (report.epoch - 1) * report.steps + report.step
        self.show(f"epoch {report.epoch}/{report.epochs}", done, report.epochs * report.steps, running(report))

    def show(self, what: str, done: int, total: int, text: str) -> None:
        """Rewrite the live line."""
        if self.task is None:
            self.task = self.progress.add_task(what, text=text)
        self.progress.update(self.task, description=what, completed=done, total=total, text=text)


def choose_reporter(quiet: bool) -> QuietReporter:
    """The screen for where standard output goes."""
    if quiet:
        return QuietReporter()
    console = Console(highlight=False, markup=False, emoji=False)
    live = console.is_terminal and not console.is_dumb_terminal
    return LiveReporter(console) if live else LineReporter(console)


def running(report: StepReport) -> str:
    """How an epoch goes."""
    return (
        f"step {report.step}/{report.steps}  loss {report.loss:.3f}  {percent(report.accuracy)}  "
        f"{report.images_per_second:,.0f} img/s  {duration(report.seconds_left)} left"
    )


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """How an epoch went, in 80 characters."""
    number = f"{row['epoch']:>{len(str(epochs))}}/{epochs}"
    validation = ""
    if row["validation_accuracy"] is not None:
        loss = "  nan" if row["validation_loss"] is None else f"{row['validation_loss']:.3f}"
        validation = f"  val loss {loss} {percent(row['validation_accuracy']):>7}"
    return (
        f"epoch {number}  train loss {row['train_loss']:.3f} {percent(row['train_accuracy']):>7}"
        f"{validation}  {row['images_per_second']:,.0f} img/s  {duration(row['seconds'])}"
    )
