"""Where `skipway train` writes: a terminal with a live line at its bottom, or a file with one plain line at a time.

A thread of the reporter shows that the latest activity goes on while nothing is reported. Importable without torch, so
that the screen is there while torch is loaded.
"""

from __future__ import annotations

import textwrap
import threading
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from skipway.cli.option_names import option_spelling
from skipway.errors import clock_text, counted, duration
from skipway.training.reporter import SilentReporter, StepReport

__all__ = ["LineReporter", "LiveReporter", "QuietReporter", "choose_reporter"]

LABEL_WIDTH = 10
# how often a file gets a line while something goes on
SECONDS_BETWEEN_LINES = 30.0
# how often it is looked whether anything has been shown, and after what silence a terminal shows the seconds
SECONDS_BETWEEN_BEATS, SILENCE = 1.0, 2.0
# abbreviations in lines of 80 characters
SHORT_UNITS = {"image": "img", "token": "tokens"}


class QuietReporter(SilentReporter):
    """Shows nothing, as a context."""

    def __enter__(self) -> QuietReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class LineReporter(QuietReporter):
    """Plain lines: one per epoch, and one now and then while an activity takes long."""

    quiet = False

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last_line = self.changed = time.monotonic()
        # label, text, and how much of how much is done
        self.shown: tuple[str, str, int, int] = ("starting", "", 0, 0)
        # an activity with a total: its label, when it began, and how much was done then
        self.counting: tuple[str, float, int] = ("", 0.0, 0)
        self.left = threading.Event()

    def __enter__(self) -> LineReporter:
        self.left.clear()
        threading.Thread(target=self.keep_beating, name="skipway-heartbeat", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.left.set()

    def keep_beating(self) -> None:
        """Look every second, until the context is left, whether what goes on is to be shown."""
        while not self.left.wait(SECONDS_BETWEEN_BEATS):
            try:
                self.beat()
            except (OSError, ValueError):  # the reader of the output is gone; whoever writes next will see it
                return

    def beat(self) -> None:
        """A line with what goes on, if the last line is long enough ago."""
        if self.due():
            self.write_shown(f"for {duration(time.monotonic() - self.changed)}")

    def write(self, text: Text) -> None:
        """One line, however long."""
        self.last_line = time.monotonic()
        self.console.print(text, soft_wrap=True)

    def message(self, label: str, text: str) -> None:
        self.write(Text(f"{label:<{LABEL_WIDTH}}{option_spelling(text)}".rstrip()))

    def activity(self, label: str, done: int = 0, total: int = 0) -> None:
        self.show(label, self.count_text(label, done, total) if total else "", done, total)

    def count_text(self, label: str, done: int, total: int) -> str:
        """How many items are done, and how long the others will take by the speed so far."""
        now = time.monotonic()
        if self.counting[0] != label or done < self.counting[2]:
            self.counting = label, now, done
        _, began, before = self.counting
        left = (total - done) * (now - began) / (done - before) if done > before else 0
        return f"{done:,} of {counted(total, self.item)}{f', {duration(left)} left' if left >= 1 else ''}"

    def step(self, report: StepReport) -> None:
        done = (report.epoch - 1) * report.steps + report.step
        self.show(f"epoch {report.epoch}/{report.epochs}", running(report), done, report.epochs * report.steps)

    def show(self, label: str, text: str, done: int, total: int) -> None:
        """Take note of what goes on, and write a line if the last one is long enough ago."""
        self.shown, self.changed = (label, text, done, total), time.monotonic()
        if self.due():
            self.write_shown()

    def write_shown(self, more: str = "") -> None:
        """One line with what goes on."""
        label, text, _, _ = self.shown
        self.write(Text(f"{label:<{LABEL_WIDTH - 2}}  {'  '.join(filter(None, (text, more)))}".rstrip()))

    def estimate(self, seconds: float) -> None:
        self.message("time", f"about {duration(seconds)} to go, done at about {clock_text(seconds)}")

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
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=8 if console.width < 100 else 20),
            TextColumn("{task.fields[text]}"),
            console=console,
            transient=True,
            refresh_per_second=8,
        )
        self.task: TaskID | None = None
        self.moving = True

    def __enter__(self) -> LiveReporter:
        super().__enter__()
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.progress.stop()

    def message(self, label: str, text: str) -> None:
        lines = textwrap.wrap(option_spelling(text), max(40, self.console.width - LABEL_WIDTH - 1)) or [""]
        for number, line in enumerate(lines):
            start = f"{label if number == 0 else '':<{LABEL_WIDTH}}"
            self.write(Text.assemble((start, "bold cyan"), line))

    def show(self, label: str, text: str, done: int, total: int) -> None:
        """Rewrite the live line."""
        self.shown, self.changed = (label, text, done, total), time.monotonic()
        self.rewrite()

    def beat(self) -> None:
        """Rewrite the live line with the seconds since it last changed."""
        silent = time.monotonic() - self.changed
        self.rewrite(f"  (no news for {duration(silent)})" if silent > SILENCE else "")

    def rewrite(self, more: str = "") -> None:
        """The live line, with some more text; a bar that moves where the total is not known."""
        label, text, done, total = self.shown
        if self.task is None or self.moving != (not total):
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.task, self.moving = self.progress.add_task(label, total=None, text=text), not total
        self.progress.update(
            self.task, description=label, completed=done, total=total or None, text=f"{text}{more}".strip()
        )


def choose_reporter(quiet: bool) -> QuietReporter:
    """The screen for where standard output goes."""
    if quiet:
        return QuietReporter()
    console = Console(highlight=False, markup=False, emoji=False)
    live = console.is_terminal and not console.is_dumb_terminal
    return LiveReporter(console) if live else LineReporter(console)


def running(report: StepReport) -> str:
    """How an epoch goes."""
    from skipway.inference.metrics import percent

    return (
        f"step {report.step}/{report.steps}  loss {report.loss:.3f}  "
        f"{percent(report.accuracy) if report.bits_per_byte is None else f'{report.bits_per_byte:.3f} bits/byte'}  "
        f"{report.per_second:,.0f} {SHORT_UNITS[report.unit]}/s  {duration(report.seconds_left)} left"
    )


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """How an epoch went, in 80 characters."""
    from skipway.inference.metrics import percent

    number = f"{row['epoch']:>{len(str(epochs))}}/{epochs}"
    if "validation_bits_per_byte" in row:
        return text_epoch_line(row, number)
    validation = ""
    if row["validation_accuracy"] is not None:
        loss = "  nan" if row["validation_loss"] is None else f"{row['validation_loss']:.3f}"
        validation = f"  val loss {loss} {percent(row['validation_accuracy']):>7}"
    return (
        f"epoch {number}  train loss {row['train_loss']:.3f} {percent(row['train_accuracy']):>7}"
        f"{validation}  {row['images_per_second']:,.0f} img/s  {duration(row['seconds'])}"
    )


def text_epoch_line(row: dict[str, Any], number: str) -> str:
    """How an epoch of text went: losses in bits per byte, in 80 characters."""
    validation = row["validation_bits_per_byte"]
    told = "" if row["validation_loss"] is None and validation is None else f"  val {validation or float('nan'):.4f}"
    return (
        f"epoch {number}  step {row['step']:,}  bits/byte train {row['train_bits_per_byte']:.4f}{told}  "
        f"{row['tokens_per_second']:,.0f} tokens/s  {duration(row['seconds'])}"
    )
