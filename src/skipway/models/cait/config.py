"""The config of the CaiT family."""

from __future__ import annotations

from dataclasses import dataclass

from skipway.errors import SkipwayError
from skipway.schemes import Identity, Scheme
from skipway.validation import check_positive_int

__all__ = ["CaiTConfig"]


@dataclass(frozen=True, kw_only=True)
class CaiTConfig:
    """A Class-Attention Image Transformer.

    Args:
        dim: channels of the tokens.
        blocks: self-attention blocks with talking heads, the papers' depth; two residual branches each.
        heads: attention heads, a divisor of `dim`.
        class_blocks: class-attention blocks after the self-attention blocks.
        ratio: hidden width of the MLPs over `dim`.
        patch: side of a patch in pixels.
        image: side of the images that the position table is made for; others are resampled to.
        classes: outputs of the classifier.
        channels: of the input images.
        scheme: how the connections are dressed.

    >>> CaiTConfig(dim=192, blocks=24, heads=4).branches
    52
    """

    dim: int
    blocks: int
    heads: int
    class_blocks: int = 2
    ratio: float = 4.0
    patch: int = 16
    image: int = 224
    classes: int = 1000
    channels: int = 3
    scheme: Scheme = Identity()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        for name in ("dim", "blocks", "heads", "class_blocks", "patch", "image", "classes", "channels"):
            check_positive_int(name, getattr(self, name))
        if self.dim % self.heads:
            raise SkipwayError(f"dim={self.dim}, heads={self.heads}: the rule is that heads divides dim")
        if self.image % self.patch:
            raise SkipwayError(f"image={self.image}, patch={self.patch}: the rule is a multiple of the patch")

    @property
    def branches(self) -> int:
        """L, the number of residual branches, class attention included."""
        return 2 * (self.blocks + self.class_blocks)

    @property
    def depth(self) -> int:
        """Self-attention blocks, the papers' depth."""
        return self.blocks

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of `image` pixels."""
        return self.image // self.patch, self.image // self.patch
