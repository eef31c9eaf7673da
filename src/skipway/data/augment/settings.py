"""The augmentations that are on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Augmentation", "Policy"]

Policy = Literal["none", "trivial", "rand"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The augmentations of training images, applied in this order.

    Args:
        crop: "pad": a random crop after padding with the mean colour, torchvision's `RandomCrop(padding=pad)` (He 2015,
            section 4.2); "resized": a random part scaled to the input size, `RandomResizedCrop`; "none": neither.
        pad: padding in pixels, for "pad".
        flip: horizontal flip with probability 1/2.
        policy: "trivial": one operation of random strength per image (Müller 2021, TrivialAugment, "wide" ranges);
            "rand": two operations of strength 9 of 30 (Cubuk 2020, RandAugment); "none": neither.
        erasing: probability that a rectangle is erased with the mean colour (Zhong 2020, random erasing).
        mixup: α of Beta(α, α) for the weight at which an image is blended with its partner (Zhang 2018); 0: off.
        cutmix: α of Beta(α, α) for the fraction of an image that its partner replaces (Yun 2019); 0: off. With both on,
            each image takes either with probability 1/2.
    """

    crop: Literal["pad", "resized", "none"] = "none"
    pad: int = 0
    flip: bool = False
    policy: Policy = "none"
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether targets are probabilities over several classes."""
        return self.mixup > 0 or self.cutmix > 0
