"""The config of the ResNet family: independent numbers only, derived ones are properties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from skipway.schemes import Identity, Scheme
from skipway.validation import check_blocks, check_choice, check_positive_int

__all__ = ["MAPS", "ResNetConfig"]

MAPS = {"basic": 2, "bottleneck": 3}
"""Weight layers on the path of a block."""


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """A ResNet of any kind.

    Args:
        blocks: residual blocks per stage; every stage but the first doubles the width, and halves the image as
            `transition` says.
        block: "basic" (3×3 – 3×3) or "bottleneck" (1×1 – 3×3 – 1×1).
        width: channels of the inner convolutions in the first stage.
        groups: of the bottleneck's 3×3 (ResNeXt's cardinality).
        base_width: inner channels per group for 64 channels (ResNeXt, Wide-ResNet-50-2).
        stem: "imagenet" (7×7 / 2, max-pool / 2, 64 channels), "cifar" (3×3), "patch" (4×4 / 2), or in place of the 7×7
            three 3×3: "deep" (a half, a half and all of the channels, ResNet-C) or "tiered" (three eighths, a half,
            all).
        stem_width: channels after the stem.
        shortcut: where shapes change: "projection" (1×1 convolution, option B), "pooled" (the mean of 2×2 pixels, then
            the 1×1 convolution, ResNet-D) or "pad" (zeros, option A).
        transition: what halves the image: "strided" (the first block of every stage but the first) or "pooled" (before
            the blocks of every stage a 3×3 convolution to its width and the maxima of 2×2 pixels, for the first stage
            in the stem; all connections then carry x unchanged, ResNet-9).
        placement: "original" (v1: conv-norm-act, act after the addition) or "preactivation" (v2).
        squeeze: reduction of a squeeze-and-excitation gate in every branch; None for no gate.
        squeeze_least: hidden units of a gate at least; timm has 8, which matters to 64 channels only.
        classes: outputs of the classifier.
        channels: of the input images.
        scheme: how the connections are dressed.

    ResNet-C and ResNet-D: He, T. et al. 2019, "Bag of Tricks for Image Classification with CNNs", fig. 2. ResNet-9:
    Page 2018, "How to Train Your ResNet"; Jordan 2024, arXiv 2404.00498, pools likewise.

    >>> ResNetConfig(blocks=(3, 4, 6, 3)).depth
    50
    """

    blocks: tuple[int, ...]
    block: Literal["basic", "bottleneck"] = "bottleneck"
    width: int = 64
    groups: int = 1
    base_width: int = 64
    stem: Literal["imagenet", "cifar", "patch", "deep", "tiered"] = "imagenet"
    stem_width: int = 64
    shortcut: Literal["projection", "pooled", "pad"] = "projection"
    transition: Literal["strided", "pooled"] = "strided"
    placement: Literal["original", "preactivation"] = "original"
    squeeze: int | None = None
    squeeze_least: int = 1
    classes: int = 1000
    channels: int = 3
    scheme: Scheme = Identity()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", check_blocks(self.blocks))
        for name in ("width", "groups", "base_width", "stem_width", "squeeze_least", "classes", "channels"):
            check_positive_int(name, getattr(self, name))
        for name, allowed in (
            ("block", ("basic", "bottleneck")),
            ("stem", ("imagenet", "cifar", "patch", "deep", "tiered")),
            ("shortcut", ("projection", "pooled", "pad")),
            ("transition", ("strided", "pooled")),
            ("placement", ("original", "preactivation")),
        ):
            check_choice(name, getattr(self, name), allowed)

    @property
    def branches(self) -> int:
        """L, the number of residual branches: one per block."""
        return sum(self.blocks)

    @property
    def transitions(self) -> int:
        """Pooled convolutions in front of the stages, the first of them in the stem; no connection spans them."""
        return len(self.blocks) if self.transition == "pooled" else 0

    @property
    def depth(self) -> int:
        """Weight layers on the longest path: stem (a deep one is one), transitions, branches, classifier."""
        return MAPS[self.block] * self.branches + self.transitions + 2
