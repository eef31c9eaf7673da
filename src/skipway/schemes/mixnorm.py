from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from skipway.nn.placement import Placement
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_fraction

__all__ = ["MixNorm"]


@dataclass(frozen=True)
class MixNorm(Scheme):
    """Post-norm in the first blocks, pre-norm in the others: y = norm(x + F(x)), then y = x + F(norm(x)).

    The head ends as that of a pre-norm network, with a norm. In a ResNet the activation moves with the norm.

    Args:
        share: a, the share of blocks that are post-norm, in [0, 1); ⌈a N⌉ of N blocks.

    Depth: N counts blocks: two branches in a transformer, one in a ResNet.

    Decay and learning rate: no parameters of its own.

    Theory at the start: Var = 1 through the post-norm blocks, then it grows by 1 with every pre-norm branch.

    Source: Li et al. 2025, "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN" (ICLR);
    a = 0.25 is that of the authors' runs.

    >>> from skipway.nn.placement import PRE_NORM
    >>> sites = [Site(dim=8, index=index, depth=16, kind="mlp") for index in (3, 4)]
    >>> [MixNorm().place(site, PRE_NORM).post for site in sites]
    [('norm',), ()]
    """

    share: float = 0.25

    equation: ClassVar[str] = "y = norm(x + F(x)), then y = x + F(norm(x))"
    norm_note: ClassVar[str] = "after the addition, then before the branch"
    when: ClassVar[str] = "transformers whose last blocks do little; studies of norm placement"
    source: ClassVar[str] = "Li et al. 2025"

    def __post_init__(self) -> None:
        check_fraction("share", self.share)

    def place(self, site: Site | None, placement: Placement) -> Placement:
        if site is None:
            return placement.to("pre")
        branches = 1 if site.kind == "conv" else 2
        early = site.index // branches < math.ceil(self.share * site.depth / branches)
        return placement.to("post" if early else "pre")
