from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipway.nn import LastExit, ValueResidual
from skipway.nn.kit import Kit
from skipway.nn.site import Kind, Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_fraction

__all__ = ["ValueResiduals"]


@dataclass(frozen=True)
class ValueResiduals(Scheme):
    """Every attention reads the values of the first one, too: v = λ₁ v₁ + λ₂ v, λ learned.

    Args:
        first: λ₁ at the start, the share of the first attention's values; λ₂ starts at 1 - λ₁.

    Depth: each attention but the first has its two numbers; CaiT's class attentions have a first of their own.

    Decay and learning rate: λ is not decayed and has the full rate.

    Theory at the start: values of two attentions are independent, so for λ₁ = λ₂ = ½ what an attention mixes has half
    the variance, and so has what it adds; λ₁ = 0 is the network of the family.

    Source: Zhou et al. 2024, "Value Residual Learning", arXiv:2410.17897; the authors' code has ½ and ½ for ever. The
    theory is ours.

    >>> ValueResiduals().streams(Site(dim=8, index=2, since=2, depth=4, kind="attention")).first
    Gain((), init=0.5)
    """

    first: float = 0.5

    equation: ClassVar[str] = "v = λ₁ v₁ + λ₂ v in each attention"
    when: ClassVar[str] = "transformers whose attention collapses on few tokens"
    source: ClassVar[str] = "Zhou et al. 2024"
    kinds: ClassVar[tuple[Kind, ...]] = ("attention", "mlp")
    refusal: ClassVar[str] = "values belong to attention, and a convolution has none; build a ViT or CaiT"

    def __post_init__(self) -> None:
        check_fraction("first", self.first)

    def streams(self, site: Site, kit: Kit | None = None) -> ValueResidual:
        attends = site.kind == "attention"
        return ValueResidual(self.first, attends=attends, mixes=attends and site.outputs > 0, spatial=site.spatial)

    def restart(self, dim: int, spatial: int) -> LastExit:
        return LastExit()

    def close(self, dim: int, spatial: int, kit: Kit | None = None) -> LastExit:
        return LastExit()
