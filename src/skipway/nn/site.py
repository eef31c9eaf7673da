"""`Site`: where a connection stands in its network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from skipway.errors import SkipwayError

__all__ = ["Kind", "Site"]

Kind = Literal["conv", "attention", "mlp"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """The place of one residual connection in its network.

    The library's unit of depth is the residual *branch*: a ResNet block is one, a transformer block two. Papers count
    blocks, layers or sublayers; each scheme's docstring says how it converts.

    Args:
        dim: channels of the stream after the connection, ≥ 1.
        dim_in: channels of the stream before the connection; `dim` unless the connection changes the width.
        index: position among all branches of the network, 0 ≤ index < depth.
        depth: number of branches L of the whole network, ≥ 1.
        since: branches that have added to the stream since its variance was last reset, that is since the last
            projection shortcut (itself included), or since the stem. At a projection: those before it.
        earlier: branches before this one whose outputs have the shape of what it reads: since the stem, a map between
            stages or a shortcut that is no carry (its branch included). None: as `since`.
        uncounted: branches of the network that its paper does not count as depth (CaiT: class attention).
        spatial: axes after the channel axis: 2 for image maps (N, C, H, W), 0 for tokens (N, T, C).
        kind: what the branch does: "conv", "attention" or "mlp".
        block: number of the block that the branch is in, from 0. None: two branches make one.
        kinds: what all branches of the network do, in order, where that is known; empty where it is not.

    >>> Site(dim=64, index=3, depth=16).position
    4
    """

    dim: int
    dim_in: int | None = None
    index: int = 0
    depth: int = 1
    since: int = 0
    earlier: int | None = None
    uncounted: int = 0
    spatial: int = 2
    kind: Kind = "conv"
    block: int | None = None
    kinds: tuple[Kind, ...] = field(default=(), repr=False)

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
    def block_number(self) -> int:
        """b = 1, 2, …, the papers' running number of the transformer block."""
        return (self.index // 2 if self.block is None else self.block) + 1

    @property
    def outputs(self) -> int:
        """Earlier branches whose outputs have the shape of what this one reads."""
        return self.since if self.earlier is None else self.earlier

    @property
    def counted_depth(self) -> int:
        """The branches that the paper of the network counts as its depth."""
        return self.depth - self.uncounted

    @property
    def entry(self) -> int:
        """Channels of the stream before the connection."""
        return self.dim if self.dim_in is None else self.dim_in
