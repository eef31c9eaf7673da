"""Tables and the figure of a race."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.photos.race import Row
from skipway.errors import SkipwayError, counted
from skipway.report.chart import Figure, Point, Series
from skipway.report.pyplot import save_picture

__all__ = ["OURS", "Result", "draw_curves", "results_of", "table_lines", "verdict_line"]

OURS = "skipway"


@dataclass(frozen=True)
class Result:
    """The repetitions of a contestant with a setting.

    Args:
        images: training images.
        name, setting: of the contestant.
        tests: its test rows, one for each repetition.
    """

    images: int
    name: str
    setting: str
    tests: tuple[Row, ...]

    @property
    def accuracy(self) -> float:
        """Mean test accuracy."""
        return sum(row.accuracy for row in self.tests) / len(self.tests)

    @property
    def wall(self) -> float:
        """Median seconds from the start of the process to its end."""
        return median(row.wall for row in self.tests)

    @property
    def processor(self) -> float:
        """Median seconds of all processors."""
        return median(row.processor for row in self.tests)


def results_of(rows: Sequence[Row]) -> dict[int, list[Result]]:
    """The results by number of training images, each contestant's by time."""
    found = defaultdict(list)
    for row in rows:
        if row.part == "test":
            found[row.images, row.name, row.setting].append(row)
    by_images = defaultdict(list)
    for (images, name, setting), tests in sorted(found.items()):
        by_images[images].append(Result(images, name, setting, tuple(tests)))
    return {
        images: sorted(results, key=lambda each: (each.name != OURS, each.name, each.wall))
        for images, results in by_images.items()
    }


def table_lines(results: Sequence[Result]) -> list[str]:
    """A table in Markdown."""
    lines = ["| | setting | test accuracy | seconds | seconds of processors |", "|---|---|---|---|---|"]
    for each in results:
        low, high = (100 * end(row.accuracy for row in each.tests) for end in (min, max))
        extent = f" ({low:.1f} to {high:.1f})" if len(each.tests) > 1 else ""
        lines.append(
            f"| {each.name} | {each.setting} | {100 * each.accuracy:.1f} %{extent} | {each.wall:.0f} "
            f"| {each.processor:.0f} |"
        )
    return lines


def verdict_line(results: Sequence[Result]) -> str:
    """How long ours needs for the accuracy of the best peer, beside that peer."""
    peers, ours = ([each for each in results if (each.name == OURS) == is_ours] for is_ours in (False, True))
    if not peers or not ours:
        return "Not everybody has run."
    best = max(peers, key=lambda each: each.accuracy)
    good = [each for each in ours if each.accuracy >= best.accuracy]
    words = f"The best peer, {best.name} with {best.setting}, has {100 * best.accuracy:.1f} % after {best.wall:.0f} s; "
    if not good:
        most = max(ours, key=lambda each: each.accuracy)
        return f"{words}ours does not reach that: {100 * most.accuracy:.1f} % after {most.wall:.0f} s."
    first = min(good, key=lambda each: each.wall)
    return (
        f"{words}ours has {100 * first.accuracy:.1f} % after {first.wall:.0f} s ({first.setting}): "
        f"{first.wall / best.wall:.2f} of the time."
    )


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Test accuracy over time, a panel for each number of images, and faint the validation accuracies on the way.

    Raises:
        SkipwayError: there is nothing to draw.
    """
    if not rows:
        raise SkipwayError("no results to draw; run python -m benchmarks.photos race first")
    save_picture(
        path,
        [figure_of(images, results, rows) for images, results in sorted(results_of(rows).items())],
        columns=len(results_of(rows)),
        title="A classifier from photos: test accuracy over time, from the start of the process",
        note="Points: mean test accuracy of a setting at its median time. Grey: accuracies on validation images on the "
        "way there.",
    )


def figure_of(images: int, results: Sequence[Result], rows: Sequence[Row]) -> Figure:
    """The panel of a number of training images."""
    lines = [
        Series(
            name,
            tuple(
                Point(each.wall, each.accuracy, *extent(each), len(each.tests)) for each in results if each.name == name
            ),
        )
        for name in dict.fromkeys(each.name for each in results)
    ]
    runs = defaultdict(list)
    for row in rows:
        if row.images == images and row.part == "validation":
            runs[row.name, row.setting, row.repetition].append((row.wall, row.accuracy))
    broken = [value for values in runs.values() if len(values) > 1 for value in (*values, (values[-1][0], math.nan))]
    return Figure(
        title=counted(images, "training image"),
        x_label="seconds",
        y_label="accuracy",
        log_x=True,
        percent=True,
        series=(Series.of("on validation images", broken, "faint"), *lines),
    )


def extent(result: Result) -> tuple[float, float]:
    """The lowest and the highest test accuracy."""
    accuracies = [row.accuracy for row in result.tests]
    return min(accuracies), max(accuracies)
