"""The commands of `python -m benchmarks.photos`."""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.photos import __doc__ as about
from benchmarks.photos.folders import PHOTOS, write_photos, write_subsets
from benchmarks.photos.race import race, read_rows
from benchmarks.photos.summary import draw_curves, results_of, table_lines, verdict_line
from skipway.hardware import cpu_count, cpu_name

SIZES, TEST_IMAGES = (200, 1000, 5000), 1000
NAMES = ("scikit-learn", "skipway", "timm", "fastai")


def prepare(given: argparse.Namespace) -> None:
    """Write the folders."""
    write_subsets(given.archive, given.root, given.sizes, given.test, given.seed)


def photos(given: argparse.Namespace) -> None:
    """Write the folder of large images."""
    write_photos(given.archive, given.folder, given.count)


def run(given: argparse.Namespace) -> None:
    """Run what the table does not have yet."""
    race(
        given.root,
        given.out,
        sizes=given.sizes,
        names=given.names,
        times=given.times,
        repetitions=given.repetitions,
        threads=given.threads,
    )


def summary(given: argparse.Namespace) -> None:
    """Write the tables and the figure."""
    rows = read_rows(given.table)
    figure = given.folder / "photos.png"
    draw_curves(rows, figure)
    machine = f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {cpu_count()} cores, PyTorch {version('torch')}."
    parts = ["# From photos to a classifier", about.strip(), machine, f"![Accuracy over time]({figure.name})"]
    for images, results in sorted(results_of(rows).items()):
        parts += [f"## {images:,} training images", "\n".join(table_lines(results)), verdict_line(results)]
    (given.folder / "README.md").write_text("\n\n".join(parts) + "\n")


def start() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, call) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=call.__doc__)
        found.set_defaults(call=call)
        return found

    options = command("prepare", prepare)
    options.add_argument("archive", type=Path, help="cifar10-jpeg.tar.xz")
    options.add_argument("root", type=Path)
    options.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    options.add_argument("--test", type=int, default=TEST_IMAGES, help=f"test images [{TEST_IMAGES:,}]")
    options.add_argument("--seed", type=int, default=0, help="of the draw; peers were tuned on that of 1 [0]")
    options = command("photos", photos)
    options.add_argument("archive", type=Path, help="cifar10-jpeg.tar.xz")
    options.add_argument("folder", type=Path)
    options.add_argument("--count", type=int, default=PHOTOS)
    options = command("race", run)
    options.add_argument("root", type=Path, help="what prepare wrote")
    options.add_argument("--out", type=Path, required=True, help="table (CSV); runs that it has are not repeated")
    options.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    options.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    options.add_argument("--times", nargs="+", default=(), help="of skipway train [by the number of images]")
    options.add_argument("--repetitions", type=int, default=1)
    options.add_argument("--threads", type=int, help="of each process [one for each core]")
    options = command("summary", summary)
    options.add_argument("table", type=Path)
    options.add_argument("--folder", type=Path, default=Path(__file__).parent, help="of README.md and photos.png")
    given = parser.parse_args()
    given.call(given)


start()
