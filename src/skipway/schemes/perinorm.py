from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from skipway.nn.placement import Placement
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme

__all__ = ["PeriNorm"]


@dataclass(frozen=True)
class PeriNorm(Scheme):
    """A norm before the branch and one after it: y = x + norm(F(norm(x))). The gain of the second norm is learned.

    What the family places elsewhere moves before the branch, as in `PreActivation`. Gemma 2 and 3 are built this way;
    OLMo 2 keeps the second norm alone (`build("vit-…", norm="respost")`). The norm of the embedding is the paper's
    option and is left out.

    Depth: none enters. Decay and learning rate: those of any norm, no decay and the full rate.

    Theory at the start: Var(x_l) = Var(x_0) + l (eq. 4), whatever the size of the branch's weights, and the gradient of
    the branch's last map does not depend on it either.

    Source: Kim et al. 2025, "Peri-LN: Revisiting Normalization Layer in the Transformer Architecture" (ICML), eq. 4 and
    fig. 8 (the gain has to learn).

    >>> import skipway as sw
    >>> sw.build("vit-tiny-16", scheme="perinorm").blocks[0].attention.branch.end.norm.weight.shape
    torch.Size([192])
    """

    equation: ClassVar[str] = "y = x + norm(F(norm(x)))"
    norm_note: ClassVar[str] = "before and after the branch"
    when: ClassVar[str] = "transformers that diverge for some seeds, or whose stream grows in training"
    source: ClassVar[str] = "Kim et al. 2025, eq. 4"

    def place(self, site: Site | None, placement: Placement) -> Placement:
        before = placement.to("pre")
        return before if site is None else replace(before, end=("norm",))
