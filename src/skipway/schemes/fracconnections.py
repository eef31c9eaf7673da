from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from skipway.nn import DynamicFracConnection, FracConnection, StreamEntry, StreamExit
from skipway.nn.kit import Kit
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_positive_int, check_rule

__all__ = ["FracConnections"]


@dataclass(frozen=True)
class FracConnections(Scheme):
    """Hyper-connections between m fractions of one stream, which does not get wider: H' = Aᵀ H + B ⊙ F(Yᵀ H), H the
    channels in m rows.

    Args:
        m: fractions; divides the channels of every stage.
        dynamic: weights depend on the token or pixel (eq. 11-14), too; False: learned numbers alone.

    Depth: none enters. A connection has m (2m + 1) numbers more (eq. 16), and if they are dynamic (C / m) (2m + 3) + 2.

    Decay and learning rate: Y, A, B and the factors s are not decayed; W of the dynamic part is (sec. 4.3).

    Theory at the start: Y = A = 1, B = 1 (eq. 15), W = 0: the network is the family's own. Beside hyper-connections
    neither memory nor the size of what is carried grows; the paper finds a part of their gain, most of it with m = 2.

    Source: Zhu et al. 2025, "Frac-Connections: Fractional Extension of Hyper-Connections", eq. 6-15, algorithm 1. With
    image maps the dynamic weights belong to pixels, and where a branch halves the map those that write are averaged.

    >>> FracConnections(m=2, dynamic=False).streams(Site(dim=8, depth=4)).static
    Parameter containing:
    tensor([[1., 0., 1., 0., 1.],
            [0., 1., 0., 1., 1.]], requires_grad=True)
    """

    m: int = 4
    dynamic: bool = True

    equation: ClassVar[str] = "H' = Aᵀ H + B ⊙ F(Yᵀ H), H the stream in m fractions"
    when: ClassVar[str] = "transformers, for a part of the gain of hyper-connections without their memory"
    source: ClassVar[str] = "Zhu et al. 2025, eq. 6-15"

    def __post_init__(self) -> None:
        check_positive_int("m", self.m)

    def streams(self, site: Site, kit: Kit | None = None) -> FracConnection:
        for dim in (site.entry, site.dim):
            check_rule("m", self.m, dim % self.m == 0, f"a divisor of the {dim} channels of the stream")
        if not self.dynamic:
            return FracConnection(self.m, spatial=site.spatial)
        return DynamicFracConnection(self.m, spatial=site.spatial, dim=site.entry)

    def open(self) -> nn.Module:
        return StreamEntry(1)

    def close(self, dim: int, spatial: int, kit: Kit | None = None) -> nn.Module:
        return StreamExit(1)
