from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from skipway.nn import DynamicHyperConnection, HyperConnection, StreamEntry, StreamExit
from skipway.nn.kit import Kit
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.tracing.chain import Chain
from skipway.validation import check_positive_int

__all__ = ["HyperConnections"]


@dataclass(frozen=True)
class HyperConnections(Scheme):
    """n streams in place of one, read, mixed and written with learned weights: sⱼ' = Σᵢ A[i,j] sᵢ + B[j] F(Σᵢ α[i] sᵢ).

    Args:
        n: n.
        dynamic: weights depend on the token or pixel (eq. 10-13), too; False: learned numbers alone.
        widen: the start of the branch's last factor is multiplied by √n (sec. 4, "Implementation").

    Depth: k of the start counts branches, our unit: the k-th reads stream k mod n.

    Decay and learning rate: α, A and B and the factors s are not decayed (sec. 4); W of the dynamic part is.

    Theory at the start: α = e_(k mod n), A = 1, B = 1 (eq. 14), W = 0. All streams stay equal to the one stream of the
    family, and so does their mean, which the head takes: the network computes the same. The paper takes the sum, which
    a final norm cannot tell from the mean; networks without one can. With `widen`, the paper's rule, the start is
    another network. One stream (n = 1) is worse than none in the paper (table 1).

    Source: Zhu et al. 2025, "Hyper-Connections", eq. 1-14; s = 0.01 from its algorithm 1. With image maps the dynamic
    weights belong to pixels, and where a branch halves the map those that write are averaged.

    >>> import skipway as sw
    >>> sw.build("vit-tiny-16", scheme="hyperconnections(2, dynamic=False)").blocks[0].mlp.streams.static
    Parameter containing:
    tensor([[0., 1., 0., 1.],
            [1., 0., 1., 1.]], requires_grad=True)
    """

    n: int = 4
    dynamic: bool = True
    widen: bool = False

    equation: ClassVar[str] = "s' = Aᵀ s + Bᵀ F(αᵀ s), n streams s"
    when: ClassVar[str] = "transformers, for a lower loss at the price of memory; n = 2 static in vision"
    source: ClassVar[str] = "Zhu et al. 2025, eq. 1-14"

    def __post_init__(self) -> None:
        check_positive_int("n", self.n)

    def streams(self, site: Site, kit: Kit | None = None) -> HyperConnection:
        count, reads = self.n, site.index % self.n
        if not self.dynamic:
            return HyperConnection(count, reads, spatial=site.spatial)
        return DynamicHyperConnection(count, reads, spatial=site.spatial, dim=site.entry)

    def open(self) -> nn.Module:
        return StreamEntry(self.n)

    def close(self, dim: int, spatial: int, kit: Kit | None = None) -> nn.Module:
        return StreamExit(self.n)

    def init_(self, chain: Chain) -> None:
        if self.widen:
            chain.multiply_(self.n**0.5)
