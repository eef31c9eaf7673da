"""The role of a parameter decides how an optimizer treats it; it follows from the owning module, never from a name."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["BranchFactors", "Role"]


@dataclass(frozen=True)
class BranchFactors:
    """What a constant factor on a branch asks an optimizer to do with all parameters in front of it in that branch.

    Args:
        rate: factor on the learning rate of a method whose steps do not depend on the size of the gradient, > 0.
        decay: factor on the weight decay, ≥ 0.
        epsilon: factor on ε, > 0: the size of the gradients beside what they are without the factor on the branch.

    >>> BranchFactors(rate=0.5) * BranchFactors(rate=0.5, epsilon=0.25)
    BranchFactors(rate=0.25, decay=1.0, epsilon=0.25)
    """

    rate: float = 1.0
    decay: float = 1.0
    epsilon: float = 1.0

    def __mul__(self, other: BranchFactors) -> BranchFactors:
        return BranchFactors(self.rate * other.rate, self.decay * other.decay, self.epsilon * other.epsilon)


@dataclass(frozen=True)
class Role:
    """The role of a parameter.

    Args:
        name: "weight", "bias", "norm", "gain" or "embedding"; the name of its optimizer group.
        decay: factor on the weight decay, ≥ 0: True or 1 where it applies, False or 0 where it does not.
        rate: factor on the learning rate, > 0.
        epsilon: factor on ε of adaptive methods, > 0.
    """

    name: str
    decay: float = False
    rate: float = 1.0
    epsilon: float = 1.0

    def times(self, factors: BranchFactors) -> Role:
        """The role of a parameter in a branch that is multiplied by a constant."""
        decay, rate, epsilon = self.decay * factors.decay, self.rate * factors.rate, self.epsilon * factors.epsilon
        return replace(self, decay=decay, rate=rate, epsilon=epsilon)
