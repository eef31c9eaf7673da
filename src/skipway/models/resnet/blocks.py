"""BasicBlock and Bottleneck: the classic blocks, with the classic constructor, on the one residual connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from skipway.errors import SkipwayError
from skipway.nn import Conv, Conv2d, ConvBranch, Linear, Projection, Residual, Shortcut, sequence
from skipway.nn.kit import Kit
from skipway.nn.placement import ORIGINAL, Placement
from skipway.nn.site import Site
from skipway.schemes import Identity, Scheme
from skipway.schemes import parse_scheme as read_scheme
from skipway.tracing.chain import chain

__all__ = ["CONV_KIT", "BasicBlock", "Block", "Bottleneck", "pooled_projection", "projection"]

CONV_KIT = Kit(conv=Conv2d, linear=Linear, norm=nn.BatchNorm2d, act=nn.ReLU)
"""He 2015: convolutions without bias, BatchNorm, ReLU."""


class Block(Residual):
    """Abstract base of both blocks, which define `expansion` and `convs`.

    y = act(shortcut(x) + F(x)) with the defaults; placement and scheme can change that.

    Args:
        in_channels: channels of the stream before the block.
        out_channels: channels of its inner convolutions; the stream after the block has `expansion` times as many.
        stride: of the 3 × 3 (the first one of two), 1 or 2.
        downsample: module that takes the input to the output's shape, needed where the shapes differ (see
            `projection`). A `skipway.nn.shortcut.Shortcut` is called with (x, h).
        groups: of the 3 × 3 of a bottleneck (ResNeXt's cardinality).
        base_width: inner channels per group for 64 `out_channels` (ResNeXt, Wide-ResNet); 64 is the plain block.
        kit: what to build from.
        placement: where norm and activation stand.
        scheme: how the connection is dressed; a scheme or its spec string.
        site: where the block stands. Without one it is a network of its own, one branch deep, and ready to use;
            inside a network give each its site, and let `initialise_` do the rest once.

    Raises:
        SkipwayError: the shapes differ and there is no `downsample`.
    """

    expansion: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        groups: int = 1,
        base_width: int = 64,
        kit: Kit = CONV_KIT,
        placement: Placement = ORIGINAL,
        scheme: Scheme | str = Identity(),  # noqa: B008 - frozen
        site: Site | None = None,
    ) -> None:
        dim = out_channels * self.expansion
        if downsample is None and (stride != 1 or in_channels != dim):
            raise SkipwayError(
                f"{type(self).__name__}({in_channels}, {out_channels}, stride={stride}) turns {in_channels} channels "
                f"into {dim} at stride {stride}, so its shortcut needs a downsample: "
                f"downsample=skipway.projection({in_channels}, {dim}, stride={stride})"
            )
        convs = self.convs(in_channels, out_channels, stride, groups, base_width)
        super().__init__(
            **read_scheme(scheme).slots(
                Site(dim=dim, dim_in=in_channels) if site is None else site,
                branch=lambda kit, placement: ConvBranch(convs, kit, placement.end),
                shortcut=as_shortcut(downsample),
                kit=kit,
                placement=placement,
            )
        )
        if site is None and not any(parameter.is_meta for parameter in self.branch.parameters()):
            # every module has just been made, so only the scheme's own step is left; a given downsample stays as it is
            read_scheme(scheme).init_(chain(self))

    @classmethod
    def convs(cls, in_channels: int, out_channels: int, stride: int, groups: int, base_width: int) -> Sequence[Conv]:
        """The convolutions of the branch."""
        raise NotImplementedError


class BasicBlock(Block):
    """3×3 – 3×3 (He 2015, fig. 5 left): y = relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))).

    Shapes: (N, in_channels, H, W) → (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉).

    >>> import torch
    >>> block = BasicBlock(64, 128, stride=2, downsample=projection(64, 128, stride=2))
    >>> block(torch.zeros(1, 64, 8, 8)).shape
    torch.Size([1, 128, 4, 4])
    """

    expansion = 1

    @classmethod
    def convs(cls, in_channels: int, out_channels: int, stride: int, groups: int, base_width: int) -> Sequence[Conv]:
        if groups != 1 or base_width != 64:
            raise SkipwayError(
                f"groups={groups}, base_width={base_width}: a BasicBlock has one group, full width; use Bottleneck"
            )
        return [Conv(in_channels, out_channels, 3, stride), Conv(out_channels, out_channels, 3)]


class Bottleneck(Block):
    """1×1 – 3×3 – 1×1 (He 2015, fig. 5 right), the stride on the 3×3 ("v1.5").

    Shapes: (N, in_channels, H, W) → (N, 4 · out_channels, ⌈H/stride⌉, ⌈W/stride⌉).

    >>> import torch
    >>> Bottleneck(256, 64)(torch.zeros(1, 256, 8, 8)).shape
    torch.Size([1, 256, 8, 8])
    """

    expansion = 4

    @classmethod
    def convs(cls, in_channels: int, out_channels: int, stride: int, groups: int, base_width: int) -> Sequence[Conv]:
        width = int(out_channels * base_width / 64) * groups
        if width < 1:
            raise SkipwayError(
                f"out_channels={out_channels}, base_width={base_width}: that is an inner width of 0; the rule is "
                "out_channels · base_width ≥ 64"
            )
        return [
            Conv(in_channels, width, 1),
            Conv(width, width, 3, stride, groups),
            Conv(width, out_channels * cls.expansion, 1),
        ]


def as_shortcut(downsample: nn.Module | None) -> nn.Module | None:
    """A module that takes (x, h), from one that takes the tensor to project."""
    if downsample is None or isinstance(downsample, Shortcut):
        return downsample
    return Projection(downsample)


def projection(
    in_channels: int, out_channels: int, stride: int = 1, kit: Kit = CONV_KIT, closed: bool = True
) -> nn.Module:
    """The classic projection: a strided 1 × 1 convolution and, if `closed`, its norm (He 2015, option B).

    Shapes: (N, in_channels, H, W) → (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉).

    >>> projection(64, 128, stride=2)
    Sequential(
      (conv): Conv2d(64, 128, kernel_size=(1, 1), stride=(2, 2), bias=False)
      (norm): BatchNorm2d(128, ...)
    )
    """
    norm = kit.parts(("norm",), out_channels) if closed else {}
    return sequence(conv=kit.conv(in_channels, out_channels, 1, stride), **norm)


def pooled_projection(
    in_channels: int, out_channels: int, stride: int = 1, kit: Kit = CONV_KIT, closed: bool = True
) -> nn.Module:
    """A projection of the mean over stride × stride pixels, where the classic one drops all but the first (He, T. et
    al. 2019, fig. 2c). At a border the mean is over the pixels that are there.

    Shapes: (N, in_channels, H, W) → (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉).

    >>> pooled_projection(64, 128, stride=2)
    Sequential(
      (pool): AvgPool2d(kernel_size=2, stride=2, padding=0)
      (conv): Conv2d(64, 128, kernel_size=(1, 1), stride=(1, 1), bias=False)
      (norm): BatchNorm2d(128, ...)
    )
    """
    pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else None
    return sequence(pool=pool, **dict(projection(in_channels, out_channels, 1, kit, closed).named_children()))
