"""The ResNet: a stem, a chain of blocks in stages, a head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from skipway.models.resnet.blocks import CONV_KIT, BasicBlock, Block, Bottleneck, projection
from skipway.models.resnet.config import ResNetConfig
from skipway.nn import Classifier, Pad, SqueezeExcitation, sequence
from skipway.site import ORIGINAL, PRE_ACTIVATION, Kit, Placement, Site

__all__ = ["ResNet"]

BLOCKS: dict[str, type[Block]] = {"basic": BasicBlock, "bottleneck": Bottleneck}
PLACEMENTS = {"original": ORIGINAL, "preactivation": PRE_ACTIVATION}


class ResNet(nn.Module):
    """Stem, chain, head: logits = classifier(pool(stages(stem(x)))).

    Shapes: (N, channels, H, W) → (N, classes), for any H, W ≥ 1.

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
        gate = None if config.squeeze is None else partial(SqueezeExcitation, reduction=config.squeeze)
        kit = replace(CONV_KIT, gate=gate)
        placement = PLACEMENTS[config.placement]
        outside = config.scheme.kit(None, kit), config.scheme.place(None, placement)
        self.stem = stem(config, *outside)
        self.stages = nn.Sequential(*stages(config, kit, placement))
        self.head = head(config, *outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))


def stem(config: ResNetConfig, kit: Kit, placement: Placement) -> nn.Module:
    """Image to stream: a convolution, what the stream passes behind a connection, and ImageNet's max-pool."""
    imagenet = config.stem == "imagenet"
    kernel, stride = (7, 2) if imagenet else (3, 1)
    return sequence(
        conv=kit.conv(config.channels, config.stem_width, kernel, stride),
        **kit.parts(placement.behind, config.stem_width),
        pool=nn.MaxPool2d(3, stride=2, padding=1) if imagenet else None,
    )


def stages(config: ResNetConfig, kit: Kit, placement: Placement) -> Iterator[nn.Sequential]:
    """The chain, stage by stage."""
    make = BLOCKS[config.block]
    index = since = 0
    dim_in = config.stem_width
    for number, count in enumerate(config.blocks):
        out_channels = config.width * 2**number
        dim = out_channels * make.expansion
        stage = nn.Sequential()
        for first in (position == 0 for position in range(count)):
            stride = 2 if first and number > 0 else 1
            site = Site(dim=dim, dim_in=dim_in, index=index, depth=config.branches, since=since)
            shortcut = None if stride == 1 and dim_in == dim else transition(config, kit, placement, site, stride)
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
            index, dim_in = index + 1, dim
            since = 1 if shortcut is not None and config.shortcut == "projection" else since + 1
        yield stage


def transition(config: ResNetConfig, kit: Kit, placement: Placement, site: Site, stride: int) -> nn.Module:
    """The shortcut where shapes change: it closes with a norm where the branch does."""
    if config.shortcut == "pad" and site.dim >= site.entry:
        return Pad(site.dim - site.entry, stride)
    closed = "norm" in config.scheme.place(site, placement).end
    return projection(site.entry, site.dim, stride, config.scheme.kit(site, kit), closed)


def head(config: ResNetConfig, kit: Kit, placement: Placement) -> nn.Module:
    """Stream to logits: what a next connection would have begun with, the mean over pixels, the classifier."""
    dim = config.width * 2 ** (len(config.blocks) - 1) * BLOCKS[config.block].expansion
    return sequence(
        **kit.parts(placement.pre, dim),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        before=None if kit.before is None else kit.before(),
        classifier=Classifier(dim, config.classes),
    )
