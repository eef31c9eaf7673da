from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import nn

from skipway.nn import Carry, ScaledShortcut, XavierNormal
from skipway.nn.kit import Kit
from skipway.nn.placement import Placement
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.tracing.chain import Chain

__all__ = ["DeepNorm"]


@dataclass(frozen=True)
class DeepNorm(Scheme):
    """A stronger skip, and a norm after the addition: y = norm(α x + F(x)), the branch's maps start β times smaller.

    The skip is scaled, not the branch. In transformers the maps on the path are the value and output projections and
    the feed-forward maps, not queries and keys; biases are not scaled. Linear maps start from Xavier's normal
    distribution; convolutions keep the family's. Departure: maps that share a matrix, such as the d × d projections to
    queries, keys and values or the two halves of a gated perceptron, start from Xavier's distribution of that matrix
    (3d × d), where fig. 2 has that of each map: √2 smaller for queries, keys and values.

    Depth: the paper's N counts transformer layers of two branches each, so α = (2N)^(1/4) = L^(1/4) and
    β = (8N)^(-1/4) = (4L)^(-1/4) (an encoder or a decoder alone).

    Decay and learning rate: no parameters of its own.

    Theory at the start: the norm after the addition gives Var = 1 whatever the depth (before the activation, in a
    ResNet, where BN hides β on all maps but the last and a branch has variance β²); one step changes the output by a
    bounded amount at any depth (theorem 4.2).

    Source: Wang et al. 2022, "DeepNet: Scaling Transformers to 1,000 Layers", eq. 3 and fig. 2, for transformers. In a
    ResNet it is He 2016's "BN after addition" (fig. 4b) with a stronger skip: worth a study, no recommendation.

    >>> scheme = DeepNorm()
    >>> round(scheme.carry(Site(dim=8, depth=24), None).factor, 4), round(scheme.shrink(24), 4)
    (2.2134, 0.3195)
    """

    equation: ClassVar[str] = "y = norm(α x + F(x))"
    norm_note: ClassVar[str] = "after the addition"
    when: ClassVar[str] = "post-norm transformers of hundreds of layers"
    source: ClassVar[str] = "Wang et al. 2022, fig. 2"

    def kit(self, site: Site | None, kit: Kit) -> Kit:
        return replace(kit, linear=partial(kit.linear, initial=XavierNormal()))

    def place(self, site: Site | None, placement: Placement) -> Placement:
        return placement.to("post")

    def carry(self, site: Site, shortcut: nn.Module | None) -> ScaledShortcut:
        return ScaledShortcut(site.depth**0.25, Carry() if shortcut is None else shortcut)

    def init_(self, chain: Chain) -> None:
        factor = self.shrink(len(chain))
        chain.multiply_maps_((each, factor) for connection in chain for each in connection.signal_maps)

    @staticmethod
    def shrink(branches: int) -> float:
        """β = (4L)^(-1/4) for a network of L branches."""
        return (4 * branches) ** -0.25
