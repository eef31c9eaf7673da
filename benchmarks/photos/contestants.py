"""Who takes part: what each starts, and how accuracies are read from its output."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TIMES", "Contestant", "contestants", "read_accuracy"]

TIMES = {200: ("30s", "1m"), 1000: ("30s", "1m", "2m"), 5000: ("1m", "2m", "5m")}
"""What `skipway train` is given, by the number of training images."""
STEPS = (90, 270)
"""Steps of everything that the peers that fine-tune take, at a batch of 32."""
BATCH = 32
PATTERNS = (
    ("validation", re.compile(r"fitted +([\d.]+) % of the validation images")),
    ("validation", re.compile(r"epoch .* val loss \S+ +([\d.]+) ?%")),
    ("test", re.compile(r"accuracy +([\d.]+) % of [\d,]+ test images")),
)
"""How `skipway train` says which share of which images is right."""


@dataclass(frozen=True)
class Contestant:
    """One way to train.

    Args:
        name: of the library.
        setting: of this run of it.
        arguments: of the Python interpreter.
    """

    name: str
    setting: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """What to start."""
        return [sys.executable, *self.arguments]


def contestants(
    data: Path, images: int, weights: Path, out: Path, seed: int, times: Sequence[str] = ()
) -> Iterator[Contestant]:
    """The contestants on a folder of `images` training images, with their settings (see README.md)."""
    common = (str(data), "--weights", str(weights), "--seed", str(seed))
    yield Contestant("scikit-learn", "frozen", ("-m", "benchmarks.photos.scikit_learn", *common, "--bfloat16"))
    train = ("-m", "skipway", "train", str(data), "--start", "auto", "--seed", str(seed), "--out", str(out))
    yield Contestant("skipway", "frozen", (*train, "--overwrite", "--freeze", "all"))
    for time in times or TIMES.get(images, TIMES[5000]):
        yield Contestant("skipway", f"--time {time}", (*train, "--overwrite", "--time", time))
    for steps in STEPS:
        epochs = max(1, round(steps * BATCH / images))
        tuned = (*common, "--epochs", str(epochs))
        yield Contestant("timm", f"{epochs} epochs", ("-m", "benchmarks.photos.timm_script", *tuned))
        if steps == max(STEPS):
            batch_norms = (*tuned, "--batch-norms")
            yield Contestant(
                "timm", f"{epochs} epochs, norms too", ("-m", "benchmarks.photos.timm_script", *batch_norms)
            )
        yield Contestant("fastai", f"{epochs} epochs", ("-m", "benchmarks.photos.fastai_script", *tuned))


def read_accuracy(line: str) -> tuple[str, float] | None:
    """Which images a line of output is about, "validation" or "test", and the share that is right.

    >>> read_accuracy('{"test": 0.8125}'), read_accuracy("fitted    78.5 % of the validation images are right")
    (('test', 0.8125), ('validation', 0.785))
    """
    if line.startswith('{"'):
        [(part, accuracy)] = json.loads(line).items()
        return part, accuracy
    for part, pattern in PATTERNS:
        if found := pattern.match(line):
            return part, round(float(found[1]) / 100, 6)
    return None
