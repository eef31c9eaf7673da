"""The config of the Swin family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from skipway.errors import SkipwayError
from skipway.models.transformer import Norm
from skipway.schemes import Identity, Scheme
from skipway.validation import check_blocks, check_choice, check_positive_int, check_rule, is_whole, whole_numbers

__all__ = ["SwinConfig"]

Similarity = Literal["dot", "cosine"]


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """A Swin Transformer, V1 or V2.

    Args:
        dim: channels of the first stage; every further stage halves the map and doubles the channels.
        heads: attention heads of the first stage, a divisor of `dim`; they double with the channels.
        blocks: transformer blocks per stage, two residual branches each; every second one is shifted.
        window: side of the windows in tokens, one for all stages or one per stage; no stage has a larger one than its
            map is for an image of `image` pixels.
        ratio: hidden width of the MLP over the channels.
        patch: side of a patch in pixels.
        image: side of the images that the windows are made for.
        attention: "dot" with a table of relative positions (V1), "cosine" with a function of them (V2).
        norm: "pre" (V1), "respost" (V2), "post" (Vaswani 2017), "sandwich" (CogView).
        learned_window: the `window` that a "cosine" attention's position function was learned at, where the weights
            come from smaller windows; None where it is learned at the present ones.
        classes: outputs of the classifier.
        channels: of the input images.
        scheme: how the connections are dressed.

    Raises:
        SkipwayError: a value that is not allowed.

    >>> config = SwinConfig(dim=96, heads=3, window=16, image=256)
    >>> config.branches, config.windows
    (24, (16, 16, 16, 8))
    """

    dim: int
    heads: int
    blocks: tuple[int, ...] = (2, 2, 6, 2)
    window: int | tuple[int, ...] = 7
    ratio: float = 4.0
    patch: int = 4
    image: int = 224
    attention: Similarity = "dot"
    norm: Norm = "pre"
    learned_window: int | tuple[int, ...] | None = None
    classes: int = 1000
    channels: int = 3
    scheme: Scheme = Identity()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", check_blocks(self.blocks))
        for name in ("dim", "heads", "patch", "image", "classes", "channels"):
            check_positive_int(name, getattr(self, name))
        if self.dim % self.heads:
            raise SkipwayError(f"dim={self.dim}, heads={self.heads}: the rule is that heads divides dim")
        if self.image % self.patch:
            below = self.image - self.image % self.patch
            raise SkipwayError(
                f"image={self.image}, patch={self.patch}: the rule is a multiple of the patch; near it are "
                f"{max(below, self.patch)} and {below + self.patch}"
            )
        for name, allowed in (("attention", get_args(Similarity)), ("norm", get_args(Norm))):
            check_choice(name, getattr(self, name), allowed)
        for name in ("window", *["learned_window"] * (self.learned_window is not None)):
            sides = per_stage(name, getattr(self, name), len(self.blocks))
            if not is_whole(getattr(self, name)):
                object.__setattr__(self, name, sides)
        if self.learned_window is not None and self.attention == "dot":
            raise SkipwayError("learned_window: a table of positions has one window; attention='cosine' has others")

    @property
    def branches(self) -> int:
        """L, the number of residual branches: attention and MLP of every block."""
        return 2 * sum(self.blocks)

    @property
    def depth(self) -> int:
        """Transformer blocks of all stages."""
        return sum(self.blocks)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.dim * 2**stage for stage in range(len(self.blocks)))

    @property
    def maps(self) -> tuple[int, ...]:
        """Side of each stage's map, in tokens, for an image of `image` pixels; merging rounds up."""
        return tuple(-(-self.image // (self.patch * 2**stage)) for stage in range(len(self.blocks)))

    @property
    def windows(self) -> tuple[int, ...]:
        """Side of each stage's windows."""
        return tuple(map(min, per_stage("window", self.window, len(self.blocks)), self.maps))

    @property
    def learned_windows(self) -> tuple[int, ...]:
        """Side of the windows that each stage's position function was learned at."""
        if self.learned_window is None:
            return self.windows
        return per_stage("learned_window", self.learned_window, len(self.blocks))


def per_stage(name: str, value: int | tuple[int, ...], stages: int) -> tuple[int, ...]:
    """A number for each stage, from one for all or from one for each."""
    found = whole_numbers((value,) * stages if is_whole(value) else value, 1)
    rule = f"a whole number of at least 1 for all stages, or one for each of the {stages}"
    check_rule(name, value, len(found) == stages, rule)
    return found
