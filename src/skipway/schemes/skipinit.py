from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from skipway.nn import Gain
from skipway.nn.kit import Kit
from skipway.nn.role import Role
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_choice, check_finite

__all__ = ["SkipInit"]


@dataclass(frozen=True)
class SkipInit(Scheme):
    """One learned number per branch, small at the start: y = x + α F(x).

    Args:
        init: α₀. 0.1 is the text-book's "small coefficient"; the paper advocates 0.0 and also shows 1/√L, here
            `"depth"`.
        norm: "keep" leaves normalisation in the branch, as textbooks do; "remove" takes it out of the whole network,
            as the paper does, and gives the convolutions biases.
        rate: factor on the learning rate of α.

    Depth: the paper's d counts residual blocks, which are our branches in a ResNet; a transformer block is two.

    Decay and learning rate: α is not decayed; full rate (the authors' code). The paper finds the best rate of a net
    without normalisation 2 to 8 times lower than with it.

    Theory at the start (pre-activation): every branch adds α² with norm, Var(x_l) = Var(x_0) + α² l; without norm
    it multiplies by 1 + α², so 1/√L keeps Var(x_L) ≤ e Var(x_0) and 0 keeps it exactly.

    Source: De & Smith 2020, "Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep
    Networks", sec. 4; the authors' `skipinit_resnet.py`. Departure: their classifier starts at zero, ours does
    not.

    >>> import skipway as sw
    >>> sw.build("resnet20", scheme=SkipInit(init=0.0, norm="remove")).stages[0][0].scale
    Gain((), init=0)
    """

    init: float | Literal["depth"] = 0.1
    norm: Literal["keep", "remove"] = "keep"
    rate: float = 1.0

    equation: ClassVar[str] = "y = x + α F(x)"
    norm_note: ClassVar[str] = "keeps or removes it"
    when: ClassVar[str] = "very deep nets without normalisation, in one line; small batches"
    source: ClassVar[str] = "De & Smith 2020, sec. 4"

    def __post_init__(self) -> None:
        check_finite("init", self.init, also="depth")
        check_choice("norm", self.norm, ("keep", "remove"))

    @property
    def silent(self) -> bool:
        return self.init == 0.0

    def kit(self, site: Site | None, kit: Kit) -> Kit:
        return kit.without_norm() if self.norm == "remove" else kit

    def scale(self, site: Site) -> Gain:
        init = site.depth**-0.5 if self.init == "depth" else self.init
        return Gain(init=init, role=Role("gain", rate=self.rate))
