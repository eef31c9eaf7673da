from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from skipway.errors import SkipwayError
from skipway.nn import BranchFactors, Multiply
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.tracing.chain import Chain
from skipway.validation import check_choice, check_finite, check_positive_int

__all__ = ["DepthScaled"]


@dataclass(frozen=True)
class DepthScaled(Scheme):
    """A constant on every branch that falls with depth: y = x + L^(-p) F(x), p = ½ by default.

    With `base`, the depth at which the learning rate was chosen, it is the whole rule by which that rate holds at other
    depths, too, with m = L / base in the place of L: `exponent=1` is CompleteP, `exponent=0.5` depth-μP.

    Args:
        how: "forward" multiplies the branch for ever (Stable ResNet, Depth-μP); "init" multiplies only the start of the
            branch's last factor: GPT-2's start, the closing norm's gain where one closes the branch.
        exponent: p. Below ½ deep nets explode, at ½ they have a limit, above it they start as the identity.
        base: branches of the network whose learning rate was tuned, ≥ 1; the network of that depth is the plain one.
            None: L itself is the base's unit, and no rate is touched. Goes with `how="forward"`.

    Depth: L and `base` count branches, GPT-2's "residual layers" (two to a transformer block); the paper's layers are
    blocks, and the ratio m is the same.

    Decay and learning rate: no parameters of its own. With `base` the parameters inside of the branches (maps, biases,
    norms before the branch, gains) have learning rates times m^(p − 1) and Adam's ε times m^(-p); stem, norms after the
    last block and head keep theirs, and the decay is the same everywhere. `sw.param_groups` makes these groups, in
    training and in `sw.rescheme`d networks alike. For SGD, which the paper does not treat, a step of the same size
    needs the rate times m^(2p − 1) and the decay divided by m^p.

    Theory at the start (pre-activation): with norm Var(x_l) = Var(x_0) + l L^(-2p); without, (1 + L^(-2p))^l Var(x_0),
    which for p = ½ stays below e Var(x_0); with `base` m stands for L. A step of Adam changes each branch by
    O(m^(p − 1)), its L branches change the output by L m^(-p) m^(p − 1) = base: the same at every depth. Only p = 1
    also lets each branch learn features far from its linearisation (Dey et al.).

    Source: Hayou et al. 2021, "Stable ResNet", sec. 3; Marion et al. 2022, "Scaling ResNets in the large-depth
    regime"; Radford et al. 2019 (GPT-2), sec. 2.3 for `how="init"`; Dey et al. 2025, "Don't be lazy: CompleteP enables
    compute-efficient deep transformers" (NeurIPS), table 1 without its factors of width, and the branch completep of
    EleutherAI/nanoGPT-mup (which scales ε of all parameters); Yang et al. 2023, "Tensor Programs VI", for p = ½.

    >>> DepthScaled().scale(Site(dim=8, depth=16))
    Multiply(0.25)
    >>> DepthScaled(exponent=1, base=4).scale(Site(dim=8, depth=16)).branch_factors
    BranchFactors(rate=1.0, decay=1.0, epsilon=0.25)
    """

    how: Literal["forward", "init"] = "forward"
    exponent: float = 0.5
    base: int | None = None

    equation: ClassVar[str] = "y = x + F(x) / √L"
    when: ClassVar[str] = "a parameter-free start for deep nets; studies of the large-depth limit"
    source: ClassVar[str] = "Hayou et al. 2021, sec. 3"

    def __post_init__(self) -> None:
        check_choice("how", self.how, ("forward", "init"))
        check_finite("exponent", self.exponent)
        if self.base is not None:
            check_positive_int("base", self.base)
            if self.how == "init":
                raise SkipwayError(
                    f'base={self.base}, how="init": the rates that go with a base depth are for branches that stay '
                    'multiplied; take how="forward", or leave base out'
                )

    def scale(self, site: Site) -> nn.Module | None:
        if self.how == "init":
            return None
        if self.base is None:
            return Multiply(site.depth**-self.exponent)
        ratio = site.depth / self.base
        size = ratio**-self.exponent
        return Multiply(size, branch_factors=BranchFactors(rate=ratio ** (self.exponent - 1), epsilon=size))

    def init_(self, chain: Chain) -> None:
        if self.how == "init":
            chain.multiply_(len(chain) ** -self.exponent)
