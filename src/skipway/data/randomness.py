"""Randomness as a function of what it is for: the same seed, purpose and epoch always give the same draws.

Nothing here has a state, so there is nothing to save: a run that continues draws what an uninterrupted one draws.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["draw_key", "permutation", "uniforms"]


def draw_key(seed: int, *purpose: str | int) -> int:
    """A 63-bit integer that depends on the seed and on every part of the purpose, and on nothing else.

    >>> draw_key(0, "order", 3) == draw_key(0, "order", 3)
    True
    >>> draw_key(0, "order", 3) == draw_key(0, "order", 4)
    False
    """
    digest = hashlib.blake2b(ascii((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A fresh generator on the CPU for one purpose."""
    return torch.Generator().manual_seed(draw_key(seed, *purpose))


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The order in which epoch `epoch` visits `count` images; int64 of shape (count,).

    >>> sorted(permutation(5, seed=0, epoch=1).tolist())
    [0, 1, 2, 3, 4]
    """
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def uniforms(count: int, columns: int, seed: int, epoch: int, purpose: str = "augmentation") -> Tensor:
    """Numbers in [0, 1) for the augmentation of every image in epoch `epoch`; float32 of shape (count, columns).

    Row i belongs to image i wherever the order places it, so neither the batch size nor the number of worker
    processes changes how an image is augmented. Each purpose has its own numbers, so that one variation more leaves
    the others as they were.

    >>> uniforms(2, 3, seed=0, epoch=0).shape
    torch.Size([2, 3])
    """
    return torch.rand(count, columns, generator=generator(seed, purpose, epoch))
