from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from skipway.nn import OrthogonalSum
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_choice, check_positive

__all__ = ["Orthogonal"]


@dataclass(frozen=True)
class Orthogonal(Scheme):
    """Add only what is new: the part of the branch that is orthogonal to the stream, y = x + F - x ⟨x, F⟩ / (|x|² + ε).

    Args:
        over: "feature" takes the product over the channels of each token or pixel, "sample" over the whole sample
            (the authors' "global").
        eps: ε.

    Depth: none enters. Decay and learning rate: no parameters of its own.

    Theory at the start: directions at random are orthogonal already, so the network differs from the family's by the
    cosine between x and F, of order 1 / √C. At any time |y|² = |x|² + |F⊥|² up to ε, so no branch makes the stream
    smaller. A gain for each channel stands before the join and leaves it orthogonal.

    Source: Oh et al. 2025, "Revisiting Residual Connections: Orthogonal Updates for Stable and Efficient Deep Networks"
    (NeurIPS). The theory at the start is ours.

    >>> Orthogonal().join(Site(dim=8, depth=4, spatial=0))
    OrthogonalSum(over='feature')
    """

    over: Literal["feature", "sample"] = "feature"
    eps: float = 1e-6

    equation: ClassVar[str] = "y = x + F(x) - x ⟨x, F(x)⟩ / |x|²"
    when: ClassVar[str] = "ViTs and pre-activation ResNets, to use all of the depth; costs no parameters"
    source: ClassVar[str] = "Oh et al. 2025"

    def __post_init__(self) -> None:
        check_choice("over", self.over, ("feature", "sample"))
        check_positive("eps", self.eps)

    def join(self, site: Site) -> OrthogonalSum:
        return OrthogonalSum(spatial=site.spatial, over=self.over, eps=self.eps)
