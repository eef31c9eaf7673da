"""The Vision Transformer: patches to tokens, a chain of attention and MLP branches, a head."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.models.transformer import NORM_PLACEMENTS, TOKEN_KIT, TokenPool, quarter_maps, transformer_block
from skipway.models.vit.config import ViTConfig
from skipway.nn import Attention, Classifier, QuickGELU, Role, StageMap, TruncatedNormal, sequence
from skipway.nn.kit import Kit
from skipway.nn.placement import Placement
from skipway.nn.positions import resample
from skipway.nn.site import Site

__all__ = ["TokenStem", "ViT"]

ACTS = {"gelu": nn.GELU, "tanhgelu": partial(nn.GELU, approximate="tanh"), "quickgelu": QuickGELU}


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021): logits = head(blocks(stem(x))).

    Shapes: (N, channels, H, W) → (N, classes), for H and W that the patch divides; at another size than
    `config.image` the position table is resampled.

    Args:
        config: what to build.

    >>> model = ViT(ViTConfig(dim=16, blocks=2, heads=2, patch=4, image=8, classes=5))
    >>> model(torch.zeros(2, 3, 8, 8)).shape, model(torch.zeros(2, 3, 12, 8)).shape
    (torch.Size([2, 5]), torch.Size([2, 5]))
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        scheme, placement = config.scheme, NORM_PLACEMENTS[config.norm]
        family = replace(TOKEN_KIT, norm=partial(nn.LayerNorm, eps=config.epsilon), act=ACTS[config.act])
        kit, outside = scheme.kit(None, family), scheme.place(None, placement)
        self.stem = TokenStem(config, kit, outside)
        self.blocks = nn.Sequential(
            *(
                transformer_block(
                    partial(vit_attention, config),
                    Site(dim=config.dim, index=index, depth=config.branches, since=index, spatial=0),
                    int(config.dim * config.ratio),
                    kit=family,
                    placement=placement,
                    scheme=scheme,
                )
                for index in range(0, config.branches, 2)
            )
        )
        self.head = vit_head(config, kit, outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))

    def stage_maps(self) -> tuple[StageMap, ...]:
        """The patch tokens after each quarter of the blocks."""
        config = self.config
        return quarter_maps(config.blocks, config.dim, config.patch, config.prefix + config.registers)


def vit_attention(config: ViTConfig, *, kit: Kit, placement: Placement) -> Attention:
    """The attention branch; the norm of queries and keys is the family's, whatever the scheme does to the stream's."""
    head_norm = partial(nn.LayerNorm, eps=config.epsilon) if config.head_norm else None
    return Attention(config.dim, config.heads, kit=kit, placement=placement, head_norm=head_norm)


class TokenStem(nn.Module):
    """Image to tokens: patches through one map, class token in front, positions added, registers between.

    Shapes: (N, channels, H, W) → (N, T, dim), T = class token + registers + (H / patch) · (W / patch).

    Raises:
        SkipwayError: the patch does not divide the image.
    """

    role = Role("embedding")

    def __init__(self, config: ViTConfig, kit: Kit, placement: Placement) -> None:
        super().__init__()
        self.grid, self.prefix, self.size = config.grid, config.prefix, config.patch
        self.patch = kit.conv(
            config.channels, config.dim, config.patch, config.patch, bias=not config.stem_norm, padding=0
        )
        self.placed = self.prefix if config.place_token else 0
        rows = self.placed + self.grid[0] * self.grid[1]
        self.token = nn.Parameter(torch.zeros(1, config.dim)) if self.prefix else None
        self.registers = nn.Parameter(torch.zeros(config.registers, config.dim)) if config.registers else None
        self.position = nn.Parameter(torch.zeros(rows, config.dim))
        norm = kit.parts(("norm",) if config.stem_norm else placement.post, config.dim)
        self.post = sequence(**norm, open=config.scheme.open())

    def reset_parameters(self) -> None:
        """Positions from N(0, 0.02²), tokens from N(0, 10⁻¹²), timm's ViT."""
        nn.init.trunc_normal_(self.position, std=0.02)
        for tokens in (self.token, self.registers):
            if tokens is not None:
                nn.init.normal_(tokens, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        position = resample(self.position, self.grid, self.grid_of(x), self.placed)
        front = [] if self.token is None else [self.token + position[: self.placed].sum(0)]
        front += [] if self.registers is None else [self.registers]
        patches = self.patch(x).flatten(2).transpose(1, 2) + position[self.placed :]
        return self.post(torch.cat([*(each.expand(x.shape[0], -1, -1) for each in front), patches], dim=1))

    def resampled(self, name: str, tensor: Tensor) -> Tensor | None:
        """A position table that was learned on another square grid, for this one's; None for what is none."""
        rows = tensor.reshape(-1, tensor.shape[-1])
        side = math.isqrt(max(len(rows) - self.placed, 0))
        if name != "position" or not side or side**2 + self.placed != len(rows):
            return None
        return resample(rows, (side, side), self.grid, self.placed)

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in the image."""
        height, width = x.shape[-2:]
        if height % self.size or width % self.size:
            near = sorted({max(side - side % self.size, self.size) for side in (height, width)})
            raise SkipwayError(
                f"an image of {height} × {width} pixels: this ViT takes multiples of its patch, {self.size}; near it "
                f"are {' and '.join(f'{side} or {side + self.size}' for side in near)}"
            )
        return height // self.size, width // self.size


def vit_head(config: ViTConfig, kit: Kit, placement: Placement) -> nn.Module:
    """Tokens to logits. The norm precedes the pooling, or follows it for mean pooling; post-norm streams need none."""
    width = 2 * config.dim if config.pooling == "token+mean" else config.dim
    norm = None if kit.norm is None or "norm" in placement.post else kit.norm(config.dim)
    pool = TokenPool(config.pooling, config.prefix + config.registers)
    first = {"pool": pool, "norm": norm} if config.pooling == "mean" else {"norm": norm, "pool": pool}
    before = None if kit.before is None else kit.before()
    return sequence(
        close=config.scheme.close(config.dim, 0, kit),
        **first,
        before=before,
        classifier=Classifier(width, config.classes, initial=TruncatedNormal(0.02)),
    )
