from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from skipway.errors import SkipwayError
from skipway.nn import BranchFactors, Carry, Multiply, ScaledShortcut
from skipway.nn.site import Kind, Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_positive, check_positive_int

__all__ = ["UMuP"]


@dataclass(frozen=True)
class UMuP(Scheme):
    """A stream of constant variance, in which every branch of a kind has the same share: y = (x + τ F(x)) / √(1 + τ²).

    It is the residual part of u-μP. With the branches' weights α_a for attention and α_m for the MLP and n_a, n_m the
    numbers of each before this one (two and one to a layer with cross-attention),

        τ² = α² / (L/2 + n_a α_a² + n_m α_m²),  α_m² = 2 α² / (1 + ρ²),  α_a = ρ α_m,

    where the first α is that of this branch's kind. Where only norms read the stream, in a pre-norm transformer, they
    do not see its size: up to their ε it computes what `DepthScaled(exponent=0.5, base=2)` does for α = ρ = 1.

    Args:
        alpha: α > 0, the size of all attention or all MLP branches together beside the stem (their mean square).
        ratio: ρ > 0, one attention beside one MLP; 1 where all branches are of one kind, or some are convolutions.
        base: branches of the network whose learning rate was tuned, ≥ 1: as in `DepthScaled(exponent=0.5)` the
            parameters inside of the branches learn at rates times √(base / L). The authors' rule 1/√layers, which goes
            with learning rates near 1, is base=2. None leaves the rates alone.

    Depth: L counts branches. In networks of others the kinds of earlier branches are those seen; in ours two make a
    block, in which attention precedes the MLP, and ρ ≠ 1 is refused where it does not.

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
        kinds = site.kinds or tuple(("attention", "mlp")[index % 2] for index in range(site.depth))
        if self.ratio != 1:
            self.check_kinds(site, kinds)
        mlp = self.alpha**2 * 2 / (1 + self.ratio**2)
        attention = self.ratio**2 * mlp
        attentions = kinds[: site.index].count("attention")
        before = site.depth / 2 + attentions * attention + (site.index - attentions) * mlp
        return ((attention if site.kind == "attention" else mlp) / before) ** 0.5

    def check_kinds(self, site: Site, kinds: tuple[Kind, ...]) -> None:
        """Refuse a ratio of two kinds where there are others, or where those of earlier branches are not known."""
        if site.kind == "conv" or (site.depth > 1 and set(kinds) != {"attention", "mlp"}):
            names = {"conv": "convolutions", "attention": "attention", "mlp": "MLPs"}
            found = " and ".join(names[kind] for kind in sorted({site.kind, *site.kinds}))
            raise SkipwayError(
                f"ratio={self.ratio}: the branches of this network are {found}, which is not attention and MLPs; the "
                "rule is ratio=1, or a transformer"
            )
        if site.kind != kinds[site.index]:
            raise SkipwayError(
                f"ratio={self.ratio}: branch {site.index} is of kind {site.kind!r} where every other branch is an "
                "attention, the first one among them, so how many of each kind are before it is not known; give "
                "Site(kinds=…) with the kinds of all branches, or ratio=1"
            )

    def scale(self, site: Site) -> Multiply:
        tau = self.tau(site)
        size = tau / (1 + tau**2) ** 0.5
        rate = 1.0 if self.base is None else (self.base / site.depth) ** 0.5
        return Multiply(size, branch_factors=BranchFactors(rate=rate, epsilon=size))

    def carry(self, site: Site, shortcut: nn.Module | None) -> ScaledShortcut:
        return ScaledShortcut((1 + self.tau(site) ** 2) ** -0.5, Carry() if shortcut is None else shortcut)
