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
from skipway.inference.duplicates import find_duplicates
from skipway.inference.metrics import percent
from skipway.inference.neighbours import (
    LabelError,
    find_label_errors,
    find_outliers,
    label_votes,
    nearest_neighbours,
    principal_plane,
)
from skipway.report.chart import Scatter
from skipway.report.run.pictures import Picture, ending, picture_of_pixels

__all__ = ["ImageFeatures", "ImageFindings", "find_in_images", "findings_values", "write_findings"]

TRUSTED = 0.6
"""Share of the images not trained on whose neighbours vote for their label below which the features doubt no labels:
most that they would doubt are mistakes of the features."""
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
        thumbnails: (N, 16, 16), grey; nan where there was no time to read the image.
        origin: how they were computed and of how many images, in words.
    """

    features: Tensor
    labels: Tensor
    splits: tuple[str, ...]
    numbers: Tensor
    thumbnails: Tensor
    origin: str


@dataclass(frozen=True)
class ImageFindings:
    """What the features tell; images are indices into `given`.

    Args:
        given: the features.
        errors: images whose label their neighbours contradict.
        duplicates: image, the image of another split that shows the same, and their similarity, 1 for the same file.
        files: number of them that are the same file.
        outliers: images far from all others.
        plane: (N, 2), coordinates for a map.
        accuracy: share of the images that were not trained on whose neighbours vote for their label.
    """

    given: ImageFeatures
    errors: tuple[LabelError, ...]
    duplicates: tuple[tuple[int, int, float], ...]
    files: int
    outliers: tuple[int, ...]
    plane: Tensor
    accuracy: float

    def sentence(self) -> str:
        """The findings in a line."""
        same = f" ({self.files:,} of them the same file)" if self.files else ""
        parts = [
            f"{counted(len(self.errors), 'label')} that the neighbours contradict" if self.trusted else "",
            f"{counted(len(self.duplicates), 'near-duplicate')} between splits{same}",
            counted(len(self.outliers), "outlier"),
        ]
        return f"{', '.join(filter(None, parts))}, among {counted(len(self.given.labels), 'image')}"

    @property
    def trusted(self) -> bool:
        """Whether the features know the labels well enough to doubt some."""
        return self.accuracy >= TRUSTED

    @property
    def reliability(self) -> str:
        """How well the features know the labels."""
        share = f"The ten nearest images vote for the label of {percent(self.accuracy)} of the images not trained on"
        if not self.trusted:
            return f"{share}, too few to doubt labels by them."
        return f"{share}; the rest are wrong labels and mistakes of the features."


def find_in_images(given: ImageFeatures, data: Data) -> ImageFindings:
    """Find wrong labels and outliers by the features, and near-duplicates by the pixels."""
    neighbours = nearest_neighbours(given.features)
    classes = len(data.classes)
    votes = label_votes(neighbours, given.labels, classes)
    unseen = torch.tensor([split != "train" for split in given.splits])  # the others' features may know their labels
    accuracy = float((votes.argmax(1) == given.labels)[unseen].float().mean())
    duplicates, files = find_copies(given, data)
    return ImageFindings(
        given,
        tuple(find_label_errors(neighbours, given.labels, classes)) if accuracy >= TRUSTED else (),
        duplicates,
        files,
        tuple(find_outliers(neighbours, given.labels)),
        principal_plane(given.features),
        accuracy,
    )


def find_copies(given: ImageFeatures, data: Data) -> tuple[tuple[tuple[int, int, float], ...], int]:
    """Near-duplicates between splits, those with the same file first, and the number of the latter."""
    order = torch.tensor([("train", "validation", "test").index(split) for split in given.splits])
    places = enumerate(zip(given.splits, given.numbers.tolist(), strict=True))
    index = {getattr(data, split).names[number]: place for place, (split, number) in places}
    files = [(index[file], index[twin], 1.0) for twin, file in data.leaked if file in index and twin in index]
    known = {image for image, _, _ in files}
    alike = [pair for pair in find_duplicates(given.thumbnails, order) if pair[0] not in known]
    return (*files, *alike), len(files)


def pixels_at(given: ImageFeatures, index: int, data: Data) -> Tensor:
    """Pixels, uint8 (H, W, C), of an image."""
    images = getattr(data, given.splits[index])
    return next(iter(images.fetch([given.numbers[index : index + 1]], torch.device("cpu"), None)))[0]


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
        "reliability": found.reliability,
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
    for first, second, similarity in found.duplicates:
        twin = getattr(data, given.splits[second]).names[int(given.numbers[second])]
        write("duplicate", first, f"{given.splits[second]}: {twin}", round(similarity, 4))
    for index in found.outliers:
        write("outlier", index, "", "")
    content = text.getvalue().encode("utf-8", "backslashreplace")
    write_atomically(path, lambda aside: aside.write_bytes(content))
