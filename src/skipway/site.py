"""What a builder may know: where a connection stands (Site), what it is made of (Kit), where norm and act go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from skipway.errors import SkipwayError

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "INSIDE_NORM",
    "ORIGINAL",
    "POST",
    "POST_NORM",
    "PRE_ACTIVATION",
    "PRE_NORM",
    "RES_POST_NORM",
    "SANDWICH_NORM",
    "Kind",
    "Kit",
    "Part",
    "Placement",
    "Site",
]

Part = Literal["norm", "act"]
Kind = Literal["conv", "attention", "mlp"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """What one residual connection knows of its place in the network.

    The library's unit of depth is the residual *branch*: a ResNet block is one, a transformer block two. Papers count
    blocks, layers or sublayers; each scheme's docstring says how it converts.

    Args:
        dim: channels of the stream behind the connection, ≥ 1.
        dim_in: channels of the stream in front of it; `dim` unless the connection changes the width.
        index: position among all branches of the network, 0 ≤ index < depth.
        depth: number of branches L of the whole network, ≥ 1.
        since: branches that have added to the stream since its variance was last reset, that is since the last
            projection shortcut (itself included), or since the stem. At a projection: those before it.
        spatial: axes behind the channel axis: 2 for image maps (N, C, H, W), 0 for tokens (N, T, C).
        kind: what the branch does: "conv", "attention" or "mlp".

    >>> Site(dim=64, index=3, depth=16).position
    4
    """

    dim: int
    dim_in: int | None = None
    index: int = 0
    depth: int = 1
    since: int = 0
    spatial: int = 2
    kind: Kind = "conv"

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise SkipwayError(f"dim={self.dim}: a stream needs at least one channel")
        if not 0 <= self.index < self.depth:
            raise SkipwayError(f"index={self.index}, depth={self.depth}: the rule is 0 <= index < depth")

    @property
    def position(self) -> int:
        """l = index + 1, the papers' running number of the branch, 1 ≤ l ≤ L."""
        return self.index + 1

    @property
    def entry(self) -> int:
        """Channels of the stream in front of the connection."""
        return self.dim if self.dim_in is None else self.dim_in


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What branches, stems and heads are built from: one object in place of `norm_layer=, act_layer=, conv_layer=`.

    Every entry is a factory; `None` means that the part is absent.

    Args:
        conv: `(in_channels, out_channels, kernel_size, stride=1, groups=1, bias=…, padding=…) -> Module`, same-padded
            unless told.
        linear: `(in_features, out_features, bias=...) -> Module`.
        norm: `(channels) -> Module`, or None.
        act: `() -> Module`.
        gate: `(channels) -> Module`, what closes a branch (squeeze-and-excitation, say), or None.
        before: `() -> Module`, what stands right before every linear map but a branch's first (Fixup's scalar
            bias, say), or None. Before the first map stands `Scheme.enter`.
    """

    conv: Callable[..., nn.Module]
    linear: Callable[..., nn.Module]
    norm: Callable[[int], nn.Module] | None
    act: Callable[[], nn.Module]
    gate: Callable[[int], nn.Module] | None = None
    before: Callable[[], nn.Module] | None = None

    def without_norm(self) -> Kit:
        """The same kit without normalisation; convolutions get the bias that a norm would have brought."""
        return replace(self, norm=None, conv=partial(self.conv, bias=True))

    def parts(self, names: tuple[Part, ...], dim: int, *, fresh: bool = False) -> dict[str, nn.Module | None]:
        """The named parts at a place with `dim` channels; a part the kit lacks is None.

        Behind a norm, or where what comes in is `fresh` (a map's output, a sum: nobody else's), an activation that can
        works in place; on the stream itself it must not, since the shortcut reads that too.
        """
        made: dict[str, nn.Module | None] = {}
        for name in names:
            made[name] = self.act() if name == "act" else None if self.norm is None else self.norm(dim)
        act = made.get("act")
        if (fresh or made.get("norm") is not None) and hasattr(act, "inplace"):
            act.inplace = True  # type: ignore[union-attr]
        return made


@dataclass(frozen=True)
class Placement:
    """Where normalisation and activation stand around a connection: y = post(x + end(F(pre(x)))).

    `inside` is behind the first map of the branch, for families that norm there (ConvNeXt).

    | placement | pre | inside | end | post | source |
    |---|---|---|---|---|---|
    | `ORIGINAL` | | | norm | act | He 2015: conv-norm-act-conv-norm, add, act |
    | `PRE_ACTIVATION` | norm, act | | | | He 2016: norm-act-conv-norm-act-conv, add |
    | `POST` | | | | norm, act | "BN after addition" (He 2016, fig. 4b) |
    | `PRE_NORM` | norm | | | | transformers since GPT-2, ViT (Xiong et al. 2020) |
    | `POST_NORM` | | | | norm | Vaswani et al. 2017 |
    | `RES_POST_NORM` | | | norm | | Swin V2 (Liu et al. 2022, fig. 1) |
    | `SANDWICH_NORM` | norm | | norm | | CogView (Ding et al. 2021, sec. 2.4) |
    | `INSIDE_NORM` | | norm | | | ConvNeXt (Liu et al. 2022, fig. 4) |

    >>> ORIGINAL.to("pre") == PRE_ACTIVATION
    True
    """

    pre: tuple[Part, ...] = ()
    inside: tuple[Part, ...] = ()
    end: tuple[Part, ...] = ()
    post: tuple[Part, ...] = ()

    def to(self, where: Literal["pre", "inside", "end", "post"]) -> Placement:
        """All parts of this placement gathered in one place, norm before act."""
        present = {*self.pre, *self.inside, *self.end, *self.post}
        parts: tuple[Part, ...] = tuple(part for part in ("norm", "act") if part in present)
        return replace(Placement(), **{where: parts})

    @property
    def behind(self) -> tuple[Part, ...]:
        """What the stream has passed when it leaves a connection, and so what a stem has to end with."""
        return self.end + self.post


ORIGINAL = Placement(end=("norm",), post=("act",))
PRE_ACTIVATION = Placement(pre=("norm", "act"))
POST = Placement(post=("norm", "act"))
PRE_NORM = Placement(pre=("norm",))
POST_NORM = Placement(post=("norm",))
RES_POST_NORM = Placement(end=("norm",))
SANDWICH_NORM = Placement(pre=("norm",), end=("norm",))
INSIDE_NORM = Placement(inside=("norm",))
