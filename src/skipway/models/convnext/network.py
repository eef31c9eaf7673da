"""The ConvNeXt: a stem of patches, a chain of depthwise branches in stages, a head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.models.convnext.config import ConvNeXtConfig
from skipway.nn import (
    Branch,
    Classifier,
    Conv2d,
    DepthwiseMlp,
    GlobalResponseNorm,
    LayerNorm2d,
    Linear,
    Residual,
    SqueezeExcitation,
    StageMap,
    TruncatedNormal,
    sequence,
)
from skipway.nn.kit import Kit
from skipway.nn.placement import INSIDE_NORM, Placement
from skipway.nn.site import Site

__all__ = ["CONVNEXT_KIT", "ConvNeXt", "ConvNeXtStem"]

CONVNEXT_KIT = Kit(
    conv=partial(Conv2d, bias=True, initial=TruncatedNormal(0.02)),
    linear=partial(Linear, initial=TruncatedNormal(0.02)),
    norm=LayerNorm2d,
    act=nn.GELU,
)
"""Liu et al. 2022: maps from N(0, 0.02²) with biases, LayerNorm, GELU."""


class ConvNeXt(nn.Module):
    """ConvNeXt v1 and v2 (Liu et al. 2022; Woo et al. 2023): logits = head(stages(stem(x))).

    Shapes: (N, channels, H, W) → (N, classes), for H, W ≥ `config.least` (32 with the published four stages). What
    patches and halvings leave over at the right and lower edge is not seen.

    Args:
        config: what to build.

    >>> import torch
    >>> model = ConvNeXt(ConvNeXtConfig(blocks=(1, 1), width=8, classes=5))
    >>> model(torch.zeros(2, 3, 8, 8)).shape, model(torch.zeros(2, 3, 19, 8)).shape
    (torch.Size([2, 5]), torch.Size([2, 5]))
    """

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.config = config
        gate = None if config.squeeze is None else partial(SqueezeExcitation, reduction=config.squeeze)
        kit = replace(CONVNEXT_KIT, norm=partial(LayerNorm2d, eps=config.epsilon), gate=gate)
        outside = config.scheme.kit(None, kit)
        self.stem = ConvNeXtStem(config, outside)
        self.stages = nn.Sequential(*convnext_stages(config, kit, outside))
        self.head = convnext_head(config, outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))

    def stage_maps(self) -> tuple[StageMap, ...]:
        """The stream after every stage."""
        return tuple(
            StageMap(f"stages.{number}", dim, self.config.patch * 2**number)
            for number, dim in enumerate(self.config.dims)
        )


class ConvNeXtStem(nn.Module):
    """Image to stream: patches through one map, then a norm.

    Shapes: (N, channels, H, W) → (N, width, ⌊H / patch⌋, ⌊W / patch⌋).

    Raises:
        SkipwayError: the image is too small for the network's stages.
    """

    def __init__(self, config: ConvNeXtConfig, kit: Kit) -> None:
        super().__init__()
        self.least = config.least
        self.conv = kit.conv(config.channels, config.width, config.patch, config.patch)
        self.post = sequence(**kit.parts(("norm",), config.width), open=config.scheme.open())

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height < self.least or width < self.least:
            raise SkipwayError(
                f"an image of {height} × {width} pixels: this ConvNeXt takes at least {self.least} × {self.least}, "
                f"its patches halved at every stage but the first; near it is {max(height, self.least)} × "
                f"{max(width, self.least)}"
            )
        return self.post(self.conv(x))


def convnext_stages(config: ConvNeXtConfig, kit: Kit, outside: Kit) -> Iterator[nn.Module]:
    """The chain, stage by stage. The map between two stages brings the stream's variance back to where it began."""
    index = 0
    for number, (dim, count) in enumerate(zip(config.dims, config.blocks, strict=True)):
        first = Site(dim=dim, index=index, depth=config.branches)
        sites = [replace(first, index=index + since, since=since) for since in range(count)]
        transition = None if number == 0 else replace(first, dim_in=dim // 2, since=config.blocks[number - 1])
        yield sequence(
            downsample=None if transition is None else convnext_downsample(config, transition, outside),
            blocks=nn.Sequential(*(convnext_block(config, site, kit) for site in sites)),
        )
        index += count


def convnext_block(config: ConvNeXtConfig, site: Site, kit: Kit) -> Residual:
    """One residual connection."""

    def branch(kit: Kit, placement: Placement) -> Branch:
        return DepthwiseMlp(
            site.dim,
            config.ratio * site.dim,
            kit=kit,
            placement=placement,
            kernel_size=config.kernel,
            response=GlobalResponseNorm if config.response else None,
        )

    slots = config.scheme.slots(site, branch=branch, shortcut=None, kit=kit, placement=INSIDE_NORM)
    return Residual(**slots)


def convnext_downsample(config: ConvNeXtConfig, site: Site, kit: Kit) -> nn.Module:
    """Half the image, another width: a norm, what the scheme puts before a projection here, a 2 × 2 map.

    It is no residual connection, but a scheme that counts on projections to reset the variance finds its reset here.
    """
    return sequence(
        restart=config.scheme.restart(site.entry, site.spatial),
        **kit.parts(("norm",), site.entry),
        enter=config.scheme.transition(site),
        conv=kit.conv(site.entry, site.dim, 2, 2),
    )


def convnext_head(config: ConvNeXtConfig, kit: Kit) -> nn.Module:
    """Stream to logits: the mean over pixels, a norm, the classifier."""
    dim = config.dims[-1]
    return sequence(
        close=config.scheme.close(dim, 2, kit),
        pool=nn.AdaptiveAvgPool2d(1),
        **kit.parts(("norm",), dim),
        flatten=nn.Flatten(),
        before=None if kit.before is None else kit.before(),
        classifier=Classifier(dim, config.classes, initial=TruncatedNormal(0.02)),
    )
