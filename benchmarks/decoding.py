"""Images per second that reach a training step: our loaders beside torchvision's ImageFolder in a torch DataLoader.

    python -m benchmarks.decoding [--images 400] [--rounds 5] [--workers 2]

Every recipe reads the same generated 500 x 375 JPEGs, cuts out a random part, scales it to 224 x 224, mirrors half of
them and normalises. The recipes take turns, so that a busy moment of the machine does not fall on one of them; the
table has medians with the smallest and the largest. Both scale bilinearly.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.peers import import_torchvision
from skipway.data import jpeg, load

__all__ = ["main", "photographs"]

BATCH = 50
CPU = torch.device("cpu")


def photographs(root: Path, count: int) -> Path:
    """JPEGs of 500 x 375 and about 80 kB, as ImageNet's: smooth shapes and a little noise."""
    random = np.random.default_rng(0)
    for number in range(count):
        shapes = Image.fromarray(random.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        smooth = np.asarray(shapes.resize((500, 375), Image.Resampling.BICUBIC), np.int64)
        pixels = (smooth + random.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        path = root / f"class{number % 2}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
    return root


def torchvision_recipe(root: Path, workers: int) -> Callable[[], Iterable[Any]]:
    """The transforms of torchvision's references/classification."""
    import_torchvision()
    from torchvision import datasets, transforms  # pyrefly: ignore[missing-import]

    steps = [
        transforms.RandomResizedCrop(224, scale=(0.35, 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    folder = datasets.ImageFolder(str(root), transforms.Compose(steps))
    return lambda: torch.utils.data.DataLoader(folder, BATCH, shuffle=True, num_workers=workers, drop_last=True)


def skipway_recipe(root: Path, **choices: Any) -> Callable[[], Iterable[Any]]:
    """An epoch of ours."""
    data = load(root, size=224, crop="resized", holdout=0.01, validation=0.0, **choices)
    return lambda: data.train_batches(seed=0, epoch=0, batch_size=BATCH, device=CPU)


@contextmanager
def without_simplejpeg():
    """Pillow decodes, as where simplejpeg is not installed."""
    own, jpeg.simplejpeg = jpeg.simplejpeg, lambda: None
    try:
        yield
    finally:
        jpeg.simplejpeg = own


def images_per_second(batches: Iterable[Any]) -> float:
    """Of one epoch, the start of its workers included."""
    count, began = 0, time.perf_counter()
    for batch in batches:
        count += len(batch[0])
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    several = asked.workers
    with tempfile.TemporaryDirectory() as folder:
        root, kept = photographs(Path(folder, "photos"), asked.images), Path(folder, "cache")
        fast = jpeg.simplejpeg() is not None
        recipes: dict[str, tuple[bool, Callable[[], Iterable[Any]]]] = {}
        for workers in (0, several):
            recipes[f"torchvision ImageFolder, {workers} workers"] = (True, torchvision_recipe(root, workers))
        for plain in (True, False) if fast else (True,):
            decoder = "Pillow" if plain else "simplejpeg"
            alone = skipway_recipe(root, workers=0, cache=False)
            recipes[f"skipway, {decoder}, 0 workers"] = (plain, alone)
            for helpers in ("threads", "processes"):
                recipe = skipway_recipe(root, workers=several, helpers=helpers, cache=False)
                recipes[f"skipway, {decoder}, {several} {helpers}"] = (plain, recipe)
        for workers in (0, several):
            recipe = skipway_recipe(root, workers=workers, cache=kept)
            recipes[f"skipway, decoded cache, {workers} threads"] = (True, recipe)
        found: dict[str, list[float]] = {name: [] for name in recipes}
        for _ in range(asked.rounds):
            for name, (plain, recipe) in recipes.items():
                if plain:
                    with without_simplejpeg():
                        found[name].append(images_per_second(recipe()))
                else:
                    found[name].append(images_per_second(recipe()))
    print(f"{'images per second':44} {'median':>8} {'least':>8} {'most':>8}")
    for name, rates in found.items():
        print(f"{name:44} {statistics.median(rates):8.0f} {min(rates):8.0f} {max(rates):8.0f}")


if __name__ == "__main__":
    main()
