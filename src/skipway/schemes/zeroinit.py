from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipway.schemes.scheme import Scheme
from skipway.tracing.chain import Chain

__all__ = ["ZeroInit"]


@dataclass(frozen=True)
class ZeroInit(Scheme):
    """The published connection with silent branches: y = x + F(x), F(x) = 0 at the start.

    The gain of the branch's closing norm starts at 0; where no norm closes the branch, its last map does. Known as
    "zero-γ". On in timm's, mmpretrain's and fastai's ResNet, off in torchvision's. With a norm that closes the branch
    of a transformer this is Swin V2's start of residual-post-norm.

    Depth: none enters. Decay and learning rate: no parameters of its own.

    Theory at the start: the network is its shortcuts; Var(x_l) = Var(x_0) for every l.

    Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD", sec. 5.1.

    >>> import skipway as sw
    >>> sw.build("resnet20", scheme="zeroinit").stages[0][0].branch.norm2.weight.any()
    tensor(False)
    """

    equation: ClassVar[str] = "y = x + F(x), F₀ = 0"
    when: ClassVar[str] = "large batches and high learning rates, with normalisation; costs nothing"
    source: ClassVar[str] = "Goyal et al. 2017, sec. 5.1"

    @property
    def silent(self) -> bool:
        return True

    def init_(self, chain: Chain) -> None:
        chain.multiply_(0.0)
