from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from skipway.nn import HighwayGate
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_finite

__all__ = ["Highway"]


@dataclass(frozen=True)
class Highway(Scheme):
    """A gate computed from the stream chooses between branch and skip: y = T ⊙ F(x) + (1 - T) ⊙ x, T = σ(W x + b).

    The ancestor of the residual connection. T belongs to a channel of a token or pixel; in the paper's convolutional
    layers W is as large as the branch's map, here it is 1 × 1: C² + C parameters a connection.

    Args:
        bias: b at the start; "depth" starts T at 1 / L.

    Depth: the paper suggests -1, -2 and -3 for convolutional networks of some 10, 20 and 30 layers. L counts branches.

    Where the shape changes, x is the skip that the family's shortcut puts out, projected or padded.

    Decay and learning rate: W is decayed, b is not; full rate.

    Theory at the start: W = 0, which is ours, so that T = σ(b) = t everywhere, 0.12 for b = -2. A connection passes
    1 - t of stream and gradient, all L of them (1 - t)^L, 5 % after 24 with b = -2 and 1/e with "depth" at any L;
    branch i has the share t (1 - t)^(L - i) in the output, and Var(x_l) = (1 - t)² Var(x_(l-1)) + t² v for branches of
    variance v. A branch that stochastic depth drops leaves (1 - T) x.

    Source: Srivastava et al. 2015, "Training Very Deep Networks" (NIPS), eq. 3 and sec. 2.2. The theory is ours.

    >>> Highway(bias="depth").join(Site(dim=8, depth=24))
    HighwayGate(
      bias=-3.13549
      (map): Linear(in_features=8, out_features=8, bias=False)
    )
    """

    bias: float | Literal["depth"] = -2.0

    equation: ClassVar[str] = "y = T ⊙ F(x) + (1 - T) ⊙ x, T = σ(W x + b)"
    when: ClassVar[str] = "studies of gated skips; where each pixel should choose what to keep"
    source: ClassVar[str] = "Srivastava et al. 2015, eq. 3"

    def __post_init__(self) -> None:
        check_finite("bias", self.bias, also="depth")

    def join(self, site: Site) -> HighwayGate:
        return HighwayGate(site.dim, bias=gate_bias(site, self.bias), spatial=site.spatial)


def gate_bias(site: Site, bias: float | Literal["depth"]) -> float:
    """b as given, or so that σ(b) = 1 / L."""
    return -math.log(max(site.depth - 1, 1)) if bias == "depth" else bias
