from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from skipway.errors import SkipwayError
from skipway.nn import BranchFactors, Carry, Multiply, ScaledShortcut
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_positive, check_positive_int

__all__ = ["UMuP"]


@dataclass(frozen=True)
class UMuP(Scheme):
    """A stream of constant variance, in which every branch of a kind has the same share: y = (x + τ F(x)) / √(1 + τ²).

    It is the residual part of u-μP. With the branches' weights α_a for attention and α_m for the MLP and n_a, n_m the
    numbers of each before this one,

        τ² = α² / (L/2 + n_a α_a² + n_m α_m²),  α_m² = 2 α² / (1 + ρ²),  α_a = ρ α_m,

    where the first α is that of this branch's kind. Where only norms read the stream, in a pre-norm transformer, they
    do not see its size: up to their ε it computes what `DepthScaled(exponent=0.5, base=2)` does for α = ρ = 1.

    Args:
        alpha: α > 0, the size of all attention or all MLP branches together beside the stem (their mean square).
        ratio: ρ > 0, attention beside MLP; 1 where all branches are convolutions.
        base: branches of the network whose learning rate was tuned, ≥ 1: as in `DepthScaled(exponent=0.5)` the
            parameters inside of the branches learn at rates times √(base / L). The authors' rule 1/√layers, which goes
            with learning rates near 1, is base=2. None leaves the rates alone.

    Depth: L counts branches, two to a transformer block, in which attention precedes the MLP.

    Decay and learning rate: no parameters of its own; for rates see `base`. In the authors' code the gradients inside
    of a branch do not have its factor (`scale_bwd`); here ε of adaptive methods has it instead, which makes the same
    step, and SGD's rate and decay (`sw.param_groups(adaptive=False)`). Clipping by the norm sees gradients with it.

    Theory at the start: for a stem and branches of variance 1 Var(x_l) = 1 for all l. In the output the stem has the
    share 1 / (1 + 2 α²) of the variance, all attention branches together α_a² of that, all MLPs α_m², each of a kind
    the same.

    Source: Blake et al. 2024, "u-μP: The Unit-Scaled Maximal Update Parametrization" (arXiv:2407.17465), appendix G,
    and `transformer_residual_scaling_rule` of graphcore-research/unit-scaling. Unit scaling of the maps, which u-μP
    needs for its width, is not part of it.

    >>> [round(UMuP().scale(Site(dim=8, index=index, depth=4, kind="mlp")).factor ** 2, 3) for index in range(4)]
    [0.333, 0.25, 0.2, 0.167]
    """

    alpha: float = 1.0
    ratio: float = 1.0
    base: int | None = None

    equation: ClassVar[str] = "y = (x + τ F(x)) / √(1 + τ²)"
    when: ClassVar[str] = "pre-norm transformers in low precision, whose stream has to keep its size"
    source: ClassVar[str] = "Blake et al. 2024, appendix G"

    def __post_init__(self) -> None:
        check_positive("alpha", self.alpha)
        check_positive("ratio", self.ratio)
        if self.base is not None:
            check_positive_int("base", self.base)

    def tau(self, site: Site) -> float:
        """The size of a branch beside the stream before it."""
        if site.kind == "conv" and self.ratio != 1:
            raise SkipwayError(
                f"ratio={self.ratio}: the branches of this network are convolutions, all of one kind; the rule is "
                "ratio=1, or a transformer"
            )
        mlp = self.alpha**2 * 2 / (1 + self.ratio**2)
        attention = self.ratio**2 * mlp
        before = site.depth / 2 + (site.index + 1) // 2 * attention + site.index // 2 * mlp
        return ((attention if site.kind == "attention" else mlp) / before) ** 0.5

    def scale(self, site: Site) -> Multiply:
        tau = self.tau(site)
        size = tau / (1 + tau**2) ** 0.5
        rate = 1.0 if self.base is None else (self.base / site.depth) ** 0.5
        return Multiply(size, branch_factors=BranchFactors(rate=rate, epsilon=size))

    def carry(self, site: Site, shortcut: nn.Module | None) -> ScaledShortcut:
        return ScaledShortcut((1 + self.tau(site) ** 2) ** -0.5, Carry() if shortcut is None else shortcut)
