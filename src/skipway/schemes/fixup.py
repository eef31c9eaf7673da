from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from skipway.errors import SkipwayError
from skipway.nn import Bias, Gain
from skipway.nn.kit import Kit
from skipway.nn.placement import Placement
from skipway.nn.role import Role
from skipway.nn.sequence import sequence
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.tracing.chain import Chain

__all__ = ["Fixup"]


@dataclass(frozen=True)
class Fixup(Scheme):
    """Training without normalisation by initialisation alone: y = x + s F(x) + b, F(x) = 0 at the start.

    1. The classifier and the last map of every branch start at 0.
    2. The other maps of a branch start from the family's distribution, in a ResNet He's, times L^(-1/(2m-2)), m the
       number of maps in the branch.
    3. Scalar biases (start 0) stand before every map and activation, a scalar multiplier s (start 1) and a bias
       after every branch. No normalisation anywhere.

    Args:
        rescale: False leaves out the factor of rule 2.
        rate: factor on the learning rate of the scalars.

    Depth: L is the number of residual branches of the whole network, our unit; not of layers, not of a stage.

    Decay and learning rate: the authors' scripts train the scalars at lr/10, without which training diverges half-way,
    and decay them like weights; so do we. Departures: outside of ResNets the paper's rule 2 would be He's, too, whereas
    our maps start from N(0, 0.02²), as without Fixup; their scripts put the classifier's bias among the scalars;
    their stem keeps PyTorch's default distribution, ours has the family's; their CIFAR net adds the first bias
    on padded shortcuts too, ours on projections only.

    Theory at the start: the network is its shortcuts; Var(x_l) = Var(x_0) for every l, and one step of SGD changes the
    output by Θ(η), independent of depth (theorem 2 and its corollary).

    Source: Zhang, Dauphin, Ma 2019, "Fixup Initialization: Residual Learning Without Normalization", sec. 3; the
    authors' `fixup_resnet_cifar.py`.

    >>> import skipway as sw
    >>> block = sw.build("resnet20", scheme="fixup").stages[0][0]
    >>> [name for name, _ in block.branch.named_children()]
    ['conv1', 'norm1', 'act1', 'before2', 'conv2']
    >>> block.branch.norm1
    Bias()
    """

    rescale: bool = True
    rate: float = 0.1

    equation: ClassVar[str] = "y = x + s F(x) + b, F₀ = 0"
    norm_note: ClassVar[str] = "removes it"
    when: ClassVar[str] = "no normalisation, any depth, small batches; needs strong augmentation"
    source: ClassVar[str] = "Zhang et al. 2019, sec. 3"

    @property
    def silent(self) -> bool:
        return True

    def kit(self, site: Site | None, kit: Kit) -> Kit:
        return replace(kit, norm=lambda dim: self.bias(), before=self.bias)

    def place(self, site: Site | None, placement: Placement) -> Placement:
        # the bias after a branch follows its multiplier, in `scale`
        return placement if site is None else replace(placement, end=tuple(p for p in placement.end if p != "norm"))

    def enter(self, site: Site) -> Bias:
        return self.bias()

    def transition(self, site: Site) -> Bias:
        return self.bias()

    def scale(self, site: Site) -> nn.Module:
        return sequence(multiplier=Gain(role=Role("gain", decay=True, rate=self.rate)), bias=self.bias())

    def init_(self, chain: Chain) -> None:
        if bare := next((connection.name for connection in chain if not connection.path), None):
            raise SkipwayError(f"{self} starts the last map of every branch at 0, and that of {bare!r} has none")
        factors = [(connection.path[-1], 0.0) for connection in chain]  # of a weight that is tied to another map, too
        for connection in chain if self.rescale else ():
            others = connection.path[:-1]
            factors += [(each, len(chain) ** (-1 / (2 * len(others)))) for each in others]
        chain.multiply_maps_(factors)
        if chain.classifier is not None:
            chain.classifier.zero_()

    def bias(self) -> Bias:
        """One scalar bias."""
        return Bias(role=Role("bias", decay=True, rate=self.rate))
