"""Which variations are on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Augmentation", "Policy"]

Policy = Literal["none", "trivial", "rand"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are varied, in this order.

    Args:
        crop: "pad": shift by up to `pad` pixels each way, filling with the mean colour (He 2015, section 4.2);
            "resized": cut out a random part and scale it to the input size; "none": the image as it is.
        pad: pixels of padding for "pad".
        flip: mirror each image left to right with probability 1/2.
        policy: "trivial": one operation of random strength per image (Müller 2021, TrivialAugment, "wide" ranges);
            "rand": two operations of strength 9 of 30 (Cubuk 2020, RandAugment); "none": neither.
        erasing: probability that a rectangle of an image is painted in the mean colour (Zhong 2020).
        mixup: α of Beta(α, α) for the weight at which an image is blended with its partner (Zhang 2018); 0: off.
        cutmix: α of Beta(α, α) for the share of an image that its partner replaces (Yun 2019); 0: off. With both on,
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
        """Whether an image's target is more than its own class."""
        return self.mixup > 0 or self.cutmix > 0
