from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipway.schemes.scheme import Scheme

__all__ = ["Identity"]


@dataclass(frozen=True)
class Identity(Scheme):
    """The residual connection as it was published: y = post(x + F(x)), the branch as strong as the skip.

    It overrides no hook: placement, norms and initialisation are the family's.

    Depth: none enters. Decay and learning rate: no parameters of its own.

    Theory at the start (identity shortcuts, pre-activation): with normalisation every branch adds variance 1, so
    Var(x_l) = Var(x_0) + l, of which branch l is 1/(l+1) (De & Smith 2020), and lets π/(π-1) / (1 + (1 - 1/π) l) of the
    gradient's second moment back through itself. Without normalisation He-initialised branches double both,
    Var(x_l) = 2^l Var(x_0), and the network overflows at some depth.

    Source: He et al. 2015, "Deep Residual Learning for Image Recognition", eq. 1.

    >>> import skipway as sw
    >>> sw.build("resnet20").stages[0][0].scale
    Identity()
    """

    equation: ClassVar[str] = "y = x + F(x)"
    when: ClassVar[str] = "the default up to some hundred layers, with normalisation"
    source: ClassVar[str] = "He et al. 2015, eq. 1"
