"""Two images into one: mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899).

The partner of the image at position p of a batch is the image at position p xor 1: neighbours exchange. So a batch
that is divided among ranks into parts of an even size is mixed as the whole batch would be.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from skipway.data.augment.erase import rectangles

__all__ = ["MIXING_DRAWS", "beta", "mix_images", "partners"]

# columns of the drawn numbers: which of both, where the part is cut, and four for the weight
MIXING_DRAWS = 7
WHICH, ROW, COLUMN = range(3)


def beta(draws: Tensor, alpha: float) -> Tensor:
    """Beta(alpha, alpha) from four uniform numbers per row, (N, 4) -> float32 (N,), exactly and without rejection.

    With Z ~ Beta(a + 1, a + 1) by Ulrich's polar method (1984; Devroye 1986, section IX.3) and a gamma variable of
    shape a as one of shape a + 1 times U^(1/a), the sums cancel: logit(X) = logit(Z) + (log U1 - log U2) / a.

    >>> weights = beta(torch.rand(1000, 4), 0.2)
    >>> bool((weights >= 0).all() and (weights <= 1).all())
    True
    """
    smallest = 2.0**-25
    first, angle, low, high = draws.double().clamp(smallest, 1 - smallest).unbind(1)
    centred = (2 * math.pi * angle).cos() * (1 - first ** (2 / (2 * alpha + 1))).sqrt()
    centred = centred.clamp(smallest - 1, 1 - smallest)
    logit = torch.log1p(centred) - torch.log1p(-centred) + (low.log() - high.log()) / alpha
    return logit.sigmoid().float()


def partners(count: int) -> Tensor:
    """The partner of each position: neighbours exchange, the last of an odd number keeps to itself.

    >>> partners(5).tolist()
    [1, 0, 3, 2, 4]
    """
    positions = torch.arange(count)
    return torch.where(positions ^ 1 < count, positions ^ 1, positions)


def mix_images(
    inputs: Tensor, labels: Tensor, draws: Tensor, *, classes: int, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """Mixed inputs (N, C, H, W) and their targets, float32 (N, classes), which sum to 1.

    Args:
        inputs: normalised images.
        labels: class numbers (N,), on the device of the inputs.
        draws: (N, MIXING_DRAWS) on the CPU.
        classes: their number.
        mixup: α of Beta(α, α); 0 is off.
        cutmix: α of Beta(α, α); 0 is off. The target's weight is the area that remains in fact, as in the paper.
    """
    count, _, height, width = inputs.shape
    cuts = draws[:, WHICH] >= 0.5 if mixup and cutmix else torch.full((count,), cutmix > 0)
    blended = beta(draws[:, -4:], mixup) if mixup else torch.ones(count)
    kept = beta(draws[:, -4:], cutmix) if cutmix else torch.ones(count)
    high, wide = ((1 - kept).sqrt() * height).floor(), ((1 - kept).sqrt() * width).floor()
    middle_row, middle_column = (draws[:, ROW] * height).floor(), (draws[:, COLUMN] * width).floor()
    top, left = (middle_row - (high / 2).floor()).clamp(min=0), (middle_column - (wide / 2).floor()).clamp(min=0)
    bottom = (middle_row - (high / 2).floor() + high).clamp(max=height)
    right = (middle_column - (wide / 2).floor() + wide).clamp(max=width)
    inside = rectangles(top, left, bottom - top, right - left, height, width)
    remaining = 1 - inside.float().mean((1, 2))
    share = torch.where(cuts[:, None, None], 1 - inside.float(), blended[:, None, None]).to(inputs.device)
    weight = torch.where(cuts, remaining, blended).to(inputs.device)
    other = partners(count).to(inputs.device)
    images = torch.lerp(inputs[other], inputs, share[:, None].to(inputs.dtype))
    target = nn.functional.one_hot(labels, classes).float()
    return images, torch.lerp(target[other], target, weight[:, None])
