"""Stateless random numbers: functions of seed, purpose and epoch.

There is no state to save: a resumed run draws the numbers of an uninterrupted one.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["alternating", "draw_key", "permutation", "uniforms"]


def draw_key(seed: int, *purpose: str | int) -> int:
    """Hash the seed and the purpose to a 63-bit integer.

    >>> draw_key(0, "order", 3) == draw_key(0, "order", 3)
    True
    >>> draw_key(0, "order", 3) == draw_key(0, "order", 4)
    False
    """
    digest = hashlib.blake2b(ascii((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(draw_key(seed, *purpose))


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The order of `count` images in epoch `epoch`: int64 (count,).

    >>> sorted(permutation(5, seed=0, epoch=1).tolist())
    [0, 1, 2, 3, 4]
    """
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def uniforms(count: int, columns: int, seed: int, epoch: int, purpose: str = "augmentation") -> Tensor:
    """Uniform numbers in [0, 1) for the augmentation in epoch `epoch`: float32 (count, columns).

    Row i belongs to image i at any position, so an augmentation depends neither on the batch size nor on the number of
    workers. Each purpose has its own numbers, so that one augmentation more leaves the others unchanged.

    >>> uniforms(2, 3, seed=0, epoch=0).shape
    torch.Size([2, 3])
    """
    return torch.rand(count, columns, generator=generator(seed, purpose, epoch))


def alternating(count: int, seed: int, epoch: int) -> Tensor:
    """Numbers in [0, 1) that are on the other side of 1/2 in every next epoch, uniform in each: float32 (count,).

    A mirror image that is decided by them is seen in every second epoch: two epochs show all images both ways, where
    independent coins would show half of them twice alike (Jordan 2024, arXiv 2404.00498, section 3.6).

    >>> first, second = (alternating(4, seed=0, epoch=epoch) >= 0.5 for epoch in (3, 4))
    >>> bool((first != second).all())
    True
    """
    return (uniforms(count, 1, seed, 0, "flip")[:, 0] + epoch % 2 / 2) % 1
