"""The memory that `skipway train` says before the first step, against the peak that a process then takes.

    python -m benchmarks.memory

Every network is trained for two steps in a process of its own, on noise. Printed are the estimate, the measured peak
(`resource.getrusage`), and their ratio, which should be within 25 % of 1.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

__all__: list[str] = []

# network, image size, batch size
CASES = (
    ("resnet20", 64, 128),
    ("resnet50", 128, 32),
    ("resnet50", 224, 32),
    ("convnext_tiny", 128, 32),
    ("timm:vit_tiny_patch16_224", 224, 32),
    ("timm:efficientnet_lite0", 128, 64),
)
CLASSES, IMAGES = 2, 100
SAID = re.compile(r"about ([\d.]+) GB")


def write_images(folder: Path, size: int) -> None:
    """Noise in two classes."""
    from PIL import Image

    random = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(IMAGES):
            pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number:03}.png")


def measure(model: str, size: int, batch_size: int, optimizer: str, folder: Path) -> None:
    """Train in this process and print the estimate and the peak, in GB."""
    from skipway.recipe import Recipe
    from skipway.training import SilentReporter, train

    class Heard(SilentReporter):
        said = ""

        def message(self, label: str, text: str) -> None:
            self.said = text if label == "memory" else self.said

    reporter = Heard()
    recipe = Recipe(
        folder / "images", model=model, start="random", size=size, batch_size=batch_size, epochs=1, optimizer=optimizer
    )
    train(recipe, folder / "run", reporter=reporter)
    found = SAID.search(reporter.said)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(found.group(1) if found else "nan", f"{peak:.2f}")


def main() -> None:
    """Measure all cases and print a table."""
    if len(sys.argv) > 1:
        model, size, batch_size, optimizer, folder = sys.argv[1:]
        measure(model, int(size), int(batch_size), optimizer, Path(folder))
        return
    print("network | size | batch | optimizer | said (GB) | measured (GB) | ratio")
    for number, (model, size, batch_size) in enumerate(CASES):
        optimizer = ("sgd", "adamw")[number % 2]
        with tempfile.TemporaryDirectory() as name:
            write_images(Path(name) / "images", size)
            case = [model, str(size), str(batch_size), optimizer]
            command = [sys.executable, "-m", "benchmarks.memory", *case, name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(" | ".join(case), "|", done.stderr.strip().splitlines()[-1])
            continue
        said, peak = (float(word) for word in done.stdout.split()[-2:])
        print(" | ".join(case), f"| {said:.1f} | {peak:.1f} | {said / peak:.2f}", flush=True)


if __name__ == "__main__":
    main()
