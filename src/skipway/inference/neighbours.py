"""What features tell about the images that they were computed from: neighbours, outliers, wrong labels, a map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skipway.errors import SkipwayError

__all__ = [
    "LabelError",
    "Neighbours",
    "find_label_errors",
    "find_outliers",
    "label_votes",
    "nearest_neighbours",
    "principal_plane",
]

NEIGHBOURS = 10
MOST_SIMILARITIES = 2**24
"""Similarities that are held at once."""
AGREEMENT, OWN = 0.8, 0.1
"""Shares of the neighbours that have another label, at least, and the image's own, at most, where it is doubted."""
FEWEST = 6
"""Images of a class below which its labels are not judged: a class is hardly the majority among ten neighbours then."""
FAR, FEWEST_COMPARED = 6.0, 20
"""Deviations below the median similarity of its class at which an image is an outlier, and images of such a class."""
MOST_EXACT = 2048
"""Features up to which the covariance is taken apart exactly."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest other images of each image by the cosine of their centred features.

    Args:
        indices: (N, k), nearest first.
        similarities: (N, k), −1 to 1.
    """

    indices: Tensor
    similarities: Tensor


@dataclass(frozen=True)
class LabelError:
    """An image whose label its neighbours contradict.

    Args:
        index: of the image.
        label: its class.
        other: the class of most of its neighbours.
        agreement: share of the neighbours that have that class.
    """

    index: int
    label: int
    other: int
    agreement: float


def nearest_neighbours(features: Tensor, k: int = NEIGHBOURS) -> Neighbours:
    """Find the k nearest other images of each image, in blocks: memory grows with N, time with N².

    Args:
        features: (N, D), N ≥ 2.
        k: neighbours, at most N − 1 are taken.

    Raises:
        SkipwayError: features of another shape, or that are not finite.

    >>> nearest_neighbours(torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 0.0]]), k=1).indices.flatten().tolist()
    [1, 0, 0]
    """
    if features.ndim != 2 or len(features) < 2:
        raise SkipwayError(f"features={tuple(features.shape)}: the rule is (images, features), of two images at least")
    if not bool(features.isfinite().all()):
        raise SkipwayError("features: the rule is finite numbers")
    rows = features.float()
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    k = min(k, len(rows) - 1)
    indices, similarities = [], []
    size = max(1, MOST_SIMILARITIES // len(rows))
    for start in range(0, len(rows), size):
        block = rows[start : start + size] @ rows.T
        own = torch.arange(len(block))
        block[own, own + start] = -2.0
        values, found = block.topk(k, dim=1)
        indices.append(found)
        similarities.append(values)
    return Neighbours(torch.cat(indices), torch.cat(similarities))


def label_votes(neighbours: Neighbours, labels: Tensor, classes: int) -> Tensor:
    """Shares (N, classes) of each image's ten nearest neighbours that have each label.

    Raises:
        SkipwayError: labels that are not one class index for each image.
    """
    count = len(neighbours.indices)
    if labels.shape != (count,) or (count and not 0 <= int(labels.min()) <= int(labels.max()) < classes):
        raise SkipwayError(f"labels={tuple(labels.shape)}: the rule is {count} class indices from 0 to {classes - 1}")
    votes = torch.nn.functional.one_hot(labels.long()[neighbours.indices[:, :NEIGHBOURS]], classes)
    return votes.float().mean(1)


def find_label_errors(neighbours: Neighbours, labels: Tensor, classes: int) -> list[LabelError]:
    """Images whose neighbours agree on another class, the surest first.

    The share of an image's ten nearest neighbours that have class j stands for its probability of j; its own label does
    not enter. An image is doubted where the probability of another class is 0.8 at least and above the mean of that
    class over the images that carry its label (the threshold of confident learning), and its own label has 0.1 at most.

    That is worth as much as the features: where `label_votes` prefers the label of 95 % of the images nearly all that
    are doubted are wrong, of 65 % about half, of less than 60 % hardly any (CIFAR-10 and digits, 5 % wrong labels).

    Args:
        neighbours: of all images.
        labels: (N,), class indices.
        classes: number of classes.

    Raises:
        SkipwayError: labels that are not one class index for each image.

    Source: Northcutt et al. 2021, "Confident Learning", eq. 1 and 2; the vote of the neighbours as in Wilson 1972.
    """
    votes = label_votes(neighbours, labels, classes)
    counts = torch.bincount(labels, minlength=classes)
    own = votes[torch.arange(len(labels)), labels]
    thresholds = torch.zeros(classes).index_add(0, labels, own) / counts.clamp(min=1)
    others = votes.clone()
    others[torch.arange(len(labels)), labels] = -1.0
    share, other = others.max(1)
    doubted = (share >= thresholds[other].clamp(min=AGREEMENT)) & (own <= OWN) & (counts[labels] >= FEWEST)
    found = doubted.nonzero().flatten()
    order = (share + neighbours.similarities[:, :NEIGHBOURS].mean(1) / 10)[found].argsort(descending=True, stable=True)
    return [
        LabelError(index, int(labels[index]), int(other[index]), float(share[index])) for index in found[order].tolist()
    ]


def find_outliers(neighbours: Neighbours, labels: Tensor) -> list[int]:
    """Images that are far from all others, the farthest first.

    Far is a mean similarity to the neighbours of six deviations below the median of its class, the deviation being
    1.4826 times the median of the distances from the median, as for a normal distribution. The images of classes that
    have fewer than twenty are compared with all images.

    Args:
        neighbours: of all images.
        labels: (N,), class indices.
    """
    mean = neighbours.similarities[:, :NEIGHBOURS].mean(1)
    score = deviations_below(mean)
    for label in labels.unique():
        members = labels == label
        if int(members.sum()) >= FEWEST_COMPARED:
            score[members] = deviations_below(mean[members])
    found = (score > FAR).nonzero().flatten()
    return found[score[found].argsort(descending=True, stable=True)].tolist()


def deviations_below(values: Tensor) -> Tensor:
    """How many deviations each value is below the median of all."""
    median = values.median()
    return (median - values) / (1.4826 * (values - median).abs().median().clamp(min=1e-6))


def principal_plane(features: Tensor) -> Tensor:
    """Coordinates (N, 2) of images on the plane of largest variance of their features, the same every time.

    Each axis points to where its coordinate of largest size is positive.
    """
    rows = features.float() - features.float().mean(0)
    if rows.shape[1] <= MOST_EXACT:
        axes = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -2:].flip(1)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            axes = torch.pca_lowrank(rows, q=2, center=False)[2]
    plane = rows @ axes
    if plane.shape[1] < 2:
        plane = torch.nn.functional.pad(plane, (0, 2 - plane.shape[1]))
    largest = plane.abs().argmax(0)
    return plane * plane[largest, torch.arange(2)].sign()
