"""The published members of the ResNet family and the depth dial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from skipway.errors import SkipwayError
from skipway.models.family import FAMILIES, Family, Variant
from skipway.models.resnet.aliases import ALIASES
from skipway.models.resnet.config import MAPS, ResNetConfig
from skipway.models.resnet.network import ResNet

__all__ = ["cifar_config", "imagenet_config", "wide_cifar_config"]

# He 2015, table 1 (and He 2016, table 5 for 200): block and blocks per stage
IMAGENET: dict[int, tuple[Literal["basic", "bottleneck"], tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
    200: ("bottleneck", (3, 24, 36, 3)),
}

# He 2015, sec. 4.2: 3×3 stem of 16 channels, three stages of n basic blocks, option A
CIFAR = ResNetConfig(blocks=(3, 3, 3), block="basic", width=16, stem="cifar", stem_width=16, shortcut="pad", classes=10)
# CIFAR's stages from half the resolution on, where a channel costs a quarter: measured in docs/log.md, 2026-11-29
PATCH = replace(CIFAR, width=64, stem="patch", stem_width=32, shortcut="pooled")
# ResNet-9's stages (Page 2018), all three of them with a block: measured in docs/log.md, 2026-11-30
POOL = replace(CIFAR, width=64, stem_width=24, transition="pooled")
# He 2016, sec. 3.1: bottlenecks [1×1, 16; 3×3, 16; 1×1, 64], projections where shapes change
CIFAR_BOTTLENECK = replace(CIFAR, block="bottleneck", shortcut="projection")
# Zagoruyko & Komodakis 2016, table 1: pre-activation, k times wider, projections
WIDE_CIFAR = replace(CIFAR, shortcut="projection", placement="preactivation")


def imagenet_config(depth: int, base: ResNetConfig | None = None) -> ResNetConfig:
    """ImageNet's four stages at any depth: as published where a paper has them, else by `distribute_resnet_blocks`.

    >>> imagenet_config(101).blocks, imagenet_config(26).blocks, imagenet_config(38).blocks
    ((3, 4, 23, 3), (2, 2, 2, 2), (3, 3, 3, 3))
    """
    base = base or ResNetConfig(blocks=(1,))
    if depth in IMAGENET:
        block, blocks = IMAGENET[depth]
        return replace(base, block=block, blocks=blocks)
    for block in ("bottleneck", "basic"):
        count, rest = divmod(depth - 2, MAPS[block])
        if rest == 0 and count >= 4 and (block == "bottleneck" or count < 16):
            return replace(base, block=block, blocks=distribute_resnet_blocks(count))
    raise depth_error(
        depth,
        "an ImageNet ResNet",
        "3·n + 2 (n ≥ 4 bottlenecks) or 2·n + 2 (4 ≤ n < 16 basic blocks)",
        nearest_depths(depth, 3, 14),
    )


def distribute_resnet_blocks(count: int) -> tuple[int, int, int, int]:
    """Four stages for `count` blocks: even up to 16, then 3, 4, n, 3 with the surplus in the third, as in ResNet-101.

    >>> [distribute_resnet_blocks(count) for count in (8, 14, 16, 33)]
    [(2, 2, 2, 2), (3, 4, 4, 3), (3, 4, 6, 3), (3, 4, 23, 3)]
    """
    if count >= 16:
        return 3, 4, count - 10, 3
    each, more = divmod(count, 4)
    return each, each + (more >= 2), each + (more >= 1), each + (more >= 3)


def cifar_config(depth: int, base: ResNetConfig = CIFAR) -> ResNetConfig:
    """CIFAR's three stages: 6n + 2 with basic blocks, 9n + 2 with bottlenecks; 3 more where pooled convolutions halve
    the image.

    >>> cifar_config(110).blocks, cifar_config(1202).branches
    ((18, 18, 18), 600)
    """
    step, others = 3 * MAPS[base.block], 5 if base.transition == "pooled" else 2
    each, rest = divmod(depth - others, step)
    if rest or each < 1:
        raise depth_error(
            depth,
            f"a CIFAR ResNet of {base.block} blocks",
            f"{step}·n + {others}, n ≥ 1",
            nearest_depths(depth, step, step + others),
        )
    return replace(base, blocks=(each,) * 3)


def wide_cifar_config(depth: int, factor: int | None = None, base: ResNetConfig = WIDE_CIFAR) -> ResNetConfig:
    """WRN-depth-factor: 6n + 4 weight layers (the two projections between stages counted), `factor` times wider.

    >>> wide_cifar_config(16, 2).blocks, wide_cifar_config(16, 2).width
    ((2, 2, 2), 32)
    """
    each, rest = divmod(depth - 4, 6)
    if rest or each < 1:
        raise depth_error(depth, "a Wide ResNet", "6·n + 4, n ≥ 1", nearest_depths(depth, 6, 10))
    return replace(base, blocks=(each,) * 3, width=base.width if factor is None else 16 * factor)


def published_config(depth: int) -> ResNetConfig:
    """The depth dial of "resnet": the net that a paper gives that depth, else CIFAR's 6n + 2, else its 9n + 2, else
    ImageNet's four stages.

    A bare "resnet26" is timm's entry point before it is this dial: ImageNet's 3·8 + 2 (`aliases`), where
    `build("resnet", depth=26)` is CIFAR's 6·4 + 2. At no other depth do the two differ.

    >>> published_config(50).stem, published_config(110).stem, published_config(164).block, published_config(53).blocks
    ('imagenet', 'cifar', 'bottleneck', (3, 4, 7, 3))
    """
    if depth in IMAGENET:
        return imagenet_config(depth)
    if depth in (164, 1001):
        return cifar_config(depth, CIFAR_BOTTLENECK)
    for make in (cifar_config, partial(cifar_config, base=CIFAR_BOTTLENECK), imagenet_config):
        try:
            return make(depth)
        except SkipwayError:
            continue
    raise depth_error(depth, "a ResNet", "6·n + 2, 9·n + 2 (CIFAR) or 3·n + 2 (ImageNet)", nearest_depths(depth, 3, 8))


def same_design(depth: int, base: ResNetConfig) -> ResNetConfig:
    """Another depth in the stages of `base`, everything else as it is there.

    >>> same_design(101, replace(imagenet_config(50), groups=32, base_width=4)).groups
    32
    """
    return cifar_config(depth, base) if base.stem in ("cifar", "patch") else imagenet_config(depth, base)


def with_changes(make: Callable[..., ResNetConfig], **changes: Any) -> Callable[..., ResNetConfig]:
    """The same dial with other fields: pre-activation, a gate, groups."""
    return lambda *args, **kwargs: replace(make(*args, **kwargs), **changes)


def nearest_depths(depth: int, step: int, least: int) -> tuple[int, int]:
    """The possible depths around an impossible one."""
    below = max(least, depth - (depth - least) % step)
    return below, below + step


def depth_error(depth: int, what: str, rule: str, options: tuple[int, int]) -> SkipwayError:
    """The error for a depth that does not exist."""
    return SkipwayError(f"depth={depth}: {what} has {rule} weight layers; near it are {options[0]} and {options[1]}")


Row = tuple[str, ResNetConfig, int, str]
"""Name, config, parameters as published, description."""


def register_family(
    family: str, description: str, at_depth: Callable[..., ResNetConfig], pattern: str, *rows: Row
) -> None:
    """Enter a family: its dial, the pattern of names that the dial answers to, and its published members."""
    members = [
        Variant(
            name=name,
            family=family,
            config=config,
            at_depth=partial(wide_cifar_config if family == "wrn" else same_design, base=config),
            parameters=parameters,
            description=text,
        )
        for name, config, parameters, text in rows
    ]
    FAMILIES.add(
        family,
        Family(
            name=family,
            description=description,
            module=ResNet,
            at_depth=at_depth,
            pattern=pattern,
            variants=tuple(members),
            aliases=ALIASES.get(family, {}),
        ),
    )


v2 = with_changes(published_config, placement="preactivation")
se = with_changes(imagenet_config, squeeze=16)

register_family(
    "resnet",
    "He et al. 2015: ImageNet (v1.5, stride on the 3×3) and CIFAR, at any depth",
    published_config,
    r"resnet-?(?P<depth>\d+)",
    # parameters: torchvision's documentation
    ("resnet18", imagenet_config(18), 11_689_512, "ImageNet, basic blocks"),
    ("resnet34", imagenet_config(34), 21_797_672, "ImageNet, basic blocks"),
    ("resnet50", imagenet_config(50), 25_557_032, "ImageNet, bottlenecks"),
    ("resnet101", imagenet_config(101), 44_549_160, "ImageNet, bottlenecks"),
    ("resnet152", imagenet_config(152), 60_192_808, "ImageNet, bottlenecks"),
    # parameters: He 2015, table 6 (0.27 M … 19.4 M), exact by the closed formula
    ("resnet20", cifar_config(20), 269_722, "CIFAR, 6n + 2"),
    ("resnet32", cifar_config(32), 464_154, "CIFAR, 6n + 2"),
    ("resnet44", cifar_config(44), 658_586, "CIFAR, 6n + 2"),
    ("resnet56", cifar_config(56), 853_018, "CIFAR, 6n + 2"),
    ("resnet110", cifar_config(110), 1_727_962, "CIFAR, 6n + 2"),
    ("resnet1202", cifar_config(1202), 19_421_274, "CIFAR, 6n + 2"),
)
register_family(
    "resnet-cifar",
    "CIFAR's three stages of basic blocks, 6n + 2",
    cifar_config,
    r"resnet-cifar-?(?P<depth>\d+)",
)
register_family(
    "resnet-patch",
    "CIFAR's stages behind a 4 × 4 convolution of stride 2, ResNet-D's shortcuts, 6n + 2",
    partial(cifar_config, base=PATCH),
    r"resnet-patch-?(?P<depth>\d+)",
)
register_family(
    "resnet-pool",
    "CIFAR's stages of which each begins with a convolution and max-pooling (ResNet-9's), 6n + 5",
    partial(cifar_config, base=POOL),
    r"resnet-pool-?(?P<depth>\d+)",
)
register_family(
    "resnet-imagenet",
    "ImageNet's four stages, 2n + 2 below 34 layers, 3n + 2",
    imagenet_config,
    r"resnet-imagenet-?(?P<depth>\d+)",
)
register_family(
    "resnetv2",
    "He et al. 2016: pre-activation, ImageNet and CIFAR",
    v2,
    r"resnetv2-?(?P<depth>\d+)",
    # parameters: timm's results table, in millions with two digits there
    ("resnetv2-50", v2(50), 25_549_352, "ImageNet, pre-activation"),
    ("resnetv2-101", v2(101), 44_541_480, "ImageNet, pre-activation"),
    ("resnetv2-152", v2(152), 60_185_128, "ImageNet, pre-activation"),
    # parameters: He 2016, table 4 (1.7 M, 10.2 M), exact by the closed formula
    ("resnetv2-164", v2(164), 1_703_258, "CIFAR, 9n + 2, pre-activation"),
    ("resnetv2-1001", v2(1001), 10_327_706, "CIFAR, 9n + 2, pre-activation"),
)
register_family(
    "resnext",
    "Xie et al. 2017: grouped bottlenecks (by default 32 groups of 4 channels), ImageNet",
    with_changes(imagenet_config, block="bottleneck", groups=32, base_width=4),
    r"resnext-?(?P<depth>\d+)",
    # parameters: torchvision's documentation
    (
        "resnext50-32x4d",
        replace(imagenet_config(50), groups=32, base_width=4),
        25_028_904,
        "ImageNet, 32 groups × 4",
    ),
    (
        "resnext101-32x8d",
        replace(imagenet_config(101), groups=32, base_width=8),
        88_791_336,
        "ImageNet, 32 groups × 8",
    ),
    (
        "resnext101-64x4d",
        replace(imagenet_config(101), groups=64, base_width=4),
        83_455_272,
        "ImageNet, 64 groups × 4",
    ),
)
register_family(
    "wide-resnet",
    "Zagoruyko & Komodakis 2016: twice as wide inside, ImageNet",
    with_changes(imagenet_config, block="bottleneck", base_width=128),
    r"wide-resnet-?(?P<depth>\d+)",
    # parameters: torchvision's documentation
    ("wide-resnet50-2", replace(imagenet_config(50), base_width=128), 68_883_240, "ImageNet, twice as wide"),
    ("wide-resnet101-2", replace(imagenet_config(101), base_width=128), 126_886_696, "ImageNet, twice as wide"),
)
register_family(
    "se-resnet",
    "Hu et al. 2018: squeeze-and-excitation in every branch, ImageNet",
    se,
    r"se-?resnet-?(?P<depth>\d+)",
    # parameters: Hu et al. 2018, table 1 gives 2.5 M over ResNet-50; exact by the closed formula
    ("se-resnet18", se(18), 11_778_592, "ImageNet, SE, basic blocks"),
    ("se-resnet34", se(34), 21_958_868, "ImageNet, SE, basic blocks"),
    ("se-resnet50", se(50), 28_088_024, "ImageNet, SE"),
    ("se-resnet101", se(101), 49_326_872, "ImageNet, SE"),
    ("se-resnet152", se(152), 66_821_848, "ImageNet, SE"),
)
register_family(
    "wrn",
    "Zagoruyko & Komodakis 2016: WRN-depth-factor, CIFAR, pre-activation, 6n + 4",
    wide_cifar_config,
    r"wrn-?(?P<depth>\d+)-(?P<factor>\d+)",
    ("wrn-16-2", wide_cifar_config(16, 2), 691_674, "CIFAR, 2 × wide"),
    ("wrn-40-2", wide_cifar_config(40, 2), 2_243_546, "CIFAR, 2 × wide"),
    ("wrn-28-10", wide_cifar_config(28, 10), 36_479_194, "CIFAR, 10 × wide"),
    ("wrn-100-2", wide_cifar_config(100, 2), 6_123_226, "CIFAR, 2 × wide"),
    ("wrn-1000-2", wide_cifar_config(1000, 2), 64_318_426, "CIFAR, 2 × wide"),
)
