from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import nn

from skipway.nn import Cut
from skipway.nn.site import Kind, Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_choice

__all__ = ["Plain"]


@dataclass(frozen=True)
class Plain(Scheme):
    """No skip at all, for studies of what the skip does: y = post(F(h)).

    Projection shortcuts go too. Everything else (maps, norms, initialisation) is the family's.

    Args:
        kind: cut only the skips around branches of this kind, "attention" or "mlp"; by default all.

    Depth: none enters. Decay and learning rate: no parameters of its own.

    Theory at the start: with BatchNorm the variance stays at 1 forward, while the gradient's grows by π/(π-1) ≈ 1.47 a
    layer on its way back (Yang et al. 2019, "A Mean Field Theory of Batch Normalization"). The ResNet paper sees the
    training error rise with depth: 56 layers are worse than 20, and 110 do not train (> 60 % error on CIFAR-10).

    Source: He et al. 2015, "Deep Residual Learning for Image Recognition", sec. 4 and fig. 6.

    >>> import skipway as sw
    >>> sw.build("resnet20", scheme="plain").stages[0][0].shortcut
    Cut()
    """

    kind: Kind | None = None

    equation: ClassVar[str] = "y = F(x)"
    when: ClassVar[str] = "never, but to see what the skip is good for"
    source: ClassVar[str] = "He et al. 2015, fig. 6"

    def __post_init__(self) -> None:
        if self.kind is not None:
            check_choice("kind", self.kind, get_args(Kind))

    def carry(self, site: Site, shortcut: nn.Module | None) -> nn.Module | None:
        return Cut() if self.kind in (None, site.kind) else shortcut
