"""Copies of an image in another split, by their pixels: compressed again, resized, brighter or mirrored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from skipway.errors import SkipwayError

__all__ = ["find_duplicates", "thumbnails"]

SIDE = 16
LUMA = (0.299, 0.587, 0.114)
SAME = 0.95
"""Cosine of whitened thumbnails from which two images show the same."""
FLOOR = 0.05
"""Variance that is added in all directions, as a share of the largest: what compression changes counts little."""
FAINT = float(SIDE)
"""Norm of the differences from the mean grey below which an image is even: one grey value of deviation."""
MOST_ELEMENTS = 2**24
"""Similarities that are held at once."""


def thumbnails(images: Tensor) -> Tensor:
    """Grey thumbnails (N, 16, 16), 0 to 255, of images uint8 (N, H, W, C), C 1 or 3; their luma as in JPEG."""
    weights = torch.tensor(LUMA if images.shape[-1] == 3 else (1.0,), device=images.device)
    return adaptive_avg_pool2d((images.float() @ weights)[:, None], SIDE)[:, 0]


def find_duplicates(images: Tensor, splits: Tensor, same: float = SAME) -> list[tuple[int, int, float]]:
    """For each image, the most similar one of the splits before its own, where both show the same.

    Thumbnails are compared without brightness and contrast, and whitened by the covariance of all of them, so that what
    the images of a set have in common (a white background, the place of a face) makes no two of them alike. An image
    is compared mirrored, too. Even images, and thumbnails that are not finite, have no copies.

    Args:
        images: thumbnails (N, 16, 16).
        splits: (N,), 0 for training images, larger for those that must differ from them.
        same: cosine from which two images show the same.

    Returns:
        image, its copy and their cosine, the most similar first.

    Raises:
        SkipwayError: thumbnails and splits of other shapes.

    >>> noise = torch.rand(60, 16, 16, generator=torch.Generator().manual_seed(0)) * 255
    >>> noise[59] = noise[3].flip(1) * 0.5 + 20
    >>> [pair[:2] for pair in find_duplicates(noise, torch.arange(60) // 40)]
    [(59, 3)]
    """
    if images.ndim != 3 or splits.shape != images.shape[:1]:
        raise SkipwayError(
            f"images={tuple(images.shape)}, splits={tuple(splits.shape)}: the rule is thumbnails (N, 16, 16) and "
            "numbers (N,)"
        )
    rows = images.flatten(1) - images.flatten(1).mean(1, keepdim=True)
    plain = (rows.norm(dim=1) >= FAINT).nonzero().flatten()  # nan is no such number
    if not len(plain):
        return []
    rows, splits = normalize(rows[plain], dim=1), splits[plain]
    mirrored = rows.reshape(-1, *images.shape[1:]).flip(2).flatten(1)
    mean = rows.mean(0)
    values, axes = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    whiten = axes * (values.clamp(min=0) + FLOOR * values[-1].clamp(min=1e-6)).rsqrt()
    rows, mirrored = (normalize((each - mean) @ whiten, dim=1) for each in (rows, mirrored))
    pairs = []
    for split in splits.unique().tolist()[1:]:
        before = (splits < split).nonzero().flatten()
        for part in (splits == split).nonzero().flatten().split(max(1, MOST_ELEMENTS // len(before))):
            alike = torch.maximum(rows[part] @ rows[before].T, mirrored[part] @ rows[before].T)
            values, nearest = alike.max(1)
            for index in (values >= same).nonzero().flatten().tolist():
                pairs.append((int(plain[part[index]]), int(plain[before[nearest[index]]]), float(values[index])))
    return sorted(pairs, key=lambda pair: -pair[2])
