"""The published members of the ViT family."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from skipway.errors import SkipwayError
from skipway.models.family import FAMILIES, Family, Variant
from skipway.models.vit.aliases import ALIASES
from skipway.models.vit.config import ViTConfig
from skipway.models.vit.network import ViT

__all__ = ["SIZES", "vit_config"]

# Dosovitskiy et al. 2021, table 1 (base, large, huge); Touvron et al. 2021 (DeiT), table 1 (tiny, small)
SIZES = {
    "tiny": ViTConfig(dim=192, blocks=12, heads=3),
    "small": ViTConfig(dim=384, blocks=12, heads=6),
    "base": ViTConfig(dim=768, blocks=12, heads=12),
    "large": ViTConfig(dim=1024, blocks=24, heads=16),
    "huge": ViTConfig(dim=1280, blocks=32, heads=16),
}

# parameters at 224² and 1000 classes: torchvision's documentation (base, large, huge), timm's results table (others)
PARAMETERS = {
    ("tiny", 16): 5_717_416,
    ("small", 32): 22_878_952,
    ("small", 16): 22_050_664,
    ("base", 32): 88_224_232,
    ("base", 16): 86_567_656,
    ("large", 32): 306_535_400,
    ("large", 16): 304_326_632,
    ("huge", 14): 632_045_800,
}


def vit_config(depth: int, base: ViTConfig = SIZES["small"]) -> ViTConfig:
    """`base` with another number of blocks.

    >>> vit_config(48).branches
    96
    """
    if depth < 1:
        raise SkipwayError(f"depth={depth}: a ViT has at least one block; every depth from 1 on is possible")
    return replace(base, blocks=depth)


def vit_config_of_size(size: str, patch: int) -> ViTConfig:
    """A published size with any patch; the image is the multiple of the patch nearest to 224 from below.

    >>> vit_config_of_size("small", 14).grid
    (16, 16)
    """
    return replace(SIZES[size], patch=patch, image=max(224 // patch, 1) * patch)


FAMILIES.add(
    "vit",
    Family(
        name="vit",
        description="Dosovitskiy et al. 2021: attention and MLP branches over patches; depth counts blocks",
        module=ViT,
        at_depth=vit_config,
        pattern=r"vit-(?P<size>tiny|small|base|large|huge)-(?P<patch>\d+)",
        named=vit_config_of_size,
        aliases=ALIASES,
        variants=tuple(
            Variant(
                name=f"vit-{size}-{patch}",
                family="vit",
                config=replace(SIZES[size], patch=patch),
                at_depth=partial(vit_config, base=replace(SIZES[size], patch=patch)),
                parameters=parameters,
                description=f"patches of {patch} × {patch}",
            )
            for (size, patch), parameters in PARAMETERS.items()
        ),
    ),
)
