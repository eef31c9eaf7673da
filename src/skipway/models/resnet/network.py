"""The ResNet: a stem, a chain of blocks in stages, a head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from skipway.models.resnet.blocks import CONV_KIT, BasicBlock, Block, Bottleneck, pooled_projection, projection
from skipway.models.resnet.config import ResNetConfig
from skipway.nn import Classifier, Conv, ConvBranch, Pad, SqueezeExcitation, StageMap, sequence
from skipway.nn.kit import Kit
from skipway.nn.placement import ORIGINAL, PRE_ACTIVATION, Placement
from skipway.nn.site import Site

__all__ = ["ResNet"]

BLOCKS: dict[str, type[Block]] = {"basic": BasicBlock, "bottleneck": Bottleneck}
PLACEMENTS = {"original": ORIGINAL, "preactivation": PRE_ACTIVATION}
PROJECTIONS = {"projection": projection, "pooled": pooled_projection}
FIRST = {"cifar": (3, 1), "patch": (4, 2)}
"""Kernel and stride of stems of one convolution without max-pooling; the others have 7 and 2."""
TIERS = {"deep": (4, 4), "tiered": (3, 4)}
"""Eighths of the stem's width after the first two of three convolutions: He, T. et al. 2019, fig. 2b; timm's "t"."""


class ResNet(nn.Module):
    """Stem, chain, head: logits = classifier(pool(stages(stem(x)))).

    Shapes: (N, channels, H, W) → (N, classes), for any H, W ≥ 1 (2 with a patch stem).

    Args:
        config: what to build.

    >>> import torch
    >>> config = ResNetConfig(blocks=(1, 1), block="basic", width=8, stem="cifar", stem_width=8, classes=10)
    >>> ResNet(config)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        kit = replace(CONV_KIT, gate=resnet_gate(config))
        placement = PLACEMENTS[config.placement]
        outside = config.scheme.kit(None, kit), config.scheme.place(None, placement)
        self.stem = resnet_stem(config, *outside)
        self.stages = nn.Sequential(*resnet_stages(config, kit, placement, outside))
        self.head = resnet_head(config, *outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))

    def stage_maps(self) -> tuple[StageMap, ...]:
        """The stream after every stage; each stage halves height and width of the one before."""
        _, first = FIRST.get(self.config.stem, (7, 4))
        first *= 2 if self.config.transitions else 1
        expansion = BLOCKS[self.config.block].expansion
        return tuple(
            StageMap(f"stages.{number}", self.config.width * 2**number * expansion, first * 2**number)
            for number in range(len(self.config.blocks))
        )


def resnet_gate(config: ResNetConfig) -> Callable[[int], nn.Module] | None:
    """The last part of every branch, or None."""
    if config.squeeze is None:
        return None
    return partial(SqueezeExcitation, reduction=config.squeeze, least=config.squeeze_least)


def resnet_stem(config: ResNetConfig, kit: Kit, placement: Placement) -> nn.Module:
    """Image to stream: one or three convolutions, the parts that follow a connection, max-pooling for ImageNet, and the
    first of the pooled maps where those halve the image.
    """
    pool = None if config.stem in FIRST else nn.MaxPool2d(3, stride=2, padding=1)
    dim = config.width * BLOCKS[config.block].expansion
    last = {
        "pool": pool,
        "downsample": pooled_map(config.stem_width, dim, kit, placement) if config.transitions else None,
        "open": config.scheme.open(),
    }
    if config.stem in TIERS:
        # a row of convolutions as in a branch, though no residual one
        convs = ConvBranch(deep_stem_convs(config), replace(kit, gate=None), placement.after)
        return sequence(**dict(convs.named_children()), **last)
    kernel, stride = FIRST.get(config.stem, (7, 2))
    return sequence(
        conv=kit.conv(config.channels, config.stem_width, kernel, stride, padding=(kernel - 1) // 2),
        **kit.parts(placement.after, config.stem_width, fresh=True),
        **last,
    )


def deep_stem_convs(config: ResNetConfig) -> list[Conv]:
    """The three convolutions of a deep stem."""
    first, second = (max(config.stem_width * eighths // 8, 1) for eighths in TIERS[config.stem])
    return [Conv(config.channels, first, 3, 2), Conv(first, second, 3), Conv(second, config.stem_width, 3)]


def resnet_stages(
    config: ResNetConfig, kit: Kit, placement: Placement, outside: tuple[Kit, Placement]
) -> Iterator[nn.Module]:
    """The chain, stage by stage; `outside` is the kit and the placement of what no connection spans."""
    make = BLOCKS[config.block]
    index = since = earlier = 0
    dim_in = config.width * make.expansion if config.transitions else config.stem_width
    for number, count in enumerate(config.blocks):
        out_channels = config.width * 2**number
        dim = out_channels * make.expansion
        stage, downsample = nn.Sequential(), None
        if config.transitions and number > 0:
            site = Site(dim=dim, dim_in=dim_in, index=index, depth=config.branches, since=since)
            restart, enter = config.scheme.restart(site.entry, site.spatial), config.scheme.transition(site)
            downsample = pooled_map(site.entry, dim, *outside, restart, enter)
            dim_in, since, earlier = dim, 0, 0
        for first in (position == 0 for position in range(count)):
            stride = 2 if first and number > 0 and not config.transitions else 1
            site = Site(dim=dim, dim_in=dim_in, index=index, depth=config.branches, since=since, earlier=earlier)
            shortcut = (
                None if stride == 1 and dim_in == dim else resnet_transition(config, kit, placement, site, stride)
            )
            stage.append(
                make(
                    dim_in,
                    out_channels,
                    stride,
                    shortcut,
                    groups=config.groups,
                    base_width=config.base_width,
                    kit=kit,
                    placement=placement,
                    scheme=config.scheme,
                    site=site,
                )
            )
            index, dim_in, earlier = index + 1, dim, earlier + 1 if shortcut is None else 1
            since = 1 if shortcut is not None and config.shortcut in PROJECTIONS else since + 1
        yield sequence(downsample=downsample, blocks=stage) if config.transitions else stage


def pooled_map(
    dim_in: int,
    dim: int,
    kit: Kit,
    placement: Placement,
    restart: nn.Module | None = None,
    enter: nn.Module | None = None,
) -> nn.Module:
    """Half the image, another width, outside of every connection: a 3×3 convolution, then the maxima of 2×2 pixels, and
    around them what stands around the connections.

    Shapes: (N, dim_in, H, W) → (N, dim, ⌈H/2⌉, ⌈W/2⌉).

    Args:
        dim_in: channels before the map.
        dim: channels after it.
        kit: what to build from.
        placement: where norm and activation stand.
        restart: what ends a scheme's history of `dim_in` channels.
        enter: what a scheme puts before the convolution.
    """
    after = kit.parts(placement.after, dim, fresh=True)
    return sequence(
        restart=restart,
        **kit.parts(placement.pre, dim_in),
        enter=enter,
        conv=kit.conv(dim_in, dim, 3),
        pool=nn.MaxPool2d(2, ceil_mode=True),
        post=sequence(**after) if after else None,
    )


def resnet_transition(config: ResNetConfig, kit: Kit, placement: Placement, site: Site, stride: int) -> nn.Module:
    """The shortcut where shapes change: it closes with a norm where the branch does."""
    if config.shortcut == "pad" and site.dim >= site.entry:
        return Pad(site.dim - site.entry, stride)
    closed = "norm" in config.scheme.place(site, placement).end
    project = PROJECTIONS.get(config.shortcut, projection)
    return project(site.entry, site.dim, stride, config.scheme.kit(site, kit), closed)


def resnet_head(config: ResNetConfig, kit: Kit, placement: Placement) -> nn.Module:
    """Stream to logits: what a next connection would have begun with, the mean over pixels, the classifier."""
    dim = config.width * 2 ** (len(config.blocks) - 1) * BLOCKS[config.block].expansion
    return sequence(
        close=config.scheme.close(dim, 2, kit),
        **kit.parts(placement.pre, dim),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        before=None if kit.before is None else kit.before(),
        classifier=Classifier(dim, config.classes),
    )
