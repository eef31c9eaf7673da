"""Names of the ConvNeXt family in timm and torchvision."""

from __future__ import annotations

from typing import Any

__all__ = ["ALIASES", "ELSEWHERE"]

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "convnext_atto": ("convnext-atto", {}),
    "convnext_femto": ("convnext-femto", {}),
    "convnext_pico": ("convnext-pico", {}),
    "convnext_nano": ("convnext-nano", {}),
    "convnext_tiny": ("convnext-tiny", {}),
    "convnext_small": ("convnext-small", {}),
    "convnext_base": ("convnext-base", {}),
    "convnext_large": ("convnext-large", {}),
    "convnext_xlarge": ("convnext-xlarge", {}),
    "convnext_xxlarge": ("convnext-xxlarge", {}),
    "convnextv2_atto": ("convnextv2-atto", {}),
    "convnextv2_femto": ("convnextv2-femto", {}),
    "convnextv2_pico": ("convnextv2-pico", {}),
    "convnextv2_nano": ("convnextv2-nano", {}),
    "convnextv2_tiny": ("convnextv2-tiny", {}),
    "convnextv2_small": ("convnextv2-tiny", {"blocks": (3, 3, 27, 3)}),
    "convnextv2_base": ("convnextv2-base", {}),
    "convnextv2_large": ("convnextv2-large", {}),
    "convnextv2_huge": ("convnextv2-huge", {}),
}
"""Entry point, without the tag after the dot, → our variant and the options that `build` needs besides.

torchvision has the sizes from tiny to large under the same names.
"""

ELSEWHERE: dict[str, str] = {
    "convnext_zepto_rms": "its norms do not subtract the mean and have no bias",
    "convnext_zepto_rms_ols": "a stem of overlapping convolutions; its norms do not subtract the mean",
    "convnext_atto_ols": "a stem of overlapping convolutions",
    "convnext_atto_rms": "RMSNorm in place of LayerNorm",
    "convnext_femto_ols": "a stem of overlapping convolutions",
    "convnext_pico_ols": "a stem of overlapping convolutions",
    "convnext_nano_ols": "a stem of overlapping convolutions",
    "convnext_tiny_hnf": "its last norm stands before the pooling",
    "convnext_large_mlp": "a hidden layer in the head",
    "test_convnext": "widths that do not double, an approximate GELU",
    "test_convnext2": "widths that do not double, an approximate GELU",
    "test_convnext3": "widths that do not double, a SiLU",
}
"""timm's entry points that are not of this family, and what keeps them out."""
