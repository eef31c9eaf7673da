from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from skipway.nn import Gain
from skipway.nn.kit import Kit
from skipway.nn.placement import Placement
from skipway.nn.role import Role
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_choice

__all__ = ["ReZero"]


@dataclass(frozen=True)
class ReZero(Scheme):
    """One learned number per branch that starts at zero, nothing after the addition: y = x + α F(x), α₀ = 0.

    Parts that the family places after the addition move into the branch: in a ResNet y = x + α relu(bn(conv(…))), the
    authors' code. That, and no small start, is the difference from SkipInit.

    Args:
        norm: "keep" is the authors' ResNet (BatchNorm stays), "remove" their Transformer and fully connected net.
        rate: factor on the learning rate of α.

    Depth: none enters. In transformers every branch has its own α (the authors' layer shares one between attention
    and feed-forward; most ports do as we do).

    Decay and learning rate: α is not decayed; full rate. The authors use lr/10 or an optimizer of its own where
    training is unstable: set `rate`.

    Theory at the start: the network is its shortcuts; Var(x_l) = Var(x_0) for every l, the Jacobian is the identity.

    Source: Bachlechner et al. 2020, "ReZero is All You Need", eq. 1 and the authors' `rezero_resnet_cifar.py`.

    >>> import skipway as sw
    >>> [name for name, _ in sw.build("resnet20", scheme="rezero").stages[0][0].branch.named_children()][-2:]
    ['norm2', 'act2']
    """

    norm: Literal["keep", "remove"] = "keep"
    rate: float = 1.0

    equation: ClassVar[str] = "y = x + α F(x), α₀ = 0"
    norm_note: ClassVar[str] = "keeps or removes it"
    when: ClassVar[str] = "fast first epochs at any depth; deep fully connected nets"
    source: ClassVar[str] = "Bachlechner et al. 2020, eq. 1"

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("keep", "remove"))

    @property
    def silent(self) -> bool:
        return True

    def kit(self, site: Site | None, kit: Kit) -> Kit:
        return kit.without_norm() if self.norm == "remove" else kit

    def place(self, site: Site | None, placement: Placement) -> Placement:
        return replace(placement, end=placement.end + placement.post, post=())

    def scale(self, site: Site) -> Gain:
        return Gain(init=0.0, role=Role("gain", rate=self.rate))
