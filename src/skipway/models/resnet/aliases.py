"""Names of the ResNet family in timm and torchvision."""

from __future__ import annotations

from typing import Any

__all__ = ["ALIASES", "ELSEWHERE"]

C = {"stem": "deep"}
D = {"stem": "deep", "shortcut": "pooled"}
S = {"stem": "deep", "stem_width": 128}
T = {"stem": "tiered", "shortcut": "pooled"}
SE = {"squeeze": 16}
"""Reduction of timm's gates. It rounds their hidden units to multiples of 8, so those of 64 channels have 8, not 4."""

ALIASES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "resnet": {
        # torchvision and timm
        "resnet18": ("resnet18", {}),
        "resnet34": ("resnet34", {}),
        "resnet50": ("resnet50", {}),
        "resnet101": ("resnet101", {}),
        "resnet152": ("resnet152", {}),
        # timm; its 26 are ImageNet's bottlenecks, where the depth dial has a CIFAR net (see `published`)
        "resnet26": ("resnet-imagenet26", {}),
        "resnet200": ("resnet200", {}),
        "resnet50c": ("resnet50", C),
        "resnet101c": ("resnet101", C),
        "resnet152c": ("resnet152", C),
        "resnet18d": ("resnet18", D),
        "resnet26d": ("resnet-imagenet26", D),
        "resnet34d": ("resnet34", D),
        "resnet50d": ("resnet50", D),
        "resnet101d": ("resnet101", D),
        "resnet152d": ("resnet152", D),
        "resnet200d": ("resnet200", D),
        "resnet50s": ("resnet50", S),
        "resnet101s": ("resnet101", S),
        "resnet152s": ("resnet152", S),
        "resnet10t": ("resnet-imagenet10", T),
        "resnet14t": ("resnet-imagenet14", T),
        "resnet26t": ("resnet-imagenet26", T),
        "resnet50t": ("resnet50", T),
    },
    "resnetv2": {
        "resnetv2_18": ("resnetv2-18", {}),
        "resnetv2_34": ("resnetv2-34", {}),
        "resnetv2_50": ("resnetv2-50", {}),
        "resnetv2_101": ("resnetv2-101", {}),
        "resnetv2_152": ("resnetv2-152", {}),
        "resnetv2_18d": ("resnetv2-18", D),
        "resnetv2_34d": ("resnetv2-34", D),
        "resnetv2_50d": ("resnetv2-50", D),
        "resnetv2_101d": ("resnetv2-101", D),
        "resnetv2_152d": ("resnetv2-152", D),
        "resnetv2_50t": ("resnetv2-50", T),
    },
    "resnext": {
        # torchvision and timm
        "resnext50_32x4d": ("resnext50-32x4d", {}),
        "resnext101_32x8d": ("resnext101-32x8d", {}),
        "resnext101_64x4d": ("resnext101-64x4d", {}),
        # timm
        "resnext50d_32x4d": ("resnext50-32x4d", D),
        "resnext101_32x4d": ("resnext101-32x8d", {"base_width": 4}),
        "resnext101_32x16d": ("resnext101-32x8d", {"base_width": 16}),
        "resnext101_32x32d": ("resnext101-32x8d", {"base_width": 32}),
        "seresnext26d_32x4d": ("resnext-26", {**SE, **D}),
        "seresnext26t_32x4d": ("resnext-26", {**SE, **T}),
        "seresnext50_32x4d": ("resnext50-32x4d", SE),
        "seresnext101_32x4d": ("resnext101-32x8d", {**SE, "base_width": 4}),
        "seresnext101_32x8d": ("resnext101-32x8d", SE),
        "seresnext101_64x4d": ("resnext101-64x4d", SE),
        "seresnext101d_32x8d": ("resnext101-32x8d", {**SE, **D}),
    },
    "wide-resnet": {
        # torchvision and timm
        "wide_resnet50_2": ("wide-resnet50-2", {}),
        "wide_resnet101_2": ("wide-resnet101-2", {}),
    },
    "se-resnet": {
        "seresnet18": ("se-resnet18", {"squeeze_least": 8}),
        "seresnet34": ("se-resnet34", {"squeeze_least": 8}),
        "seresnet50": ("se-resnet50", {}),
        "seresnet101": ("se-resnet101", {}),
        "seresnet152": ("se-resnet152", {}),
        "seresnet50t": ("se-resnet50", T),
        "seresnet152d": ("se-resnet152", D),
        "seresnet200d": ("se-resnet200", D),
        "seresnet269d": ("se-resnet152", {**D, "blocks": (3, 30, 48, 8)}),
    },
}
"""By family: entry point, without the tag after the dot, → our variant and the options that `build` needs besides.

timm's letters: c, three 3×3 convolutions in the stem; d, and pooled projections besides; s, c with twice the stem; t, d
with a first convolution of 24 channels (He, T. et al. 2019, "Bag of Tricks", fig. 2; timm's `resnet.py`).
"""

ANTIALIASED = "a pooling between the 3×3 convolution and the next"
CHANNEL_ATTENTION = "a gate that convolves over the channels (ECA)"
PRUNED = "channels that differ from block to block (pruned)"
RS = "a strided convolution in place of the max-pool (ResNet-RS)"
BIT = "GroupNorm, standardised weights, a zero-padded max-pool (BiT)"

ELSEWHERE: dict[str, str] = {
    "ecaresnet26t": CHANNEL_ATTENTION,
    "ecaresnet50d": CHANNEL_ATTENTION,
    "ecaresnet50d_pruned": PRUNED,
    "ecaresnet50t": CHANNEL_ATTENTION,
    "ecaresnet101d": CHANNEL_ATTENTION,
    "ecaresnet101d_pruned": PRUNED,
    "ecaresnet200d": CHANNEL_ATTENTION,
    "ecaresnet269d": CHANNEL_ATTENTION,
    "ecaresnetlight": CHANNEL_ATTENTION,
    "ecaresnext26t_32x4d": CHANNEL_ATTENTION,
    "ecaresnext50t_32x4d": CHANNEL_ATTENTION,
    "resnet50_gn": "GroupNorm in place of BatchNorm",
    "resnetaa34d": ANTIALIASED,
    "resnetaa50": ANTIALIASED,
    "resnetaa50d": ANTIALIASED,
    "resnetaa101d": ANTIALIASED,
    "resnetblur18": ANTIALIASED,
    "resnetblur50": ANTIALIASED,
    "resnetblur50d": ANTIALIASED,
    "resnetblur101d": ANTIALIASED,
    "resnetrs50": RS,
    "resnetrs101": RS,
    "resnetrs152": RS,
    "resnetrs200": RS,
    "resnetrs270": RS,
    "resnetrs350": RS,
    "resnetrs420": RS,
    "resnetv2_50d_evos": "EvoNorm in place of BatchNorm",
    "resnetv2_50d_frn": "filter response norm in place of BatchNorm",
    "resnetv2_50d_gn": "GroupNorm in place of BatchNorm",
    "resnetv2_50x1_bit": BIT,
    "resnetv2_50x3_bit": BIT,
    "resnetv2_101x1_bit": BIT,
    "resnetv2_101x3_bit": BIT,
    "resnetv2_152x2_bit": BIT,
    "resnetv2_152x4_bit": BIT,
    "senet154": "projections of 3×3, a first 1×1 of half the width",
    "seresnetaa50d": ANTIALIASED,
    "seresnextaa101d_32x8d": ANTIALIASED,
    "seresnextaa201d_32x8d": ANTIALIASED,
    "test_resnet": "blocks of both kinds, widths that do not double",
}
"""timm's entry points (`resnet.py`, `resnetv2.py`) that are not of this family, and what keeps them out."""
