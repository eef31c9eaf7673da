"""What the features of a run's images tell: likely wrong labels, near-duplicates between splits, outliers, a map."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipway.checkpoint.files import write_atomically
from skipway.data import Data
from skipway.errors import counted, printable
from skipway.inference.neighbours import (
    LabelError,
    find_label_errors,
    find_outliers,
    nearest_neighbours,
    principal_plane,
)
from skipway.report.chart import Scatter
from skipway.report.run.pictures import Picture, ending, picture_of_pixels

__all__ = ["ImageFeatures", "ImageFindings", "find_in_images", "findings_values", "write_findings"]

SIMILAR = 0.9
"""Cosine of features from which two images are compared by their pixels."""
SAME_PIXELS, SAME_SMALL, SMALL = 0.98, 0.995, 32
"""Correlation of two images, reduced to 16 × 16 grey pixels, from which they are near-duplicates; that of images whose
sides are below 32 pixels, where different ones are alike, too."""
REDUCED = 16
CANDIDATES, MOST_PAIRS = 30, 200
"""Neighbours of an image that may be its copy, and pairs that are compared by their pixels, the most similar first."""
SHOWN, MOST_POINTS, MOST_COLORED = 16, 1500, 12
"""Pictures of each kind, points of the map, and classes up to which each has a colour."""


@dataclass(frozen=True)
class ImageFeatures:
    """Features of images of a run.

    Args:
        features: (N, D), what goes into the classifier.
        labels: (N,).
        splits: of each image.
        numbers: (N,), within its split.
        origin: how they were computed and of how many images, in words.
    """

    features: Tensor
    labels: Tensor
    splits: tuple[str, ...]
    numbers: Tensor
    origin: str


@dataclass(frozen=True)
class ImageFindings:
    """What the features tell; images are indices into `given`.

    Args:
        given: the features.
        errors: images whose label their neighbours contradict.
        duplicates: pairs of images of two splits that show the same, with the correlation of their pixels.
        outliers: images far from all others.
        plane: (N, 2), coordinates for a map.
    """

    given: ImageFeatures
    errors: tuple[LabelError, ...]
    duplicates: tuple[tuple[int, int, float], ...]
    outliers: tuple[int, ...]
    plane: Tensor

    def sentence(self) -> str:
        """The findings in a line."""
        parts = [
            f"{counted(len(self.errors), 'label')} that the neighbours contradict",
            counted(len(self.duplicates), "near-duplicate") + " between splits",
            counted(len(self.outliers), "outlier"),
        ]
        return f"{', '.join(parts)}, among {len(self.given.labels):,} images"


def find_in_images(given: ImageFeatures, data: Data) -> ImageFindings:
    """Find wrong labels, near-duplicates and outliers by the features, and confirm duplicates in the pixels."""
    neighbours = nearest_neighbours(given.features, CANDIDATES)
    pairs = []
    for index, (others, similarities) in enumerate(
        zip(neighbours.indices.tolist(), neighbours.similarities.tolist(), strict=True)
    ):
        for other, similarity in zip(others, similarities, strict=True):
            if similarity >= SIMILAR and given.splits[index] != given.splits[other]:
                pairs.append((similarity, min(index, other), max(index, other)))
    confirmed = []
    for _, first, second in sorted(set(pairs), reverse=True)[:MOST_PAIRS]:
        pictures = [pixels_at(given, index, data) for index in (first, second)]
        correlation = pixel_correlation(*pictures)
        if correlation >= (SAME_PIXELS if min(pictures[0].shape[:2]) >= SMALL else SAME_SMALL):
            confirmed.append((first, second, correlation))
    return ImageFindings(
        given,
        tuple(find_label_errors(neighbours, given.labels, len(data.classes))),
        tuple(confirmed),
        tuple(find_outliers(neighbours)),
        principal_plane(given.features),
    )


def pixels_at(given: ImageFeatures, index: int, data: Data) -> Tensor:
    """Pixels, uint8 (H, W, C), of an image."""
    images = getattr(data, given.splits[index])
    return next(iter(images.fetch([given.numbers[index : index + 1]], torch.device("cpu"), None)))[0]


def pixel_correlation(first: Tensor, second: Tensor) -> float:
    """Correlation of two images (H, W, C), reduced to 16 × 16 grey pixels; of one of them mirrored, if that is larger.

    It does not change with brightness and contrast, and hardly with resolution and compression. Even images have none.
    """
    rows = []
    for image in (first, second, second.flip(1)):
        grey = image.float().mean(-1)[None, None]
        small = torch.nn.functional.adaptive_avg_pool2d(grey, REDUCED).flatten()
        rows.append(small - small.mean())
    sizes = [row.norm() for row in rows]
    if min(sizes) < REDUCED:  # less than a grey value of deviation
        return 0.0
    return max(float(rows[0] @ row / (sizes[0] * size)) for row, size in zip(rows[1:], sizes[1:], strict=True))


def file_of(given: ImageFeatures, index: int, data: Data) -> str:
    """The name of an image's file."""
    return printable(getattr(data, given.splits[index]).names[int(given.numbers[index])])


def findings_values(found: ImageFindings, data: Data, names: Sequence[str]) -> dict[str, Any]:
    """Values of the section of the page."""
    given = found.given

    def picture(index: int, title: str, *lines: str) -> Picture:
        file = file_of(given, index, data)
        return picture_of_pixels(
            pixels_at(given, index, data), file, title, (*lines, given.splits[index]), ending(file)
        )

    return {
        "sentence": found.sentence(),
        "origin": given.origin,
        "errors": [
            picture(each.index, f"{names[each.other]}? {100 * each.agreement:.0f} %", f"label: {names[each.label]}")
            for each in found.errors[:SHOWN]
        ],
        "duplicates": [
            picture(index, f"pair {number}", names[int(given.labels[index])])
            for number, (first, second, _) in enumerate(found.duplicates[: SHOWN // 2], 1)
            for index in (first, second)
        ],
        "outliers": [picture(index, "", names[int(given.labels[index])]) for index in found.outliers[:SHOWN]],
        "map": image_map(found, data, names),
    }


def image_map(found: ImageFindings, data: Data, names: Sequence[str]) -> Scatter:
    """The map of the images: by class, or, of many classes, the findings among all others."""
    given, marked = found.given, {each.index for each in found.errors} | set(found.outliers)
    step = max(1, -(-len(given.labels) // MOST_POINTS))
    groups: dict[str, list[tuple[float, float, str]]] = {}
    colored = len(names) <= MOST_COLORED
    for index in range(len(given.labels)):
        if index % step and index not in marked:
            continue
        label = names[int(given.labels[index])]
        group = label if colored else "findings" if index in marked else "images"
        words = f"{file_of(given, index, data)} ({label})" if index in marked else ""
        groups.setdefault(group, []).append((*found.plane[index].tolist(), words))
    order = (
        [name for name in names if name in groups] if colored else [n for n in ("images", "findings") if n in groups]
    )
    some = f" Shown are one image in {step} and all findings." if step > 1 else ""
    return Scatter(
        title="Map of the images",
        groups=tuple((name, tuple(groups[name])) for name in order),
        note=f"The plane of largest variance of the features. Larger points: findings.{some}",
    )


def write_findings(path: Path, found: ImageFindings, data: Data) -> None:
    """Write all findings as CSV: kind, split, file, label, and what the neighbours say."""
    given, names = found.given, data.classes
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["kind", "split", "file", "label", "other", "score"])

    def write(kind: str, index: int, other: str, score: float | str) -> None:
        file = getattr(data, given.splits[index]).names[int(given.numbers[index])]
        rows.writerow([kind, given.splits[index], file, names[int(given.labels[index])], other, score])

    for each in found.errors:
        write("label", each.index, names[each.other], round(each.agreement, 3))
    for first, second, correlation in found.duplicates:
        twin = getattr(data, given.splits[second]).names[int(given.numbers[second])]
        write("duplicate", first, f"{given.splits[second]}: {twin}", round(correlation, 4))
    for index in found.outliers:
        write("outlier", index, "", "")
    content = text.getvalue().encode()
    write_atomically(path, lambda aside: aside.write_bytes(content))
