from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipway.nn.placement import Placement
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme

__all__ = ["PreActivation"]


@dataclass(frozen=True)
class PreActivation(Scheme):
    """Norm and activation before the maps, nothing after the addition: y = x + F(act(norm(x))).

    The stream is then a plain sum of branches, forward and backward. Projections see the activated input; the stem
    ends with its convolution, and norm and activation move to the head. Families that are built this way already
    (`resnetv2-…`, `wrn-…`) stay as they are.

    Depth: none enters. Decay and learning rate: no parameters of its own.

    Theory at the start: Var(x_l) = Var(x_0) + l, every branch adding 1.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", eq. 3-5 and fig. 4e; CIFAR-10 error of
    ResNet-1001 7.61 % → 4.92 % (table 3), of ResNet-110 only 6.61 % → 6.37 % (table 2).

    >>> import skipway as sw
    >>> sw.build("resnet20", scheme="preactivation").stages[0][0].post
    Identity()
    """

    equation: ClassVar[str] = "y = x + F(act(norm(x)))"
    norm_note: ClassVar[str] = "before the branch"
    when: ClassVar[str] = "from some hundred layers on; the base of SkipInit's and NormFree's papers"
    source: ClassVar[str] = "He et al. 2016, fig. 4e"

    def place(self, site: Site | None, placement: Placement) -> Placement:
        return placement.to("pre")
