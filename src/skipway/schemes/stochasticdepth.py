from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipway.errors import SkipwayError
from skipway.nn import DropPath
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme

__all__ = ["StochasticDepth"]


@dataclass(frozen=True)
class StochasticDepth(Scheme):
    """Whole branches dropped at random while training, later ones more often: y = x + m/(1-p_l) F(x), P(m=1) = 1-p_l.

    An orthogonal slot: add it to any scheme, `LayerScale() + StochasticDepth(0.1)`. Sample by sample, off in eval.

    Args:
        probability: p_L, the drop probability of the last branch, 0 ≤ p < 1.

    Depth: the linear rule p_l = l/L · p_L with l = 1 … L counting branches (the paper's eq. 4; the first branch too may
    be dropped, and one branch alone has p_L).

    Decay and learning rate: no parameters of its own.

    Theory at the start: the expectation is that of the undropped network; the variance that branch l adds grows by
    1/(1-p_l). Departure: the paper rescales at test time by 1-p, here kept branches are rescaled in training.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth", eq. 2, 4.

    >>> [StochasticDepth(0.5).drop(Site(dim=8, index=i, depth=2)).probability for i in (0, 1)]
    [0.25, 0.5]
    """

    probability: float = 0.1

    equation: ClassVar[str] = "y = x + m/(1-p) F(x)"
    when: ClassVar[str] = "a regulariser for deep nets, on top of any other scheme"
    source: ClassVar[str] = "Huang et al. 2016, eq. 2, 4"

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability < 1.0:
            raise SkipwayError(f"probability={self.probability}: the rule is 0 <= p < 1")

    def drop(self, site: Site) -> DropPath:
        return DropPath(self.probability * site.position / site.depth)
