"""What the networks of the benchmark learn: images to classes, text, numbers, and masks; each with its loss, its
batches without end, the loss of the best constant answer and that of a good recipe."""

from __future__ import annotations

import io
import lzma
import math
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from skipway.data import load

__all__ = ["TASKS", "Batch", "Task", "set_data"]

Batch = tuple[Tensor, Tensor]
FILES: dict[str, Path] = {}
"""Real data by name, "cifar" (the archive of JPEG images) and "text" (a file of text, .xz or not)."""
VOCAB, CONTEXT = 256, 32
SIDE, NOISE = 16, 0.5
"""Side of the images of "masks" and deviation of their noise."""


@dataclass(frozen=True)
class Task:
    """A supervised task.

    Args:
        size: samples in a batch.
        loss: (output, targets) → scalar.
        batches: (seed) → batches without end, in an order of that seed.
        constant: loss of the best constant answer.
        good: loss that a good recipe reaches in 1,500 steps, measured once by `python -m benchmarks.trainability.good`.
    """

    size: int
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: Callable[[int], Iterator[Batch]]
    constant: Callable[[], float]
    good: float

    def gained(self, loss: float) -> float:
        """Share of the way from the best constant answer to a good recipe: 0 there, 1 here; −1 at the least."""
        if not math.isfinite(loss):
            return -1.0
        return max((self.constant() - loss) / (self.constant() - self.good), -1.0)


def set_data(cifar: Path | None = None, text: Path | None = None) -> None:
    """Say where the real data are; without them the configurations of their tasks are left out."""
    FILES.update({name: path for name, path in (("cifar", cifar), ("text", text)) if path is not None})


@cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1,438 digits that are not test images: (N, 1, 8, 8) of mean 0 and standard deviation 1, labels (N,)."""
    train = load(validation=0.0).train
    images = train.images.permute(0, 3, 1, 2).float()
    return (images - images.mean()) / images.std(), train.labels


@cache
def photographs(count: int = 10_000) -> tuple[Tensor, Tensor]:
    """The first training images of every class of CIFAR-10: (N, 3, 32, 32) of mean 0 and deviation 1, labels (N,)."""
    from PIL import Image

    images, labels, classes = [], [], {}
    with tarfile.open(FILES["cifar"]) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if not member.isfile() or "train" not in parts or int(Path(member.name).stem) >= count // 10:
                continue
            file = archive.extractfile(member)
            assert file is not None
            images.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
            labels.append(classes.setdefault(parts[-2], len(classes)))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return (pixels - pixels.mean()) / pixels.std(), torch.tensor(labels)


@cache
def text() -> Tensor:
    """The first 90 % of the bytes of the text."""
    path = FILES["text"]
    content = path.read_bytes()
    content = lzma.decompress(content) if path.suffix == ".xz" else content
    return torch.tensor(list(content[: len(content) * 9 // 10]), dtype=torch.long)


def shuffled(images: Tensor, labels: Tensor, seed: int, size: int) -> Iterator[Batch]:
    """Full batches without end, in a new order each pass; the incomplete last batch of a pass is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order[: len(order) // size * size].split(size):
            yield images[chosen], labels[chosen]


def windows(seed: int, size: int) -> Iterator[Batch]:
    """Random windows of the text, and their next bytes."""
    data, generator = text(), torch.Generator().manual_seed(seed)
    span = torch.arange(CONTEXT + 1)
    while True:
        chosen = data[torch.randint(len(data) - CONTEXT, (size, 1), generator=generator) + span]
        yield chosen[:, :-1], chosen[:, 1:]


def numbers(seed: int, size: int) -> Iterator[Batch]:
    """Friedman 1991, sec. 4.3: y = 10 sin(π x₁x₂) + 20 (x₃ − ½)² + 10 x₄ + 5 x₅, x uniform on [0, 1]¹⁰, here with x and
    y brought to mean 0 and deviation 1.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.rand(size, 10, generator=generator)
        y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
        yield (x - 0.5) * 12**0.5, ((y - FRIEDMAN_MEAN) / FRIEDMAN_DEVIATION)[:, None]


FRIEDMAN_MEAN, FRIEDMAN_DEVIATION = 14.41, 4.89


def masks(seed: int, size: int) -> Iterator[Batch]:
    """A digit somewhere in noise: images (N, 1, 16, 16), and the mask of its bright pixels (N, 1, 16, 16)."""
    images, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = NOISE * torch.randn(size, 1, SIDE, SIDE, generator=generator)
        y = torch.zeros_like(x)
        chosen = images[torch.randint(len(images), (size,), generator=generator)]
        corners = torch.randint(SIDE - 8 + 1, (size, 2), generator=generator).tolist()
        for number, (top, left) in enumerate(corners):
            x[number, :, top : top + 8, left : left + 8] += chosen[number] - images.min()
            y[number, :, top : top + 8, left : left + 8] = (chosen[number] > 0.8).float()
        yield x, y


def entropy(counts: Tensor) -> float:
    """Of relative frequencies, in nats."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log()).sum())


@cache
def text_entropy() -> float:
    """Of the bytes of the text: the loss of the best constant answer."""
    return entropy(torch.bincount(text(), minlength=VOCAB))


@cache
def mask_entropy() -> float:
    """Of bright and other pixels."""
    images, _ = digits()
    bright = (images > 0.8).float().sum() / (len(images) * SIDE**2)
    return entropy(torch.stack([bright, 1 - bright]))


def token_loss(output: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of (N, T, vocabulary) and (N, T)."""
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


TASKS = {
    "digits": Task(64, F.cross_entropy, lambda seed: shuffled(*digits(), seed, 64), lambda: math.log(10), 0.15),
    "cifar": Task(32, F.cross_entropy, lambda seed: shuffled(*photographs(), seed, 32), lambda: math.log(10), 0.8),
    "text": Task(16, token_loss, lambda seed: windows(seed, 16), text_entropy, 2.2),
    "numbers": Task(64, F.mse_loss, lambda seed: numbers(seed, 64), lambda: 1.0, 0.02),
    "masks": Task(32, F.binary_cross_entropy_with_logits, lambda seed: masks(seed, 32), mask_entropy, 0.03),
}
