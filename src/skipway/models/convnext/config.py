"""The config of the ConvNeXt family."""

from __future__ import annotations

from dataclasses import dataclass

from skipway.errors import SkipwayError
from skipway.schemes import Identity, Scheme
from skipway.validation import check_blocks, check_positive_int, is_whole

__all__ = ["ConvNeXtConfig"]


@dataclass(frozen=True, kw_only=True)
class ConvNeXtConfig:
    """A ConvNeXt, v1 or v2.

    Args:
        blocks: residual blocks per stage, one branch each; every stage but the first halves the image and doubles the
            width.
        width: channels of the first stage.
        patch: side of the patches that the stem cuts the image into, in pixels; even, or 1.
        kernel: side of the depthwise convolutions, odd.
        ratio: hidden width of a branch over its width.
        response: global response normalisation in every branch (v2).
        squeeze: reduction of a squeeze-and-excitation gate in every branch; None for no gate.
        epsilon: ε of all layer norms.
        classes: outputs of the classifier.
        channels: of the input images.
        scheme: residual scheme. The published v1 uses LayerScale, which its variants set.

    >>> config = ConvNeXtConfig(blocks=(3, 3, 9, 3))
    >>> config.branches, config.dims, config.least
    (18, (96, 192, 384, 768), 32)
    """

    blocks: tuple[int, ...]
    width: int = 96
    patch: int = 4
    kernel: int = 7
    ratio: int = 4
    response: bool = False
    squeeze: int | None = None
    epsilon: float = 1e-6
    classes: int = 1000
    channels: int = 3
    scheme: Scheme = Identity()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", check_blocks(self.blocks))
        for name in ("width", "patch", "kernel", "ratio", "classes", "channels"):
            check_positive_int(name, getattr(self, name))
        if self.patch % 2 and self.patch > 1:
            raise SkipwayError(
                f"patch={self.patch}: the rule is 1 or an even number; near it are {self.patch - 1} and "
                f"{self.patch + 1}"
            )
        if self.kernel % 2 == 0:
            raise SkipwayError(
                f"kernel={self.kernel}: the rule is an odd number, so that a branch keeps the image's size; near it "
                f"are {self.kernel - 1} and {self.kernel + 1}"
            )
        if self.squeeze is not None and not is_whole(self.squeeze, 1):
            raise SkipwayError(f"squeeze={self.squeeze!r}: the rule is a whole number of at least 1, or None")
        if not self.epsilon > 0:
            raise SkipwayError(f"epsilon={self.epsilon!r}: the rule is a number above 0")

    @property
    def branches(self) -> int:
        """L, the number of residual branches: one per block."""
        return sum(self.blocks)

    @property
    def depth(self) -> int:
        """Blocks of the whole network."""
        return self.branches

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of every stage."""
        return tuple(self.width * 2**stage for stage in range(len(self.blocks)))

    @property
    def least(self) -> int:
        """Pixels to a side that an image needs: those that the last stage sees as one."""
        return self.patch * 2 ** (len(self.blocks) - 1)
