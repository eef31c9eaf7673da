"""Random operations per image: RandAugment (Cubuk et al. 2020, arXiv 1909.13719) and TrivialAugment (Müller and
Hutter 2021, arXiv 2103.10158), as tensor operations on a batch.

Both choose uniformly among the same 14 operations; they differ in how many follow each other and how strong they are.
The colour operations are Pillow's, in the same arithmetic. The geometric ones of an image are multiplied into one
matrix and applied last, so that each image is sampled once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from skipway.data.augment import colours

__all__ = ["LAYERS", "OPERATIONS", "POLICY_DRAWS", "apply_policy"]

# operations in a row and the strength in 30ths, as in both papers
LAYERS = {"trivial": 1, "rand": 2}
RAND_STRENGTH = 9
STRENGTHS = 31
# columns of the drawn numbers, per operation in a row: which, how strong, in which direction
COLUMNS = 3
POLICY_DRAWS = COLUMNS * max(LAYERS.values())


class PolicyOp(NamedTuple):
    """One operation: the strength that 30 of 30 stands for, and how an image changes.

    `most` holds the values for RandAugment (table 6 of AutoAugment) and for TrivialAugment's wide ranges. `colour`
    gets images and strengths; `matrix` gets (strengths, width) and gives what maps output places to input places.
    """

    most: tuple[float, float]
    colour: Callable[[Tensor, Tensor], Tensor] | None = None
    matrix: Callable[[Tensor], Tensor] | None = None


def affine_matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Matrices (N, 3, 3) of x' = a x + b y + x0, y' = c x + d y + y0, in halves of the side from the centre."""
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    return torch.stack([a, b, x, c, d, y, zero, zero, one], 1).reshape(-1, 3, 3)


def rotation(degrees: Tensor) -> Tensor:
    """Turns about the centre."""
    angle = degrees * (math.pi / 180)
    zero = torch.zeros_like(angle)
    return affine_matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos(), zero, zero)


def shear_x(share: Tensor) -> Tensor:
    """Rows move sideways in proportion to their distance from the middle."""
    zero, one = torch.zeros_like(share), torch.ones_like(share)
    return affine_matrix(one, share, zero, one, zero, zero)


def shear_y(share: Tensor) -> Tensor:
    """Columns move up or down in proportion to their distance from the middle."""
    zero, one = torch.zeros_like(share), torch.ones_like(share)
    return affine_matrix(one, zero, share, one, zero, zero)


def shift_x(share: Tensor) -> Tensor:
    """Sideways by a share of the width."""
    zero, one = torch.zeros_like(share), torch.ones_like(share)
    return affine_matrix(one, zero, zero, one, 2 * share, zero)


def shift_y(share: Tensor) -> Tensor:
    """Up or down by a share of the height."""
    zero, one = torch.zeros_like(share), torch.ones_like(share)
    return affine_matrix(one, zero, zero, one, zero, 2 * share)


# shifts are shares of the side: AutoAugment's 150 of ImageNet's mean width of 331; TrivialAugment's 32 of CIFAR's 32
OPERATIONS: dict[str, PolicyOp] = {
    "identity": PolicyOp((0, 0)),
    "shear_x": PolicyOp((0.3, 0.99), matrix=shear_x),
    "shear_y": PolicyOp((0.3, 0.99), matrix=shear_y),
    "shift_x": PolicyOp((150 / 331, 1.0), matrix=shift_x),
    "shift_y": PolicyOp((150 / 331, 1.0), matrix=shift_y),
    "rotate": PolicyOp((30, 135), matrix=rotation),
    "brightness": PolicyOp((0.9, 0.99), colours.brightness),
    "colour": PolicyOp((0.9, 0.99), colours.colour),
    "contrast": PolicyOp((0.9, 0.99), colours.contrast),
    "sharpness": PolicyOp((0.9, 0.99), colours.sharpness),
    "posterize": PolicyOp((4, 6), colours.posterize),
    "solarize": PolicyOp((255, 255), colours.solarize),
    "autocontrast": PolicyOp((0, 0), colours.autocontrast),
    "equalize": PolicyOp((0, 0), colours.equalize),
}


def apply_policy(images: Tensor, draws: Tensor, fill: Tensor, policy: str) -> Tensor:
    """Apply to each of the uint8 images (N, H, W, C), H = W, the operations that its row of `draws` selects.

    Args:
        draws: (N, POLICY_DRAWS) on the CPU, so that no operation waits for the device.
        fill: colour (C,) of the area outside the image.
        policy: "trivial" or "rand".
    """
    column = ("rand", "trivial").index(policy)
    matrices: Tensor | None = None
    for layer in range(LAYERS[policy]):
        which, strength, sign = draws[:, COLUMNS * layer : COLUMNS * (layer + 1)].unbind(1)
        chosen = (which * len(OPERATIONS)).long().clamp(max=len(OPERATIONS) - 1)
        steps = (strength * STRENGTHS).floor() if policy == "trivial" else torch.full_like(strength, RAND_STRENGTH)
        signed = torch.where(sign < 0.5, steps, -steps) / (STRENGTHS - 1)
        for number, operation in enumerate(OPERATIONS.values()):
            rows = (chosen == number).nonzero()[:, 0]
            if not len(rows):
                continue
            if operation.matrix is not None:
                if matrices is None:
                    matrices = torch.eye(3).repeat(len(images), 1, 1)
                matrices[rows] = matrices[rows] @ operation.matrix(signed[rows] * operation.most[column])
            elif operation.colour is not None:
                place = rows.to(images.device)
                amount = (signed[rows] * operation.most[column]).to(images.device)
                changed = operation.colour(images[place].float(), amount[:, None, None, None])
                images = images.index_copy(0, place, changed.to(images.dtype))
    return images if matrices is None else warp(images, matrices, fill)


def warp(images: Tensor, matrices: Tensor, fill: Tensor) -> Tensor:
    """Warp images bilinearly by matrices (N, 3, 3) on the CPU; images of the identity are not resampled."""
    rows = (matrices != torch.eye(3)).flatten(1).any(1).nonzero()[:, 0]
    if not len(rows):
        return images
    place = rows.to(images.device)
    planes = (images[place].float() - fill).permute(0, 3, 1, 2)
    transforms = matrices[rows, :2].to(images.device)
    grid = nn.functional.affine_grid(transforms, list(planes.shape), align_corners=False)
    sampled = nn.functional.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    sampled = (sampled.permute(0, 2, 3, 1) + fill).round_().clamp_(0, 255)
    return images.index_copy(0, place, sampled.to(images.dtype))
