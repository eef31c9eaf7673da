"""Batches as functions of (seed, epoch, number): order, each rank's share, augmentation, normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from skipway.data.augment import DRAWS, Augmentation, apply_policy, crop_and_flip, erase_rectangles, mix_images
from skipway.data.augment.crops import FLIP
from skipway.data.augment.erase import ERASING_DRAWS
from skipway.data.augment.mix import MIXING_DRAWS
from skipway.data.augment.policy import POLICY_DRAWS
from skipway.data.randomness import alternating, uniforms

__all__ = [
    "AugmentationDraws",
    "Batch",
    "BatchTransform",
    "normalize",
    "rank_batches",
    "rank_evaluation_batches",
    "resize_batch",
]


class Batch(NamedTuple):
    """Images with their targets.

    Args:
        inputs: normalised float32 (B, C, H, W) in channels-last memory.
        targets: int64 class numbers (B,), or float32 probabilities (B, K) when images are mixed.
        labels: int64 class numbers (B,); for a mixed image, the class of the first.
        numbers: int64 (B,) on the CPU: the index of each image in its split.
    """

    inputs: Tensor
    targets: Tensor
    labels: Tensor
    numbers: Tensor


class AugmentationDraws(NamedTuple):
    """The random numbers of an epoch, one row per image, for each augmentation that is on."""

    crop: Tensor
    policy: Tensor | None
    erasing: Tensor | None
    mixing: Tensor | None

    @classmethod
    def of(cls, augmentation: Augmentation, count: int, seed: int, epoch: int) -> AugmentationDraws:
        """Draw the numbers of epoch `epoch` for `count` images."""

        def drawn(needed: bool, columns: int, purpose: str) -> Tensor | None:
            return uniforms(count, columns, seed, epoch, purpose) if needed else None

        crop = uniforms(count, DRAWS, seed, epoch)
        crop[:, FLIP] = alternating(count, seed, epoch)
        return cls(
            crop,
            drawn(augmentation.policy != "none", POLICY_DRAWS, "policy"),
            drawn(augmentation.erasing > 0, ERASING_DRAWS, "erasing"),
            drawn(augmentation.mixes, MIXING_DRAWS, "mixing"),
        )


def rank_batches(order: Tensor, batch_size: int, start: int, rank: int, world: int) -> list[Tensor]:
    """The image numbers of rank `rank` in each batch from `start` on: a contiguous slice of each batch.

    Incomplete last batches are dropped.

    >>> [numbers.tolist() for numbers in rank_batches(torch.arange(9), 4, 0, rank=1, world=2)]
    [[2, 3], [6, 7]]
    """
    steps = len(order) // batch_size
    share = batch_size // world
    whole = order[: steps * batch_size].reshape(steps, world, share)
    return list(whole[start:, rank].unbind(0))


def rank_evaluation_batches(count: int, batch_size: int, rank: int, world: int) -> list[Tensor]:
    """The image numbers of each evaluation batch of a rank: contiguous, every image on exactly one rank.

    >>> [numbers.tolist() for numbers in rank_evaluation_batches(5, 4, rank=0, world=2)]
    [[0, 1], [2]]
    """
    own = torch.arange(count).tensor_split(world)[rank]
    return list(own.split(max(1, batch_size // world))) if len(own) else []


class BatchTransform:
    """Augment and normalise batches of one epoch.

    Args:
        augmentation: the augmentations that are on.
        draws: the random numbers of the epoch.
        mean: per channel in [0, 1]; subtracted from the inputs, and the fill colour of padding and erasing.
        std: per channel; the inputs are divided by it.
        labels: class number of every image (N,), on the CPU.
        classes: number of classes.
        size: side to resize the batch to; None keeps it.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        draws: AugmentationDraws,
        mean: Sequence[float],
        std: Sequence[float],
        labels: Tensor,
        classes: int,
        size: int | None,
    ) -> None:
        self.augmentation = augmentation
        self.draws = draws
        self.mean = mean
        self.std = std
        self.labels = labels
        self.classes = classes
        self.size = size

    def __call__(self, images: Tensor, numbers: Tensor) -> Batch:
        """Images uint8 (B, H, W, C) on their device and their numbers (B,) on the CPU -> a batch on that device."""
        vary, draws, device = self.augmentation, self.draws, images.device
        fill = torch.tensor(self.mean, device=device).mul(255).round()
        images = crop_and_flip(images, draws.crop[numbers], fill, pad=vary.pad, flip=vary.flip)
        if self.size is not None:
            images = resize_batch(images, self.size)
        if draws.policy is not None:
            images = apply_policy(images, draws.policy[numbers], fill, vary.policy)
        if draws.erasing is not None:
            images = erase_rectangles(images, draws.erasing[numbers], fill, vary.erasing)
        inputs, labels = normalize(images, self.mean, self.std), self.labels[numbers].to(device)
        if draws.mixing is None:
            return Batch(inputs, labels, labels, numbers)
        inputs, targets = mix_images(
            inputs, labels, draws.mixing[numbers], classes=self.classes, mixup=vary.mixup, cutmix=vary.cutmix
        )
        return Batch(inputs.contiguous(memory_format=torch.channels_last), targets, labels, numbers)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std; uint8 (N, H, W, C) -> float32 (N, C, H, W) in channels-last memory."""
    middle = torch.tensor(mean, device=images.device).mul(255)
    scale = torch.tensor(std, device=images.device).mul(255).reciprocal()
    return images.float().sub_(middle).mul_(scale).permute(0, 3, 1, 2)


def resize_batch(images: Tensor, size: int) -> Tensor:
    """uint8 images (N, H, W, C) at size x size: bilinear, antialiased where they shrink.

    >>> resize_batch(torch.full((1, 8, 8, 3), 9, dtype=torch.uint8), 4).shape
    torch.Size([1, 4, 4, 3])
    """
    if images.shape[1:3] == (size, size):
        return images
    planes = images.permute(0, 3, 1, 2).float()
    planes = nn.functional.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
    return planes.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
