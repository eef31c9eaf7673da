"""Entry points of timm and torchvision that Skipway's Swin covers: name → (variant, options)."""

from __future__ import annotations

from typing import Any

__all__ = ["ALIASES"]

LEARNED = (12, 12, 12, 6)
"""Windows at 192 pixels, where the networks of V2 that then see larger images learned their positions."""

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    # torchvision: windows of 7 (V1) and 8 (V2)
    "swin_t": ("swin-tiny", {}),
    "swin_s": ("swin-small", {}),
    "swin_b": ("swin-base", {}),
    "swin_v2_t": ("swinv2-tiny", {}),
    "swin_v2_s": ("swinv2-small", {}),
    "swin_v2_b": ("swinv2-base", {}),
    # timm: V1
    "swin_tiny_patch4_window7_224": ("swin-tiny", {}),
    "swin_small_patch4_window7_224": ("swin-small", {}),
    "swin_base_patch4_window7_224": ("swin-base", {}),
    "swin_base_patch4_window12_384": ("swin-base", {"window": 12, "image": 384}),
    "swin_large_patch4_window7_224": ("swin-large", {}),
    "swin_large_patch4_window12_384": ("swin-large", {"window": 12, "image": 384}),
    # timm: the searched windows of Chen et al. 2021, "Searching the Search Space of Vision Transformer" (S3)
    "swin_s3_tiny_224": ("swin-tiny", {"window": (7, 7, 14, 7)}),
    "swin_s3_small_224": ("swin-small", {"window": (14, 14, 14, 7)}),
    "swin_s3_base_224": ("swin-tiny", {"window": (7, 7, 14, 7), "blocks": (2, 2, 30, 2)}),
    # timm: V2
    "swinv2_tiny_window8_256": ("swinv2-tiny", {}),
    "swinv2_tiny_window16_256": ("swinv2-tiny", {"window": 16}),
    "swinv2_small_window8_256": ("swinv2-small", {}),
    "swinv2_small_window16_256": ("swinv2-small", {"window": 16}),
    "swinv2_base_window8_256": ("swinv2-base", {}),
    "swinv2_base_window16_256": ("swinv2-base", {"window": 16}),
    "swinv2_base_window12_192": ("swinv2-base", {"window": 12, "image": 192, "classes": 21841}),
    "swinv2_base_window12to16_192to256": ("swinv2-base", {"window": 16, "learned_window": LEARNED}),
    "swinv2_base_window12to24_192to384": ("swinv2-base", {"window": 24, "image": 384, "learned_window": LEARNED}),
    "swinv2_large_window12_192": ("swinv2-large", {"window": 12, "image": 192, "classes": 21841}),
    "swinv2_large_window12to16_192to256": ("swinv2-large", {"learned_window": LEARNED}),
    "swinv2_large_window12to24_192to384": ("swinv2-large", {"window": 24, "image": 384, "learned_window": LEARNED}),
}
