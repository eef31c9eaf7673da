from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from skipway.nn import Multiply
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.tracing.chain import Chain
from skipway.validation import check_choice, check_finite

__all__ = ["DepthScaled"]


@dataclass(frozen=True)
class DepthScaled(Scheme):
    """A constant on every branch that falls with depth: y = x + L^(-p) F(x), p = ½ by default.

    Args:
        how: "forward" multiplies the branch for ever (Stable ResNet, Depth-μP); "init" multiplies only the start of the
            branch's last factor: GPT-2's start, the closing norm's gain where one closes the branch.
        exponent: p. Below ½ deep nets explode, at ½ they have a limit, above it they become the identity.

    Depth: L counts branches, GPT-2's "residual layers" (two to a transformer block).

    Decay and learning rate: no parameters of its own.

    Theory at the start (pre-activation): with norm Var(x_l) = Var(x_0) + l L^(-2p); without, (1 + L^(-2p))^l Var(x_0),
    which for p = ½ stays below e Var(x_0).

    Source: Hayou et al. 2021, "Stable ResNet", sec. 3; Marion et al. 2022, "Scaling ResNets in the large-depth
    regime"; Radford et al. 2019 (GPT-2), sec. 2.3 for `how="init"`.

    >>> DepthScaled().scale(Site(dim=8, depth=16))
    Multiply(0.25)
    """

    how: Literal["forward", "init"] = "forward"
    exponent: float = 0.5

    equation: ClassVar[str] = "y = x + F(x) / √L"
    when: ClassVar[str] = "a parameter-free start for deep nets; studies of the large-depth limit"
    source: ClassVar[str] = "Hayou et al. 2021, sec. 3"

    def __post_init__(self) -> None:
        check_choice("how", self.how, ("forward", "init"))
        check_finite("exponent", self.exponent)

    def scale(self, site: Site) -> nn.Module | None:
        return Multiply(site.depth**-self.exponent) if self.how == "forward" else None

    def init_(self, chain: Chain) -> None:
        for connection in chain if self.how == "init" else ():
            connection.multiply_(len(chain) ** -self.exponent)
