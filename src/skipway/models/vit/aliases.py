"""Entry points of timm and torchvision that Skipway's ViT covers: name → (variant, options)."""

from __future__ import annotations

from typing import Any

__all__ = ["ALIASES", "ELSEWHERE"]

GAP = {"pooling": "normed-mean"}
DEIT3 = {"place_token": False, "scheme": "layerscale(init=1e-6)"}
DINO = {"scheme": "layerscale(init=1e-5)", "image": 518}
TIPS = {"scheme": "layerscale(init=1.0)", "image": 448, "registers": 1, "place_token": False}
CLIP = {"stem_norm": True, "epsilon": 1e-5}
QUICK = {**CLIP, "act": "quickgelu"}
SIGLIP = GAP
SIGLIP2 = {**GAP, "act": "tanhgelu"}
REGISTERED = {"pooling": "mean", "image": 256, "scheme": "layerscale(init=1e-5)"}

# sizes that only timm has
WEE = {"dim": 256, "heads": 4, "blocks": 14, "ratio": 5.0}
LITTLE = {"dim": 320, "heads": 5, "blocks": 14, "ratio": 5.6}
MEDIUM = {"dim": 512, "heads": 8}
MEDIUM_DEEP = {**MEDIUM, "blocks": 20}
BETWIXT = {"dim": 640, "heads": 10}
PLUS = {"dim": 896, "heads": 14}
SO400M = {"dim": 1152, "heads": 16, "blocks": 27, "ratio": 4304 / 1152}
GIANT = {"dim": 1408, "heads": 16, "blocks": 40, "ratio": 48 / 11}
GIANT_OPT = {"dim": 1536, "heads": 16, "blocks": 40}
GIGANTIC = {"dim": 1664, "heads": 16, "blocks": 48, "ratio": 64 / 13}

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
    "vit_giant_patch14_224": ("vit-huge-14", GIANT),
    "vit_gigantic_patch14_224": ("vit-huge-14", GIGANTIC),
    "vit_small_patch16_36x1_224": ("vit-small-16", {"blocks": 36, "scheme": "layerscale(init=1e-5)"}),
    "vit_base_patch16_plus_240": ("vit-base-16", {**PLUS, "image": 240, "scheme": "layerscale(init=1e-5)"}),
    "vit_base_patch32_plus_256": ("vit-base-32", {**PLUS, "image": 256, "scheme": "layerscale(init=1e-5)"}),
    "test_vit": ("vit-tiny-16", {"dim": 64, "heads": 2, "blocks": 6, "ratio": 3.0, "image": 160}),
    # timm: the mean over normed patches
    "vit_base_patch16_gap_224": ("vit-base-16", {**GAP, "heads": 16}),
    "vit_huge_patch14_gap_224": ("vit-huge-14", GAP),
    "vit_huge_patch16_gap_448": ("vit-huge-16", {**GAP, "image": 448}),
    "vit_giant_patch16_gap_224": ("vit-huge-16", {**GAP, **GIANT}),
    # timm: the norm of the mean over patches, registers
    "vit_wee_patch16_reg1_gap_256": ("vit-small-16", {**REGISTERED, **WEE, "registers": 1}),
    "vit_little_patch16_reg1_gap_256": ("vit-small-16", {**REGISTERED, **LITTLE, "registers": 1}),
    "vit_little_patch16_reg4_gap_256": ("vit-small-16", {**REGISTERED, **LITTLE, "registers": 4}),
    "vit_medium_patch16_reg1_gap_256": ("vit-small-16", {**REGISTERED, **MEDIUM, "registers": 1}),
    "vit_medium_patch16_reg4_gap_256": ("vit-small-16", {**REGISTERED, **MEDIUM, "registers": 4}),
    "vit_mediumd_patch16_reg4_gap_256": ("vit-small-16", {**REGISTERED, **MEDIUM_DEEP, "registers": 4}),
    "vit_mediumd_patch16_reg4_gap_384": ("vit-small-16", {**REGISTERED, **MEDIUM_DEEP, "registers": 4, "image": 384}),
    "vit_betwixt_patch16_reg1_gap_256": ("vit-small-16", {**REGISTERED, **BETWIXT, "registers": 1}),
    "vit_betwixt_patch16_reg4_gap_256": ("vit-small-16", {**REGISTERED, **BETWIXT, "registers": 4}),
    "vit_betwixt_patch16_reg4_gap_384": ("vit-small-16", {**REGISTERED, **BETWIXT, "registers": 4, "image": 384}),
    "vit_base_patch16_reg4_gap_256": ("vit-base-16", {"pooling": "mean", "image": 256, "registers": 4}),
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
    # timm: FlexiViT (Beyer et al. 2023), at one size of patches
    **{
        f"flexivit_{size}": (f"vit-{size}-16", {"place_token": False, "image": 240})
        for size in ("small", "base", "large")
    },
    # timm: DINOv2 (Oquab et al. 2023), with registers (Darcet et al. 2024); the image tower of TIPS v2
    **{f"vit_{size}_patch14_dinov2": (f"vit-{size}-14", DINO) for size in ("small", "base", "large")},
    **{
        f"vit_{size}_patch14_reg4_dinov2": (f"vit-{size}-14", {**DINO, "registers": 4, "place_token": False})
        for size in ("small", "base", "large")
    },
    **{f"vit_{size}_patch14_reg1_tipsv2": (f"vit-{size}-14", TIPS) for size in ("base", "large")},
    "vit_so400m_patch14_reg1_tipsv2": ("vit-huge-14", {**SO400M, **TIPS}),
    # timm: the image towers of CLIP (Radford et al. 2021), OpenCLIP and TinyCLIP
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
    "vit_betwixt_patch32_clip_224": ("vit-small-32", {**CLIP, **BETWIXT}),
    "vit_base_patch16_plus_clip_240": ("vit-base-16", {**CLIP, **PLUS, "image": 240}),
    "vit_giant_patch14_clip_224": ("vit-huge-14", {**CLIP, **GIANT}),
    "vit_gigantic_patch14_clip_224": ("vit-huge-14", {**CLIP, **GIGANTIC}),
    "vit_gigantic_patch14_clip_378": ("vit-huge-14", {**CLIP, **GIGANTIC, "image": 378}),
    "vit_gigantic_patch14_clip_quickgelu_224": ("vit-huge-14", {**QUICK, **GIGANTIC}),
    # timm: the image towers of SigLIP (Zhai et al. 2023) and, with the approximate GELU, SigLIP 2, pooled by the mean
    **{
        f"vit_{size}_patch{patch}_siglip_gap_{image}": (f"vit-{size}-{patch}", {**tower, "image": image})
        for size, patch, image, tower in (
            *(("base", 16, 224, SIGLIP), ("base", 16, 256, SIGLIP), ("base", 16, 384, SIGLIP)),
            *(("base", 16, 512, SIGLIP), ("large", 16, 256, SIGLIP), ("large", 16, 384, SIGLIP)),
            *(("base", 32, 256, SIGLIP2), ("large", 16, 512, SIGLIP2)),
        )
    },
    **{
        f"vit_{size}_patch{patch}_siglip_gap_{image}": (f"vit-huge-{patch}", {**shape, **tower, "image": image})
        for size, shape, patch, image, tower in (
            *(("so400m", SO400M, 14, side, SIGLIP) for side in (224, 378, 448, 896)),
            *(("so400m", SO400M, 16, side, SIGLIP2) for side in (256, 384, 512)),
            *(("giantopt", GIANT_OPT, 16, side, SIGLIP2) for side in (256, 384)),
        )
    },
}
"""Entry point, without the tag after the dot, → our variant and the options that `build` needs besides."""

NO_BIAS = "queries, keys and values without bias"
ATTENTION_POOL = "pooled by an attention"
NO_NORM = "no norm in the head"
PLACED_REGISTERS = "registers with a place"
GATED = "gated MLPs"
PARALLEL = "branches side by side"

ELSEWHERE: dict[str, str] = {
    **{
        f"aimv2_{size}_patch14_{image}": "RMSNorm, gated MLPs, no biases"
        for size in ("large", "huge", "1b", "3b")
        for image in (224, 336, 448)
    },
    "beit3_base_patch16_224": "norms inside the branches",
    "beit3_large_patch16_224": "norms inside the branches",
    "beit3_giant_patch14_224": "norms inside the branches",
    "beit3_giant_patch14_336": "norms inside the branches",
    "deit_tiny_distilled_patch16_224": "a second class token and head (distillation)",
    "deit_small_distilled_patch16_224": "a second class token and head (distillation)",
    "deit_base_distilled_patch16_224": "a second class token and head (distillation)",
    "deit_base_distilled_patch16_384": "a second class token and head (distillation)",
    "eva_large_patch14_196": "a class token that the mean leaves out",
    "eva_large_patch14_336": "a class token that the mean leaves out",
    "test_vit2": PLACED_REGISTERS,
    "test_vit3": ATTENTION_POOL,
    "test_vit4": "RMSNorm",
    "vit_small_patch16_18x2_224": PARALLEL,
    "vit_base_patch16_18x2_224": PARALLEL,
    "vit_pwee_patch16_reg1_gap_256": PARALLEL,
    "vit_dpwee_patch16_reg1_gap_256": PARALLEL,
    "vit_base_patch16_xp_224": PARALLEL,
    "vit_large_patch14_xp_224": PARALLEL,
    "vit_huge_patch14_xp_224": PARALLEL,
    "vit_dwee_patch16_reg1_gap_256": "attention as a difference of two",
    "vit_dlittle_patch16_reg1_gap_256": "attention as a difference of two",
    "vit_base_patch16_224_miil": NO_BIAS,
    "vit_base_patch16_rpn_224": NO_BIAS,
    "vit_medium_patch16_gap_240": NO_BIAS,
    "vit_medium_patch16_gap_256": NO_BIAS,
    "vit_medium_patch16_gap_384": NO_BIAS,
    "vit_betwixt_patch16_gap_256": NO_BIAS,
    "vit_so150m2_patch16_reg1_gap_256": NO_BIAS,
    "vit_so150m2_patch16_reg1_gap_384": NO_BIAS,
    "vit_so150m2_patch16_reg1_gap_448": NO_BIAS,
    "vit_so150m_patch16_reg4_map_256": ATTENTION_POOL,
    "vit_so150m_patch16_reg4_gap_256": PLACED_REGISTERS,
    "vit_so150m_patch16_reg4_gap_384": PLACED_REGISTERS,
    **{f"vit_base_patch16_siglip_{image}": ATTENTION_POOL for image in (224, 256, 384, 512)},
    **{f"vit_large_patch16_siglip_{image}": ATTENTION_POOL for image in (256, 384, 512)},
    **{f"vit_so400m_patch14_siglip_{image}": ATTENTION_POOL for image in (224, 378, 384)},
    **{f"vit_so400m_patch16_siglip_{image}": ATTENTION_POOL for image in (256, 384, 512)},
    **{f"vit_giantopt_patch16_siglip_{image}": ATTENTION_POOL for image in (256, 384)},
    "vit_base_patch32_siglip_256": ATTENTION_POOL,
    "vit_so400m_patch14_siglip_gap_384": "images that the patch does not divide",
    "vit_giant_patch14_dinov2": GATED,
    "vit_giant_patch14_reg4_dinov2": GATED,
    "vit_giant_patch14_reg1_tipsv2": GATED,
    "vit_intern300m_patch14_448": NO_NORM,
    "vit_base_patch16_radio_v3": NO_NORM,
    "vit_large_patch16_radio_v3": NO_NORM,
    "vit_huge_patch16_radio_v3": NO_NORM,
    "vit_giant_patch16_radio_v3": NO_NORM,
    "vit_so400m_patch16_radio_v4": NO_NORM,
    "vit_huge_patch16_radio_v4": NO_NORM,
}
"""timm's entry points (`vision_transformer.py`, `deit.py`) that are not of this family, and what keeps them out."""
