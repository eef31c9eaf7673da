"""Shared by all transformer families: the kit, the block of an attention and an MLP connection, and pooling."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from skipway.nn import Branch, Conv2d, Linear, Mlp, Residual, StageMap, TokenGrid, TruncatedNormal
from skipway.nn.kit import Kit
from skipway.nn.placement import POST_NORM, PRE_NORM, RES_POST_NORM, SANDWICH_NORM, Placement
from skipway.nn.site import Site
from skipway.schemes import Scheme

__all__ = [
    "NORM_PLACEMENTS",
    "TOKEN_KIT",
    "MakeAttention",
    "MakeMlp",
    "Norm",
    "Pooling",
    "TokenPool",
    "quarter_maps",
    "transformer_block",
]

Norm = Literal["pre", "post", "respost", "sandwich"]
Pooling = Literal["token", "mean", "normed-mean", "token+mean"]

NORM_PLACEMENTS = {"pre": PRE_NORM, "post": POST_NORM, "respost": RES_POST_NORM, "sandwich": SANDWICH_NORM}

TOKEN_KIT = Kit(
    conv=partial(Conv2d, bias=True, initial=TruncatedNormal(0.02)),
    linear=partial(Linear, initial=TruncatedNormal(0.02)),
    norm=partial(nn.LayerNorm, eps=1e-6),
    act=nn.GELU,
)
"""Dosovitskiy et al. 2021: maps from N(0, 0.02²), LayerNorm, GELU."""


class MakeAttention(Protocol):
    """Makes an attention branch from the dressed kit and placement."""

    def __call__(self, *, kit: Kit, placement: Placement) -> Branch: ...


class MakeMlp(Protocol):
    """Makes an MLP branch from its width and the dressed kit and placement."""

    def __call__(self, dim: int, hidden: int, *, kit: Kit, placement: Placement) -> Branch: ...


def transformer_block(
    attention: MakeAttention,
    site: Site,
    hidden: int,
    *,
    kit: Kit,
    placement: Placement,
    scheme: Scheme,
    mlp: MakeMlp = Mlp,
) -> nn.Sequential:
    """One block: a residual connection around an attention, and one around an MLP.

    Args:
        attention: makes the attention branch from the dressed kit and placement.
        site: of the attention connection; the MLP connection follows it.
        hidden: channels inside the MLP.
        kit: what to build from, undressed.
        placement: where the norms stand, undressed.
        scheme: how the connections are dressed.
        mlp: makes the MLP branch from (dim, hidden) and the dressed kit and placement.
    """
    first = replace(site, kind="attention")
    second = replace(
        site, kind="mlp", dim_in=None, index=site.index + 1, since=site.since + 1, earlier=site.outputs + 1
    )

    block = nn.Sequential()
    for name, branch, place in (
        ("attention", attention, first),
        ("mlp", partial(mlp, site.dim, hidden), second),
    ):
        slots = scheme.slots(
            place,
            branch=lambda kit, placement, make=branch: make(kit=kit, placement=placement),
            shortcut=None,
            kit=kit,
            placement=placement,
        )
        block.add_module(name, Residual(**slots))
    return block


def quarter_maps(blocks: int, dim: int, patch: int, prefix: int) -> tuple[StageMap, ...]:
    """The stream after each quarter of the blocks (fewer maps for fewer blocks), without the prefix tokens.

    What dense heads take of a network without stages: DPT (Ranftl et al. 2021, the code: blocks 3, 6, 9, 12 of 12 and
    6, 12, 18, 24 of 24), DINOv2's linear heads over four layers.

    >>> [stage.path for stage in quarter_maps(12, 384, 16, 1)]
    ['blocks.2', 'blocks.5', 'blocks.8', 'blocks.11']
    """
    ends = sorted({math.ceil(blocks * quarter / 4) for quarter in range(1, 5)})
    return tuple(StageMap(f"blocks.{end - 1}", dim, patch, TokenGrid(patch, prefix)) for end in ends)


class TokenPool(nn.Module):
    """Tokens to one vector: the class token, the mean over the patches, or both beside each other (DINOv2).

    Shapes: (N, T, dim) → (N, dim), for "token+mean" (N, 2 · dim).

    Args:
        kind: "token", "mean" or "normed-mean" (the same to us: the norm stands outside), or "token+mean".
        prefix: tokens before the patches (class token, registers), left out of the mean.

    >>> TokenPool("token+mean", prefix=1)(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 16])
    """

    def __init__(self, kind: Pooling, prefix: int) -> None:
        super().__init__()
        self.kind, self.prefix = kind, prefix

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "token":
            return x[:, 0]
        mean = x[:, self.prefix :].mean(1)
        return torch.cat((x[:, 0], mean), dim=-1) if self.kind == "token+mean" else mean

    def extra_repr(self) -> str:
        return f"{self.kind!r}, prefix={self.prefix}"
