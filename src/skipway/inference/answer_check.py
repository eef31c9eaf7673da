"""Whether a network that computes in coarser numbers gives the answers that it gave: top-1 on held-out images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipway.errors import SkipwayError, counted
from skipway.inference.evaluation import Z_95, wilson_interval
from skipway.inference.metrics import percent
from skipway.tracing.example import batches_of, split_batch

__all__ = ["AnswerChange", "AnswerCheck", "collect_images", "collect_labelled", "paired_interval", "points"]

FORMS = "a tensor, or a DataLoader or another iterable of batches"
OWN = "the model's own answers, model(images).argmax(1), ask for agreement with it"
HIGHEST_LIMIT = 0.1


def paired_interval(broken: int, mended: int, total: int) -> tuple[float, float]:
    """The 95 % interval of how far the accuracy falls between two networks on the same images, as shares.

    With one half added to each cell of the table of pairs (Agresti and Min 2005, "Simple improved confidence intervals
    for comparing matched proportions"): d = (b - c) / n, d ± z sqrt(b + c - (b - c)² / n) / n, where b = broken + 1/2,
    c = mended + 1/2 and n = total + 2.

    Args:
        broken: images that the first network classifies correctly and the second does not.
        mended: images that the second classifies correctly and the first does not.
        total: images.

    >>> tuple(round(bound, 4) for bound in paired_interval(20, 15, 5000))
    (-0.0014, 0.0034)
    """
    b, c, n = broken + 0.5, mended + 0.5, total + 2
    fall = (b - c) / n
    half = Z_95 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return fall - half, fall + half


@dataclass(frozen=True)
class AnswerChange:
    """The answers of a network before and after its numbers became coarser, on the same held-out images.

    Args:
        images: number of them.
        before: correctly classified by the original in its own type.
        broken: of these, no longer.
        mended: correctly classified only now.
        limit: share of the images by which the accuracy may fall.
    """

    images: int
    before: int
    broken: int
    mended: int
    limit: float

    @property
    def after(self) -> int:
        """Correctly classified images now."""
        return self.before - self.broken + self.mended

    @property
    def fall(self) -> float:
        """By how much the accuracy falls, as a share of the images; negative where it rises."""
        return (self.broken - self.mended) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the fall on any such images, see `paired_interval`."""
        return paired_interval(self.broken, self.mended, self.images)

    @property
    def kept(self) -> bool:
        """Whether the accuracy falls by no more than the limit on these images."""
        return self.broken - self.mended <= self.limit * self.images + 1e-9

    @property
    def refusal(self) -> str:
        """Why the answers are not kept; empty where they are."""
        return "" if self.kept else f"{self}, more than {points(self.limit)}"

    @property
    def doubt(self) -> str:
        """A sentence where so few images cannot exclude a fall beyond the limit; empty where they can."""
        high = self.interval[1]
        if high <= self.limit:
            return ""
        sentence = (
            f"{counted(self.images, 'held-out image')} cannot exclude a fall of more than {points(self.limit)}: the "
            f"95 % interval reaches {points(high)}"
        )
        needed = self.needed
        return sentence if not needed else f"{sentence}; some {needed:,} could"

    @property
    def needed(self) -> int:
        """How many images, in two digits, would exclude a fall beyond the limit if as large a share of them changed and
        the accuracy fell as here; 0 where none would.
        """
        room = self.limit - max(0.0, self.fall)
        if room <= 0:
            return 0
        # n of z sqrt(share n + 1) / n = room
        square, share = Z_95**2, (self.broken + self.mended) / self.images
        number = (square * share + math.sqrt((square * share) ** 2 + 4 * square * room**2)) / (2 * room**2)
        unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
        return max(self.images + 1, math.ceil(number / unit) * unit)

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.interval)
        before, after = (100 * correct / self.images for correct in (self.before, self.after))
        verb, by = ("falls", self.fall) if self.fall > 0 else ("rises", -self.fall)
        moved = f"{verb} by {points(by)}" if self.fall else "stays"
        return (
            f"top-1 {before:.2f} % → {after:.2f} % of {counted(self.images, 'held-out image')}: it {moved} "
            f"(95 % interval of the fall {low:+.2f} to {high:+.2f})"
        )


def points(share: float) -> str:
    """A difference of shares in words.

    >>> points(0.005), points(0.01)
    ('0.50 points', '1.00 points')
    """
    return f"{100 * share:.2f} points"


@dataclass
class AnswerCheck:
    """Held-out images with their classes, and how far the accuracy may fall on them.

    Args:
        images: (N, …), as the model takes them; N is 1 or more.
        labels: int64 (N,), the classes.
        limit: largest fall of the accuracy, a share of the images from 0 to 0.1, 0.005 for half a point; or 1 for any.
        batch: images of one call.

    Raises:
        SkipwayError: the images and labels do not fit each other, are none, or not finite; or an unlikely limit.
    """

    images: Tensor
    labels: Tensor
    limit: float = 0.005
    batch: int = 16
    correct: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not (0 <= self.limit <= HIGHEST_LIMIT or self.limit == 1):
            raise SkipwayError(
                f"limit={self.limit:g}: the rule is a share from 0 to 0.1, or 1 for any answers; 0.005 is half a point"
            )
        if not len(self.images):
            raise SkipwayError("check: it holds no image; the rule is one or more, and some thousand tell most")
        if self.labels.ndim != 1 or self.labels.is_floating_point() or len(self.labels) != len(self.images):
            raise SkipwayError(
                f"check: labels of shape {tuple(self.labels.shape)} in {str(self.labels.dtype).removeprefix('torch.')} "
                f"for {counted(len(self.images), 'image')}; the rule is one class number for each image"
            )
        require_finite("check", self.images)
        self.images, self.labels = self.images.contiguous(), self.labels.cpu().long()

    def watch(self, original: Callable[[Tensor], Any]) -> None:
        """Find which images the original classifies correctly; `change` compares with it.

        Raises:
            SkipwayError: it returns no scores of classes, or guesses.
        """
        first = original(self.images[: self.batch].clone())
        if not isinstance(first, Tensor) or first.ndim != 2 or first.shape[1] < 2:
            shape = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise SkipwayError(f"check: the model returns {shape}; the rule is scores of two or more classes, (N, K)")
        classes = first.shape[1]
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= classes:
            raise SkipwayError(
                f"check: labels from {int(self.labels.min())} to {int(self.labels.max())}, and the model has "
                f"{classes} classes; the rule is 0 to {classes - 1}"
            )
        correct = self.correct_of(original)
        known, total = int(correct.sum()), len(correct)
        if wilson_interval(known, total)[0] <= 1 / classes:
            raise SkipwayError(
                f"check: the model itself classifies {percent(known / total)} of {counted(total, 'image')} correctly, "
                f"which may be guessing among {classes} classes, so nothing would show that its answers are kept; "
                f"give labels in the order of its outputs and images as it was trained on, or more of them; {OWN}"
            )
        self.correct = correct

    @torch.no_grad()
    def correct_of(self, run: Callable[[Tensor], Any]) -> Tensor:
        """Which images a network classifies correctly, bool (N,); it is called with whole batches alone, and with
        copies, since it may write into its input.
        """
        correct = []
        for images, labels in self.batches():
            answers = run(images.clone())[: len(labels)].argmax(1).cpu()
            correct.append(answers == labels)
        return torch.cat(correct)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Batches with their labels; the last one is filled up with copies of the last image."""
        pairs = list(zip(self.images.split(self.batch), self.labels.split(self.batch), strict=True))
        images, labels = pairs[-1]
        rest = self.batch - len(images)
        if rest:
            pairs[-1] = torch.cat([images, images[-1:].expand(rest, *images.shape[1:])]), labels
        return pairs

    def change(self, run: Callable[[Tensor], Any]) -> AnswerChange:
        """Compare the answers of a network with those of the original."""
        assert self.correct is not None
        now = self.correct_of(run)
        broken, mended = int((self.correct & ~now).sum()), int((now & ~self.correct).sum())
        return AnswerChange(len(now), int(self.correct.sum()), broken, mended, self.limit)

    def overlap(self, calibration: Tensor) -> str:
        """A sentence where some of the images are among those of a calibration; empty where none is."""
        known = set(map(digest, calibration))
        seen = sum(digest(image) in known for image in self.images)
        if not seen:
            return ""
        return f"{seen:,} of {counted(len(self.images), 'held-out image')} are calibration images, too: give others"


def digest(image: Tensor) -> bytes:
    """What tells an image from others, in any type: NumPy knows no bfloat16.

    >>> digest(torch.ones(2, dtype=torch.bfloat16)) == digest(torch.ones(4, dtype=torch.bfloat16)[::2])
    True
    """
    numbers = image.flatten().contiguous().cpu().view(torch.uint8)
    return hashlib.blake2b(numbers.numpy().tobytes(), digest_size=16).digest()


def require_finite(name: str, images: Tensor) -> None:
    """Refuse images with values that are not finite.

    Raises:
        SkipwayError: there are some.
    """
    if not images.is_floating_point():
        return
    broken = ~images.flatten(1).isfinite().all(1)
    if bool(broken.any()):
        raise SkipwayError(
            f"{name}: {counted(int(broken.sum()), 'image')} of {len(images):,} with values that are not finite, the "
            f"first at {int(broken.nonzero()[0])}; the rule is finite values, which ranges are measured on"
        )


def collect_images(source: Any, most: int, name: str = "calibration") -> Tensor:
    """Return up to so many images: of a tensor those at equal distances, of batches the first; labels are left out.

    Raises:
        SkipwayError: there are none, their shapes differ, or they are not finite.

    >>> collect_images(torch.arange(8.0)[:, None], 2).flatten().tolist()
    [0.0, 4.0]
    """
    if isinstance(source, Tensor):
        images = source[torch.arange(min(most, len(source))) * len(source) // max(1, min(most, len(source)))]
    elif isinstance(source, str | bytes | Path) or (batches := batches_of(source)) is None:
        raise SkipwayError(f"{name}={type(source).__name__}: the rule is {FORMS}, or the folder of a run")
    else:
        parts, held = [], 0
        for batch in batches:
            part = split_batch(batch)[0]
            if not isinstance(part, Tensor):
                raise SkipwayError(f"{name}: a batch of {type(part).__name__}; the rule is one tensor of images")
            parts.append(part[: most - held])
            held += len(parts[-1])
            if held >= most:
                break
        images = join(parts, name)
    if not images.ndim or not len(images):
        raise SkipwayError(f"{name}: it holds no image; the rule is one or more, and {most} are used")
    require_finite(name, images)
    return images.detach().contiguous()


def collect_labelled(source: Any, name: str = "check") -> tuple[Tensor, Tensor]:
    """Return all images and labels: of a pair of tensors, or of batches of such pairs.

    Raises:
        SkipwayError: labels are missing, or there is no image.
    """
    if isinstance(source, tuple | list) and len(source) == 2 and all(isinstance(each, Tensor) for each in source):
        return source[0].detach(), source[1]
    batches = None if isinstance(source, Tensor | str | bytes | Path) else batches_of(source)
    if batches is None:
        raise SkipwayError(
            f"{name}={type(source).__name__}: the rule is held-out images with their classes, (images, labels), or a "
            f"DataLoader or another iterable of such batches; {OWN}"
        )
    images, labels = [], []
    for batch in batches:
        part, targets = split_batch(batch)
        if not isinstance(part, Tensor) or not isinstance(targets, Tensor):
            raise SkipwayError(f"{name}: a batch without labels; the rule is (images, labels); {OWN}")
        images.append(part)
        labels.append(targets)
    if not images:
        raise SkipwayError(f"{name}: it holds no image; the rule is one or more, and some thousand tell most")
    return join(images, name).detach(), torch.cat(labels)


def join(parts: list[Tensor], name: str) -> Tensor:
    """Batches of images as one.

    Raises:
        SkipwayError: their shapes differ.
    """
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise SkipwayError(f"{name}: images of shapes {sorted(shapes)}; the rule is one shape")
    return torch.cat(parts) if parts else torch.zeros(0)
