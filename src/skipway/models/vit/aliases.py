"""Entry points of timm and torchvision that are ViTs of ours: name → (our name, options)."""

from __future__ import annotations

from typing import Any

__all__ = ["ALIASES"]

DEIT3 = {"place_token": False, "scheme": "layerscale(init=1e-6)"}
DINO = {"scheme": "layerscale(init=1e-5)"}
CLIP = {"stem_norm": True, "epsilon": 1e-5}
QUICK = {**CLIP, "act": "quickgelu"}
MEDIUM = {"dim": 512, "heads": 8}
PLUS = {"dim": 896, "heads": 14}

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    # torchvision
    "vit_b_16": ("vit-base-16", {}),
    "vit_b_32": ("vit-base-32", {}),
    "vit_l_16": ("vit-large-16", {}),
    "vit_l_32": ("vit-large-32", {}),
    "vit_h_14": ("vit-huge-14", {}),
    # timm: ViT
    **{
        f"vit_{size}_patch{patch}_{image}": (f"vit-{size}-{patch}", {"image": image})
        for size, patch, image in (
            *(("tiny", 16, 224), ("tiny", 16, 384), ("small", 32, 224), ("small", 32, 384), ("small", 16, 224)),
            *(("small", 16, 384), ("small", 8, 224), ("base", 32, 224), ("base", 32, 384), ("base", 16, 224)),
            *(("base", 16, 384), ("base", 8, 224), ("large", 32, 224), ("large", 32, 384), ("large", 16, 224)),
            *(("large", 16, 384), ("large", 14, 224), ("huge", 14, 224)),
        )
    },
    "vit_small_patch16_36x1_224": ("vit-small-16", {"blocks": 36, "scheme": "layerscale(init=1e-5)"}),
    "vit_base_patch16_gap_224": ("vit-base-16", {"pooling": "mean"}),
    "vit_huge_patch14_gap_224": ("vit-huge-14", {"pooling": "mean"}),
    "vit_huge_patch16_gap_448": ("vit-huge-14", {"patch": 16, "image": 448, "pooling": "mean"}),
    "vit_base_patch16_plus_240": ("vit-base-16", {**PLUS, "image": 240, "scheme": "layerscale(init=1e-5)"}),
    "vit_base_patch32_plus_256": ("vit-base-32", {**PLUS, "image": 256, "scheme": "layerscale(init=1e-5)"}),
    # timm: DeiT (Touvron et al. 2021)
    **{
        f"deit_{size}_patch16_{image}": (f"vit-{size}-16", {"image": image})
        for size, image in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384))
    },
    # timm: DeiT III (Touvron et al. 2022)
    **{
        f"deit3_{size}_patch{patch}_{image}": (f"vit-{size}-{patch}", {**DEIT3, "image": image})
        for size, patch, image in (
            *(("small", 16, 224), ("small", 16, 384), ("base", 16, 224), ("base", 16, 384)),
            *(("large", 16, 224), ("large", 16, 384), ("huge", 14, 224)),
        )
    },
    "deit3_medium_patch16_224": ("vit-small-16", {**MEDIUM, **DEIT3}),
    # timm: DINOv2 (Oquab et al. 2023), with registers (Darcet et al. 2024)
    **{f"vit_{size}_patch14_dinov2": (f"vit-{size}-14", {**DINO, "image": 518}) for size in ("small", "base", "large")},
    **{
        f"vit_{size}_patch14_reg4_dinov2": (
            f"vit-{size}-14",
            {**DINO, "image": 518, "registers": 4, "place_token": False},
        )
        for size in ("small", "base", "large")
    },
    # timm: the image towers of CLIP (Radford et al. 2021)
    **{
        f"vit_{size}_patch{patch}_clip_{image}": (f"vit-{size}-{patch}", {**CLIP, "image": image})
        for size, patch, image in (
            *(("base", 32, 224), ("base", 32, 256), ("base", 32, 384), ("base", 32, 448), ("base", 16, 224)),
            *(("base", 16, 384), ("large", 14, 224), ("large", 14, 336), ("huge", 14, 224), ("huge", 14, 336)),
            *(("huge", 14, 378),),
        )
    },
    **{
        f"vit_{size}_patch{patch}_clip_quickgelu_{image}": (f"vit-{size}-{patch}", {**QUICK, "image": image})
        for size, patch, image in (
            *(("base", 32, 224), ("base", 16, 224), ("large", 14, 224), ("large", 14, 336)),
            *(("huge", 14, 224), ("huge", 14, 378)),
        )
    },
    "vit_medium_patch32_clip_224": ("vit-small-32", {**CLIP, **MEDIUM}),
    "vit_medium_patch16_clip_224": ("vit-small-16", {**CLIP, **MEDIUM}),
    "vit_xsmall_patch16_clip_224": ("vit-small-16", {**CLIP, "dim": 256, "heads": 4, "blocks": 10}),
    "vit_betwixt_patch32_clip_224": ("vit-small-32", {**CLIP, "dim": 640, "heads": 10}),
    "vit_base_patch16_plus_clip_240": ("vit-base-16", {**CLIP, **PLUS, "image": 240}),
}
