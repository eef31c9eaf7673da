"""CaiT: a chain over the patches, then one in which only the class token moves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from skipway.models.cait.config import CaiTConfig
from skipway.models.transformer import TOKEN_KIT, MakeAttention, MakeMlp, quarter_maps, transformer_block
from skipway.models.vit.config import ViTConfig
from skipway.models.vit.network import TokenStem, vit_head
from skipway.nn import ClassAttention, FirstToken, Mlp, Role, StageMap, TalkingHeads, sequence
from skipway.nn.branch import Branch
from skipway.nn.kit import Kit
from skipway.nn.placement import PRE_NORM, Placement
from skipway.nn.site import Site

__all__ = ["CaiT", "ClassToken"]


class CaiT(nn.Module):
    """Class-Attention Image Transformer (Touvron et al. 2021, fig. 2 right):
    logits = head(class_blocks(token(blocks(stem(x))))).

    Shapes: (N, channels, H, W) → (N, classes), for H and W that the patch divides.

    Args:
        config: what to build.

    >>> model = CaiT(CaiTConfig(dim=16, blocks=2, heads=2, patch=4, image=8, classes=5))
    >>> model(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 5])
    """

    def __init__(self, config: CaiTConfig) -> None:
        super().__init__()
        self.config = config
        scheme = config.scheme
        kit, outside = scheme.kit(None, TOKEN_KIT), scheme.place(None, PRE_NORM)
        # stem and head are a ViT's; the class token comes later
        shape = ViTConfig(
            dim=config.dim,
            blocks=config.blocks,
            heads=config.heads,
            patch=config.patch,
            image=config.image,
            classes=config.classes,
            channels=config.channels,
            scheme=scheme,
        )
        self.stem = TokenStem(replace(shape, pooling="mean"), kit, outside)
        self.blocks = cait_blocks(config, 0, config.blocks, partial(TalkingHeads, config.dim, config.heads), Mlp)
        self.restart = sequence(restart=scheme.restart(config.dim, 0))
        self.token = ClassToken(config.dim)
        asking = partial(ClassAttention, config.dim, config.heads)
        self.class_blocks = cait_blocks(config, config.blocks, config.class_blocks, asking, class_mlp)
        self.head = vit_head(shape, kit, outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.class_blocks(self.token(self.restart(self.blocks(self.stem(x))))))

    def stage_maps(self) -> tuple[StageMap, ...]:
        """The patch tokens after each quarter of the self-attention blocks; class attention does not change them."""
        return quarter_maps(self.config.blocks, self.config.dim, self.config.patch, prefix=0)


class ClassToken(nn.Module):
    """Put a learned token before the others: (N, T, dim) → (N, 1 + T, dim)."""

    role = Role("embedding")

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, dim))

    def reset_parameters(self) -> None:
        """From N(0, 0.02²)."""
        nn.init.trunc_normal_(self.token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1)


def cait_blocks(config: CaiTConfig, start: int, count: int, attention: MakeAttention, mlp: MakeMlp) -> nn.Sequential:
    """`count` blocks from number `start` on."""
    return nn.Sequential(
        *(
            transformer_block(
                attention,
                Site(
                    dim=config.dim,
                    index=index,
                    depth=config.branches,
                    since=index,
                    earlier=index - 2 * start,
                    uncounted=2 * config.class_blocks,
                    spatial=0,
                ),
                int(config.dim * config.ratio),
                kit=TOKEN_KIT,
                placement=PRE_NORM,
                scheme=config.scheme,
                mlp=mlp,
            )
            for index in range(2 * start, 2 * (start + count), 2)
        )
    )


def class_mlp(dim: int, hidden: int, *, kit: Kit, placement: Placement) -> Branch:
    """The perceptron of the class token."""
    return FirstToken(Mlp(dim, hidden, kit=kit, placement=placement))
