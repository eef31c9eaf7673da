"""The runs, one after the other, each in a fresh process, into a table of what was right after how many seconds."""

from __future__ import annotations

import csv
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.photos.contestants import Contestant, contestants, read_accuracy
from benchmarks.photos.trunk import write_weights
from skipway.hardware import cpu_count

__all__ = ["Row", "race", "read_rows"]


@dataclass(frozen=True)
class Row:
    """An accuracy at a time.

    Args:
        images: training images, those for validation included.
        name, setting: of the contestant.
        repetition: from 0; it is the seed.
        part: "validation" or "test"; the test comes last.
        wall: seconds since the process was started; for the test, when it had ended.
        processor: seconds of all processors for the test, 0 before.
        accuracy: share of the images of the part that are right.
    """

    images: int
    name: str
    setting: str
    repetition: int
    part: str
    wall: float
    processor: float
    accuracy: float


def read_rows(path: Path) -> list[Row]:
    """The rows of a table; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Row(**{field.name: convert(field.type, row[field.name]) for field in fields(Row)})
            for row in csv.DictReader(file)
        ]


def convert(kind: object, text: str) -> int | float | str:
    """A cell as a value of a field."""
    return {"int": int, "float": float, "str": str}[str(kind)](text)


def add_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a table."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Row)])
        if is_new:
            table.writeheader()
        table.writerows(asdict(row) for row in rows)


def run(contestant: Contestant, images: int, repetition: int, environment: dict[str, str], log: Path) -> list[Row]:
    """Run a contestant and time the accuracies that it prints.

    Raises:
        SystemExit: it failed, or printed no test accuracy.
    """
    rows = []
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with (
        log.open("w") as file,
        subprocess.Popen(
            contestant.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if read := read_accuracy(line):
                rows.append((*read, time.monotonic() - began))
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode or not rows or rows[-1][0] != "test":
        raise SystemExit(f"{contestant.name}, {contestant.setting}: failed\n{log.read_text()[-3000:]}")
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [
        Row(
            images,
            contestant.name,
            contestant.setting,
            repetition,
            part,
            round(wall if part == "test" else seconds, 2),
            round(processor, 2) if part == "test" else 0.0,
            accuracy,
        )
        for part, accuracy, seconds in rows
    ]


def race(
    root: Path,
    out: Path,
    *,
    sizes: Sequence[int],
    names: Sequence[str],
    times: Sequence[str] = (),
    repetitions: int = 1,
    threads: int | None = None,
) -> None:
    """Run all contestants on all sizes, repetition by repetition; what the table has is not run again.

    Args:
        root: folder that `write_subsets` wrote.
        out: the table (CSV), written after each run.
        sizes: numbers of training images.
        names: of the contestants.
        times: that `skipway train` is given; none: `contestants.TIMES`.
        repetitions: with another seed each.
        threads: of each process; None: one for each core.
    """
    weights = root / "weights.pth"
    if not weights.exists():
        write_weights(weights)
    here = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        for repetition in range(repetitions):
            for images in sizes:
                runs = contestants(root / str(images), images, weights, scratch / "run", repetition, times)
                for number, each in enumerate(runs):
                    key = (images, each.name, each.setting, repetition)
                    have = {(row.images, row.name, row.setting, row.repetition) for row in read_rows(out)}
                    if each.name not in names or key in have:
                        continue
                    environment = {
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join([str(here / "src"), str(here)]),
                        "PYTHONUNBUFFERED": "1",
                        "OMP_NUM_THREADS": str(threads or cpu_count()),
                        "HF_HUB_OFFLINE": "1",
                        # an empty one: reading the images and computing the features counts
                        "SKIPWAY_CACHE": str(scratch / f"cache-{repetition}-{images}-{number}"),
                    }
                    rows = run(each, images, repetition, environment, out.with_suffix(".log"))
                    add_rows(out, rows)
                    last = rows[-1]
                    print(
                        f"{images:5} {each.name:12} {each.setting:10} {last.wall:6.1f} s "
                        f"({last.processor:.0f} s of processors)  {100 * last.accuracy:.1f} %",
                        flush=True,
                    )
