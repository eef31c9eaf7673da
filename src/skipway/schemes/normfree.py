from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import nn

from skipway.nn import Gain, Multiply, ScaledActivation, ScaledStandardConv2d, ScaledStandardLinear
from skipway.nn.kit import Kit
from skipway.nn.placement import Placement
from skipway.nn.role import Role
from skipway.nn.sequence import sequence
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_finite

__all__ = ["NormFree"]


@dataclass(frozen=True)
class NormFree(Scheme):
    """The signal kept by construction, without batch statistics: y = x + α g F(γ act(x) / β), weights standardised.

    Maps use scaled weight standardisation (`ScaledStandardConv2d`, `…Linear`), activations are multiplied by γ so that
    they keep the variance, β_l = √Var(x_l) is the expected standard deviation of the stream, known in advance. Norm
    and activation stand before the branch (pre-activation); a projection sees γ act(x)/β, a carry the raw x;
    a squeeze-and-excitation gate is doubled.

    Args:
        alpha: growth per branch, > 0; 0.2 in the paper.
        gain: start of the learned scalar g on the branch; 0.0 in the authors' code, 1.0 for the bare theory.
        rate: factor on the learning rate of g.

    Depth: β counts the branches since the last projection (which resets the variance to 1 + α²); the projection's own
    β still belongs to the stage before.

    Decay and learning rate: gains and biases are not decayed; full rate. The paper clips gradients adaptively.

    Theory at the start: Var(x_l) = 1 + α² l counted from the last reset, for g = 1. As in the authors' code 1/β
    multiplies the activation's output, which for ReLU is the paper's act(x/β).

    Source: Brock, De, Smith 2021, "Characterizing signal propagation to close the performance gap in unnormalized
    ResNets", eq. 1-2 and sec. 3; the authors' `nf_resnet.py`.

    >>> scheme = NormFree()
    >>> [round(scheme.enter(Site(dim=8, index=i, depth=16, since=i)).factor, 4) for i in (0, 1, 2, 3)]
    [1.0, 0.9806, 0.9623, 0.9449]
    """

    alpha: float = 0.2
    gain: float = 0.0
    rate: float = 1.0

    equation: ClassVar[str] = "y = x + α g F(γ act(x) / β)"
    norm_note: ClassVar[str] = "standardised weights"
    when: ClassVar[str] = "no batch statistics at the accuracy of BatchNorm; train with adaptive clipping"
    source: ClassVar[str] = "Brock et al. 2021, eq. 1-2"

    def __post_init__(self) -> None:
        check_finite("alpha", self.alpha)
        check_finite("gain", self.gain)

    @property
    def silent(self) -> bool:
        return self.gain == 0.0

    def kit(self, site: Site | None, kit: Kit) -> Kit:
        act, gate = kit.act, kit.gate
        return replace(
            kit,
            conv=ScaledStandardConv2d,
            linear=ScaledStandardLinear,
            norm=None,
            act=lambda: ScaledActivation(act()),
            gate=None if gate is None else partial(doubled_gate, gate),
        )

    def place(self, site: Site | None, placement: Placement) -> Placement:
        return placement.to("pre")

    def enter(self, site: Site) -> Multiply:
        return Multiply((1 + self.alpha**2 * site.since) ** -0.5)

    def transition(self, site: Site) -> Multiply:
        return self.enter(site)  # the map resets the variance, as a projection does

    def scale(self, site: Site) -> Gain:
        return Gain(init=self.gain, factor=self.alpha, role=Role("gain", rate=self.rate))


def doubled_gate(gate: Callable[[int], nn.Module], dim: int) -> nn.Module:
    """A gate times 2: at the start σ(·) ≈ ½ would halve the branch."""
    return sequence(gate=gate(dim), twice=Multiply(2.0))
