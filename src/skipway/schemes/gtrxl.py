from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from skipway.nn import GRUGate
from skipway.nn.site import Site
from skipway.schemes.highway import gate_bias
from skipway.schemes.scheme import Scheme
from skipway.validation import check_finite

__all__ = ["GTrXL"]


@dataclass(frozen=True)
class GTrXL(Scheme):
    """A gated recurrent unit in place of the addition: y = (1 - z) ⊙ x + z ⊙ tanh(W_g F + U_g (r ⊙ x)).

    r = σ(W_r F + U_r x), z = σ(W_z F + U_z x + b), for each channel of each token or pixel: 6 C² + C parameters a
    connection. The paper's norms stand before the branches ("identity map reordering"): take a family that is
    pre-norm, or add `preactivation`. Its ReLU on F is left out: a branch that starts at zero would not learn behind it.

    Args:
        bias: b at the start, the paper's -b_g; "depth" starts z at 1 / L.

    Depth: the paper's networks have 12 blocks with one b_g for all; L counts branches.

    Where the shape changes, x is the skip that the family's shortcut puts out, projected or padded.

    Decay and learning rate: the maps are decayed, b is not; full rate.

    Theory at the start: the maps of r and z are 0, which is ours, so z = σ(b) everywhere, 0.12 for b = -2: a
    connection passes 1 - z of stream and gradient, all L of them (1 - z)^L, 5 % after 24 with b = -2 and 1/e with
    "depth" at any L. With s² the variance within tanh, Var(x_l) = (1 - z)² Var(x_(l-1)) + z² E tanh²(N(0, s²)); no
    number of a stream ever exceeds the larger of its start and 1. A GRU without b (ports have one) starts at z = ½.
    A branch that stochastic depth drops leaves (1 - z) x + z tanh(U_g (r ⊙ x)).

    Source: Parisotto et al. 2020, "Stabilizing Transformers for Reinforcement Learning" (ICML), sec. 3.2, "GRU-type
    gating" and "Gated identity initialization", b_g = 2. The theory is ours.

    >>> GTrXL().join(Site(dim=8, depth=24)).bias[:2]
    tensor([-2., -2.], grad_fn=...)
    """

    bias: float | Literal["depth"] = -2.0

    equation: ClassVar[str] = "y = (1 - z) ⊙ x + z ⊙ tanh(W_g F(x) + U_g (r ⊙ x))"
    when: ClassVar[str] = "transformers in reinforcement learning, and where training is unstable"
    source: ClassVar[str] = "Parisotto et al. 2020, sec. 3.2"

    def __post_init__(self) -> None:
        check_finite("bias", self.bias, also="depth")

    def join(self, site: Site) -> GRUGate:
        return GRUGate(site.dim, bias=gate_bias(site, self.bias), spatial=site.spatial)
