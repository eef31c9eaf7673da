from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from skipway.nn import GatedExit, GatedResidual, StreamEntry
from skipway.nn.kit import Kit
from skipway.nn.placement import Placement
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_positive_int

__all__ = ["GatedStreams"]


@dataclass(frozen=True)
class GatedStreams(Scheme):
    """n streams that are never mixed: sⱼ' = sⱼ + wⱼ F(x), x the mean of the normalised streams, gated per channel.

    The read normalises, so the family's norm before a branch goes; norms inside and after a branch stay, and so does
    the final norm, behind the last read.

    Args:
        n: streams.
        rank: r, inner width of the gates; None for an eighth of the channels, 8 at least. Qwen4-Exp has 320.

    Depth: none enters.

    Decay and learning rate: the maps of the gates are decayed, the gains of the norms are not.

    Theory at the start: gates of σ(0) = ½ and writes of 2σ(0) = 1 up to the maps' random start from N(0, 0.02²), so a
    branch reads half of the normalised stream and all streams get nearly the same: those of a pre-norm network whose
    branches read ½ rms(x). The skip is the identity at any depth and in all of the training.

    Source: transformers' `qwen4_exp` (2026), `Qwen4ExpTextGatedResidual`, to which ours is equal. The theory is ours.

    >>> GatedStreams(n=2).streams(Site(dim=64, depth=4)).read.down
    Linear(in_features=128, out_features=8, bias=False)
    """

    n: int = 4
    rank: int | None = None

    equation: ClassVar[str] = "sⱼ' = sⱼ + 2σ(·) F(mean(σ(·) ⊙ rms(s))), n streams s"
    norm_note: ClassVar[str] = "replaces the one before the branch"
    when: ClassVar[str] = "transformers at high learning rates; several streams with an identity skip"
    source: ClassVar[str] = "transformers' qwen4_exp, 2026"

    def __post_init__(self) -> None:
        check_positive_int("n", self.n)
        if self.rank is not None:
            check_positive_int("rank", self.rank)

    def place(self, site: Site | None, placement: Placement) -> Placement:
        return placement if site is None else replace(placement, pre=tuple(p for p in placement.pre if p != "norm"))

    def streams(self, site: Site, kit: Kit | None = None) -> GatedResidual:
        return GatedResidual(self.n, dim=site.entry, rank=self.rank_for(site.entry), spatial=site.spatial)

    def open(self) -> nn.Module:
        return StreamEntry(self.n)

    def close(self, dim: int, spatial: int, kit: Kit | None = None) -> nn.Module:
        return GatedExit(self.n, dim=dim, rank=self.rank_for(dim), spatial=spatial)

    def rank_for(self, dim: int) -> int:
        """r for so many channels."""
        return max(dim // 8, 8) if self.rank is None else self.rank
