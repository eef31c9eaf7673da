"""The config of the ViT family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from skipway.errors import SkipwayError
from skipway.models.transformer import Norm, Pooling
from skipway.schemes import Identity, Scheme
from skipway.validation import check_choice, check_positive_int

__all__ = ["ViTConfig"]


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A Vision Transformer.

    Args:
        dim: channels of the tokens.
        blocks: transformer blocks, two residual branches each.
        heads: attention heads, a divisor of `dim`.
        ratio: hidden width of the MLP over `dim`.
        patch: side of a patch in pixels.
        image: side of the images that the position table is made for; others are resampled to.
        norm: "pre" (ViT), "post" (Vaswani 2017), "respost" (Swin V2), "sandwich" (CogView).
        pooling: what the classifier sees: "token" (class token), "mean" (over patches, then the norm), "normed-mean"
            (the norm before it), "token+mean" (both beside each other, DINOv2).
        registers: extra tokens without a place (Darcet et al. 2024).
        place_token: whether the class token has a row of the position table (not in DeiT III).
        stem_norm: a norm before the first block (CLIP), and no bias in the patch map.
        head_norm: normalise queries and keys per head (ViT-22B).
        act: "gelu", "tanhgelu" (its approximation by a tanh, SigLIP) or "quickgelu" (x σ(1.702 x), OpenAI's CLIP).
        epsilon: of the norms; 1e-6 as in the authors' code, 1e-12 in Hugging Face's ViT, 1e-5 in CLIP.
        classes: outputs of the classifier.
        channels: of the input images.
        scheme: how the connections are dressed.

    >>> ViTConfig(dim=384, blocks=12, heads=6).branches
    24
    """

    dim: int
    blocks: int
    heads: int
    ratio: float = 4.0
    patch: int = 16
    image: int = 224
    norm: Norm = "pre"
    pooling: Pooling = "token"
    registers: int = 0
    place_token: bool = True
    stem_norm: bool = False
    head_norm: bool = False
    act: Literal["gelu", "tanhgelu", "quickgelu"] = "gelu"
    epsilon: float = 1e-6
    classes: int = 1000
    channels: int = 3
    scheme: Scheme = Identity()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        for name in ("dim", "blocks", "heads", "patch", "image", "classes", "channels"):
            check_positive_int(name, getattr(self, name))
        if self.dim % self.heads:
            raise SkipwayError(f"dim={self.dim}, heads={self.heads}: the rule is that heads divides dim")
        if self.image % self.patch:
            below = max(self.image - self.image % self.patch, self.patch)
            raise SkipwayError(
                f"image={self.image}, patch={self.patch}: the rule is a multiple of the patch; near it are {below} and "
                f"{below + self.patch}"
            )
        for name, allowed in (
            ("norm", get_args(Norm)),
            ("pooling", get_args(Pooling)),
            ("act", ("gelu", "tanhgelu", "quickgelu")),
        ):
            check_choice(name, getattr(self, name), allowed)

    @property
    def branches(self) -> int:
        """L, the number of residual branches: attention and MLP of every block."""
        return 2 * self.blocks

    @property
    def depth(self) -> int:
        """Transformer blocks, the papers' depth."""
        return self.blocks

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of `image` pixels."""
        return self.image // self.patch, self.image // self.patch

    @property
    def prefix(self) -> int:
        """Class tokens before the patches."""
        return 0 if self.pooling in ("mean", "normed-mean") else 1
