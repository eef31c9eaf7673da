"""The Swin Transformer: patches to a map of tokens, stages of shifted window attention and MLP, a head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.models.swin.config import SwinConfig
from skipway.models.transformer import NORM_PLACEMENTS, TOKEN_KIT, MakeAttention, TokenPool, transformer_block
from skipway.nn import (
    ChannelsLast,
    Classifier,
    CosineWindowAttention,
    StageMap,
    TruncatedNormal,
    Window,
    WindowAttention,
    sequence,
)
from skipway.nn.kit import Kit
from skipway.nn.placement import Placement
from skipway.nn.site import Site

__all__ = ["SWIN_KIT", "NeighbourConcat", "Swin", "SwinStem"]

SWIN_KIT = replace(TOKEN_KIT, norm=nn.LayerNorm)
"""Liu et al. 2021, the authors' code: maps from N(0, 0.02²), LayerNorm with ε = 1e-5, GELU."""


class Swin(nn.Module):
    """Swin Transformer (Liu et al. 2021) and Swin Transformer V2 (Liu et al. 2022):
    logits = head(stages(stem(x))), the stream a map of tokens (N, H, W, C).

    Shapes: (N, channels, H, W) → (N, classes), for any H and W that the patch divides.

    Args:
        config: what to build.

    >>> import torch
    >>> model = Swin(SwinConfig(dim=16, heads=2, blocks=(2, 2), window=4, image=32, classes=5))
    >>> model(torch.zeros(2, 3, 32, 32)).shape, model(torch.zeros(2, 3, 20, 36)).shape
    (torch.Size([2, 5]), torch.Size([2, 5]))
    """

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        placement = NORM_PLACEMENTS[config.norm]
        outside = config.scheme.kit(None, SWIN_KIT), config.scheme.place(None, placement)
        self.stem = SwinStem(config, outside[0])
        self.stages = nn.Sequential(*swin_stages(config, placement))
        self.head = swin_head(config, *outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))

    def stage_maps(self) -> tuple[StageMap, ...]:
        """The stream after the last block of every stage, before the patch merging."""
        config = self.config
        return tuple(
            StageMap(f"stages.{number}.{count - 1}", width, config.patch * 2**number, ChannelsLast())
            for number, (count, width) in enumerate(zip(config.blocks, config.widths, strict=True))
        )


class SwinStem(nn.Module):
    """Image to a map of tokens: patches through one map, and a norm.

    Shapes: (N, channels, H, W) → (N, H / patch, W / patch, dim).

    Raises:
        SkipwayError: the patch does not divide the image.
    """

    def __init__(self, config: SwinConfig, kit: Kit) -> None:
        super().__init__()
        self.size = config.patch
        self.patch = kit.conv(config.channels, config.dim, config.patch, config.patch, padding=0)
        self.norm = nn.Identity() if kit.norm is None else kit.norm(config.dim)
        self.post = sequence(open=config.scheme.open())

    def forward(self, x: Tensor) -> Tensor:
        self.check(*x.shape[-2:])
        return self.post(self.norm(self.patch(x).permute(0, 2, 3, 1)))

    def check(self, height: int, width: int) -> None:
        """Refuse an image that the patch does not divide: other libraries cut, pad or refuse it, and so differ."""
        wrong = sorted({side for side in (height, width) if side % self.size})
        if wrong:
            near = [(max(side - side % self.size, self.size), side - side % self.size + self.size) for side in wrong]
            ways = ", ".join(f"{below} or {above} for {side}" for side, (below, above) in zip(wrong, near, strict=True))
            raise SkipwayError(
                f"an image of {height} × {width} pixels: this Swin takes multiples of its patch, {self.size}; near it "
                f"are {ways}"
            )


class NeighbourConcat(nn.Module):
    """The four tokens of every 2 × 2 square as one, in the order ↖ ↙ ↗ ↘; an odd map is padded with zeros.

    Shapes: (N, H, W, C) → (N, ⌈H / 2⌉, ⌈W / 2⌉, 4C).

    >>> import torch
    >>> NeighbourConcat()(torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, :, :, None]).flatten()
    tensor([1., 3., 2., 4.])
    """

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = nn.functional.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)


def swin_stages(config: SwinConfig, placement: Placement) -> Iterator[nn.Sequential]:
    """The chain, stage by stage; a patch merging follows each stage but the last."""
    first = 0
    for number, count in enumerate(config.blocks):
        site = Site(dim=config.widths[number], depth=config.branches, spatial=0)
        stage = nn.Sequential()
        for position in range(count):
            block = transformer_block(
                swin_attention(config, number, shifted=position % 2 == 1),
                replace(site, index=first + 2 * position, since=2 * position),
                int(site.dim * config.ratio),
                kit=SWIN_KIT,
                placement=placement,
                scheme=config.scheme,
            )
            stage.add_module(str(position), block)
        first += 2 * count
        if number + 1 < len(config.blocks):
            following = replace(site, dim=2 * site.dim, dim_in=site.dim, index=first, since=2 * count)
            stage.add_module("merge", swin_merge(config, following, placement))
        yield stage


def swin_attention(config: SwinConfig, stage: int, shifted: bool) -> MakeAttention:
    """Factory of the attention branch of a block."""
    side = config.windows[stage]
    window = Window(side, shift=side // 2 if shifted else 0)
    heads = config.heads * 2**stage
    if config.attention == "dot":
        return partial(WindowAttention, config.widths[stage], heads, window)
    return partial(CosineWindowAttention, config.widths[stage], heads, window, learned_at=config.learned_windows[stage])


def swin_merge(config: SwinConfig, site: Site, placement: Placement) -> nn.Module:
    """Patch merging: four neighbours to one token of twice the channels, outside the residual connections.

    The norm precedes the map in pre-norm families (V1) and follows it otherwise (V2). A stream that no norm brings
    back to unit variance is brought there by the scheme.
    """
    kit, placement = config.scheme.kit(None, SWIN_KIT), config.scheme.place(None, placement)
    norm_last = "norm" in placement.after
    norm = kit.parts(("norm",), site.dim if norm_last else 4 * site.entry)
    map = {"enter": config.scheme.transition(site), "reduction": kit.linear(4 * site.entry, site.dim, bias=False)}
    restart = config.scheme.restart(site.entry, site.spatial)
    return sequence(restart=restart, neighbours=NeighbourConcat(), **(map | norm if norm_last else norm | map))


def swin_head(config: SwinConfig, kit: Kit, placement: Placement) -> nn.Module:
    """Map to logits: the norm (post-norm streams need none), the mean over tokens, the classifier."""
    width = config.widths[-1]
    return sequence(
        close=config.scheme.close(width, 0, kit),
        norm=None if kit.norm is None or "norm" in placement.post else kit.norm(width),
        flatten=nn.Flatten(1, 2),
        pool=TokenPool("mean", 0),
        before=None if kit.before is None else kit.before(),
        classifier=Classifier(width, config.classes, initial=TruncatedNormal(0.02)),
    )
