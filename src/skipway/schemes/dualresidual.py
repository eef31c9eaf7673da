from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from skipway.nn import NormedPair, NormedPairExit, StreamEntry
from skipway.nn.kit import Kit
from skipway.nn.normed_pair import pair_norm
from skipway.nn.placement import Placement
from skipway.nn.site import Kind, Site
from skipway.schemes.scheme import Scheme

__all__ = ["DualResidual"]


@dataclass(frozen=True)
class DualResidual(Scheme):
    """A second stream that is never normalised beside a post-norm network: x' = norm(x + F(x)), r' = r + F(x); the head
    takes x + norm(r).

    All norms of the family go; each connection but the first reads x through a norm of its own, of the same kind, which
    is the norm behind the addition before.

    Depth: none enters. Decay and learning rate: those of any norm, no decay and the full rate.

    Theory at the start: x is the stream of the family's post-norm network, of variance 1, and Var(r_l) = Var(r_0) + Σ v
    for branches of variance v. In post-norm the gradient at branch i is Π 1 / √(1 + v) over the additions from there
    on, 2^(-(L - i + 1) / 2) for v = 1; r adds 1 / √Var(r_L), the same for all branches, so none vanishes.

    Source: Xie et al. 2023, "ResiDual: Transformer with Dual Residual Connections", and the authors'
    `resi_dual_layers.py`; worse than pre-norm in the paper on hyper-connections (table 4). The factors are ours.

    >>> DualResidual().streams(Site(dim=8, depth=4, spatial=0, kind="mlp"))
    NormedPair(
      factor=1
      (post): Identity()
    )
    """

    equation: ClassVar[str] = "x' = norm(x + F(x)), r' = r + F(x); x + norm(r) at the end"
    norm_note: ClassVar[str] = "after the addition, in one of two streams"
    when: ClassVar[str] = "post-norm transformers whose first layers get no gradient"
    source: ClassVar[str] = "Xie et al. 2023"
    kinds: ClassVar[tuple[Kind, ...]] = ("attention", "mlp")
    refusal: ClassVar[str] = (
        "its two streams are normalised over the channels of tokens, and no convolutional form is published; take a "
        "transformer, or scheme='hyperconnections'"
    )

    def place(self, site: Site | None, placement: Placement) -> Placement:
        return placement.to("post") if site is None else replace(placement, pre=(), inside=(), end=(), post=())

    def streams(self, site: Site, kit: Kit | None = None) -> NormedPair:
        return NormedPair(site.entry, normalised=site.index > 0, fused=False, norm=pair_norm("dualresidual", kit))

    def open(self) -> nn.Module:
        return StreamEntry(2)

    def close(self, dim: int, spatial: int, kit: Kit | None = None) -> nn.Module:
        return NormedPairExit(dim, norm=pair_norm("dualresidual", kit))
