from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from skipway.nn import NormedPair, NormedPairExit, StreamEntry
from skipway.nn.kit import Kit
from skipway.nn.normed_pair import pair_norm
from skipway.nn.placement import Placement
from skipway.nn.site import Kind, Site
from skipway.schemes.scheme import Scheme

__all__ = ["SiameseNorm"]


@dataclass(frozen=True)
class SiameseNorm(Scheme):
    """A post-norm and a pre-norm stream whose branches read both: O = F(norm(norm(x) + norm(y))), x' = norm(x) + O / c,
    y' = y + O; the head takes norm(x) + norm(y).

    What the family places elsewhere moves before the branch: that is the outer norm of what is read. The others are of
    the same kind.

    Depth: c = √(2b) in block b = 1, 2, … of two branches, the same for both (the authors' code).

    Decay and learning rate: those of any norm, no decay and the full rate.

    Theory at the start: Var(y_l) = Var(y_0) + Σ v for branches of variance v, and x has 1 + v / c² before it is
    normalised, so its connections pass Π (1 + v / 2b)^(-1) of the gradient over the blocks, which falls as a power of
    the depth where post-norm's falls as an exponential; y passes all of it.

    Source: Li et al. 2026, "SiameseNorm: Breaking the Barrier to Reconciling Pre/Post-Norm" (ICML), and the authors'
    `deit-model-siamesenorm.py`, to which ours is equal. The theory of the factors is ours.

    >>> [round(SiameseNorm().streams(Site(dim=8, index=i, depth=4, spatial=0)).factor ** -2) for i in range(4)]
    [2, 2, 4, 4]
    """

    equation: ClassVar[str] = "O = F(norm(norm(x) + norm(y))), x' = norm(x) + O / c, y' = y + O"
    norm_note: ClassVar[str] = "before the branch, and at both of two streams"
    when: ClassVar[str] = "deep transformers whose last blocks do little; costs two norms a branch"
    source: ClassVar[str] = "Li et al. 2026"
    kinds: ClassVar[tuple[Kind, ...]] = ("attention", "mlp")
    refusal: ClassVar[str] = (
        "its two streams are normalised over the channels of tokens, and no convolutional form is published; take a "
        "transformer, or scheme='hyperconnections'"
    )

    def place(self, site: Site | None, placement: Placement) -> Placement:
        return placement.to("pre")

    def streams(self, site: Site, kit: Kit | None = None) -> NormedPair:
        factor = (2 * (site.index // 2 + 1)) ** -0.5
        return NormedPair(site.entry, fused=True, factor=factor, norm=pair_norm("siamesenorm", kit))

    def open(self) -> nn.Module:
        return StreamEntry(2)

    def close(self, dim: int, spatial: int, kit: Kit | None = None) -> nn.Module:
        return NormedPairExit(dim, norm=pair_norm("siamesenorm", kit))
