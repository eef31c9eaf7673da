from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipway.nn import ColumnOrthogonal, LowRankMap, WeightedSum, XavierNormal
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_positive, check_rule, check_whole

__all__ = ["LAuReL"]


@dataclass(frozen=True)
class LAuReL(Scheme):
    """A learned skip: y = α F(x) + β (x + B A x), with A and B of rank r, and α and β of one sum.

    `laurel` is the paper's RW+LR, `laurel(rank=0)` its RW, y = α F + β x, and `laurel(total=None)` its LR,
    y = F + x + B A x. Earlier activations (PA) are left out.

    Args:
        rank: r; 0 leaves A and B out. The paper's ResNet-50 has 16, its language models 4 and 64.
        total: α + β, (α, β) = total · softmax of two learned numbers; None for α = β = 1, without parameters.

    Depth: none enters. A connection has 2 r C + 2 parameters more.

    Where the shape changes, x is the skip that the family's shortcut puts out, projected or padded.

    Decay and learning rate: A and B are decayed, the two numbers are not; full rate.

    Theory at the start: B = 0 (sec. 3.3) and α = β = total / 2, so with total = 2, which is ours, or None the network
    is the family's own. The paper normalises by "softmax or sigmoid" and does not say how α and β start; a softmax of
    equal numbers (total = 1) halves the stream at every connection: the stem's share is 2^-L, and
    Var(x_l) = (Var(x_(l-1)) + v) / 4 approaches v / 3 for branches of variance v. A starts from Xavier's distribution
    where branches are convolutional (the paper's ResNet), else as the orthogonal matrix of its language models.

    Source: Menghani et al. 2025, "LAuReL: Learned Augmented Residual Layer" (ICML), eq. 3 and 5, sec. 2.1 and 3.3;
    ResNet-50 on ImageNet 74.95 → 75.10 % (RW), 75.20 % (RW+LR, r = 16). Gemma 3n normalises B A x.

    >>> LAuReL(rank=2).join(Site(dim=8, depth=4, spatial=0, kind="mlp"))
    WeightedSum(
      total=2.0
      (map): LowRankMap(
        (down): Linear(in_features=8, out_features=2, bias=False)
        (up): Linear(in_features=2, out_features=8, bias=False)
      )
    )
    """

    rank: int = 16
    total: float | None = 2.0

    equation: ClassVar[str] = "y = α F(x) + β (x + B A x)"
    when: ClassVar[str] = "a little more accuracy for few parameters, in ResNets and transformers"
    source: ClassVar[str] = "Menghani et al. 2025, eq. 3 and 5"

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, 0)
        if self.total is not None:
            check_positive("total", self.total)
        check_rule(
            "total", self.total, self.total is not None or self.rank > 0, "a number where rank=0, else a plain sum"
        )

    def join(self, site: Site) -> WeightedSum:
        initial = XavierNormal() if site.kind == "conv" else ColumnOrthogonal()
        low_rank = LowRankMap(site.dim, self.rank, spatial=site.spatial, initial=initial) if self.rank else None
        return WeightedSum(self.total, low_rank)
