"""The published members of the ConvNeXt family and the depth dial."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from skipway.errors import SkipwayError
from skipway.models.convnext.aliases import ALIASES
from skipway.models.convnext.config import ConvNeXtConfig
from skipway.models.convnext.network import ConvNeXt
from skipway.models.family import FAMILIES, Family, Variant
from skipway.schemes import parse_scheme

__all__ = ["V1", "V2", "convnext_config", "distribute_convnext_blocks"]

# Liu et al. 2022, sec. 3.1: every size starts its LayerScale at 1e-6
V1 = ConvNeXtConfig(blocks=(3, 3, 9, 3), scheme=parse_scheme("layerscale(init=1e-6)"))
# Woo et al. 2023, sec. 3.2: with global response normalisation LayerScale is of no more use
V2 = ConvNeXtConfig(blocks=(3, 3, 9, 3), response=True)

Size = tuple[int, tuple[int, ...], int]
"""Width, blocks per stage, parameters at 1000 classes."""

# Tiny to xlarge: Liu et al. 2022, sec. 3; below: timm.
# Parameters: torchvision's documentation (tiny to large), as counted in timm 1.0.31 (others).
SIZES: dict[str, Size] = {
    "atto": (40, (2, 2, 6, 2), 3_695_520),
    "femto": (48, (2, 2, 6, 2), 5_217_784),
    "pico": (64, (2, 2, 6, 2), 9_045_672),
    "nano": (80, (2, 2, 8, 2), 15_593_560),
    "tiny": (96, (3, 3, 9, 3), 28_589_128),
    "small": (96, (3, 3, 27, 3), 50_223_688),
    "base": (128, (3, 3, 27, 3), 88_591_464),
    "large": (192, (3, 3, 27, 3), 197_767_336),
    "xlarge": (256, (3, 3, 27, 3), 350_196_968),
}
# Woo et al. 2023, appendix A (width, blocks); parameters as counted in timm 1.0.31, which round to the paper's table
V2_SIZES: dict[str, Size] = {
    "atto": (40, (2, 2, 6, 2), 3_708_400),
    "femto": (48, (2, 2, 6, 2), 5_233_240),
    "pico": (64, (2, 2, 6, 2), 9_066_280),
    "nano": (80, (2, 2, 8, 2), 15_623_800),
    "tiny": (96, (3, 3, 9, 3), 28_635_496),
    "base": (128, (3, 3, 27, 3), 88_717_800),
    "large": (192, (3, 3, 27, 3), 197_956_840),
    "huge": (352, (3, 3, 27, 3), 660_289_640),
}
# the blocks of OpenCLIP's ConvNeXt-XXLarge, which the rule of `split` does not give
PUBLISHED = {40: (3, 4, 30, 3)}


def convnext_config(depth: int, base: ConvNeXtConfig = V1) -> ConvNeXtConfig:
    """`base` with so many blocks in all, in four stages.

    >>> convnext_config(18).blocks, convnext_config(36).blocks, convnext_config(100).blocks
    ((3, 3, 9, 3), (3, 3, 27, 3), (3, 3, 91, 3))
    """
    return replace(base, blocks=distribute_convnext_blocks(depth))


def distribute_convnext_blocks(depth: int) -> tuple[int, int, int, int]:
    """Four stages for so many blocks: the published split where there is one, else e, e, n, e.

    e is a sixth of the blocks, between one and three, and n the surplus: the paper's 1 : 1 : 3 : 1 as long as that
    divides, from 18 blocks on its 3, 3, n, 3.

    >>> [distribute_convnext_blocks(depth) for depth in (4, 12, 14, 18)]
    [(1, 1, 1, 1), (2, 2, 6, 2), (2, 2, 8, 2), (3, 3, 9, 3)]

    Raises:
        SkipwayError: fewer blocks than stages.
    """
    if depth < 4:
        raise SkipwayError(
            f"depth={depth}: a ConvNeXt has at least four blocks, one to a stage; every depth from 4 on is possible"
        )
    if depth in PUBLISHED:
        return PUBLISHED[depth]
    each = min(max(depth // 6, 1), 3)
    return each, each, depth - 3 * each, each


def convnext_variant(family: str, name: str, config: ConvNeXtConfig, parameters: int, description: str) -> Variant:
    """A published network of a family."""
    return Variant(
        name=f"{family}-{name}",
        family=family,
        config=config,
        at_depth=partial(convnext_config, base=config),
        parameters=parameters,
        description=description,
    )


def convnext_variants(family: str, base: ConvNeXtConfig, sizes: dict[str, Size]) -> list[Variant]:
    """The published sizes of a family."""
    return [
        convnext_variant(
            family,
            size,
            replace(base, width=width, blocks=blocks),
            parameters,
            f"{width} channels in the first stage, {sum(blocks)} blocks",
        )
        for size, (width, blocks, parameters) in sizes.items()
    ]


def convnext_aliases(family: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """The entry points of other libraries whose network is of this family."""
    return {entry: ours for entry, ours in ALIASES.items() if ours[0].startswith(f"{family}-")}


FAMILIES.add(
    "convnext",
    Family(
        name="convnext",
        description="Liu et al. 2022: depthwise 7×7 and MLP in one branch, LayerScale; depth counts blocks",
        module=ConvNeXt,
        at_depth=convnext_config,
        pattern=r"convnext-(?P<depth>\d+)",
        aliases=convnext_aliases("convnext"),
        variants=(
            *convnext_variants("convnext", V1, SIZES),
            # the image tower of OpenCLIP; parameters as counted in timm 1.0.31
            convnext_variant(
                "convnext",
                "xxlarge",
                replace(V1, width=384, blocks=(3, 4, 30, 3), epsilon=1e-5),
                846_471_016,
                "384 channels in the first stage, 40 blocks, OpenCLIP's",
            ),
        ),
    ),
)
FAMILIES.add(
    "convnextv2",
    Family(
        name="convnextv2",
        description="Woo et al. 2023: ConvNeXt with global response normalisation, no LayerScale; depth counts blocks",
        module=ConvNeXt,
        at_depth=partial(convnext_config, base=V2),
        pattern=r"convnextv2-(?P<depth>\d+)",
        aliases=convnext_aliases("convnextv2"),
        variants=tuple(convnext_variants("convnextv2", V2, V2_SIZES)),
    ),
)
