from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn

from skipway.nn import Carry, ScaledShortcut
from skipway.nn.placement import Placement
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_positive

__all__ = ["Keel"]


@dataclass(frozen=True)
class Keel(Scheme):
    """Post-norm with a strong skip and a norm before the branch, too: y = norm(α x + F(norm(x))), α = L.

    Beside `DeepNorm` the skip is much stronger, and no weight starts smaller.

    Args:
        alpha: α, or "depth" for the number of branches L.

    Depth: L counts branches, two to a transformer block.

    Decay and learning rate: no parameters of its own but the norms'.

    Theory at the start: with branches of variance v on a stream of variance 1 a connection passes the share
    α / √(α² + v) of the gradient along its skip, so all L pass (1 + v / α²)^(-L/2): e^(-v / 2L) for α = L, where α = 1,
    post-norm, passes (1 + v)^(-L/2). The share of all branches in the output is about v / L: at the start Keel is a
    normalised stream whose branches are multiplied by 1 / L.

    Source: Chen and Wei 2026, "Post-LayerNorm Is Back: Stable, ExpressivE, and Deep". The theory above is ours.

    >>> Keel().carry(Site(dim=8, depth=24), None)
    ScaledShortcut(
      24
      (inner): Carry()
    )
    """

    alpha: float | Literal["depth"] = "depth"

    equation: ClassVar[str] = "y = norm(α x + F(norm(x)))"
    norm_note: ClassVar[str] = "before the branch and after the addition"
    when: ClassVar[str] = "transformers of hundreds of blocks whose stream has to keep its size"
    source: ClassVar[str] = "Chen and Wei 2026"

    def __post_init__(self) -> None:
        if self.alpha != "depth":
            check_positive("alpha", self.alpha)

    def place(self, site: Site | None, placement: Placement) -> Placement:
        return replace(placement.to("pre"), post=("norm",))

    def carry(self, site: Site, shortcut: nn.Module | None) -> ScaledShortcut:
        factor = float(site.depth) if self.alpha == "depth" else self.alpha
        return ScaledShortcut(factor, Carry() if shortcut is None else shortcut)
