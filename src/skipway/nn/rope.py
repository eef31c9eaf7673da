"""Changes to the frequencies of rotary positions, by which a network reads longer texts than before."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from skipway.errors import SkipwayError
from skipway.registry import Registry, parse_spec
from skipway.validation import is_real

__all__ = ["LinearScaling", "Llama3Scaling", "RotaryScaling", "parse_rotary_scaling"]


@dataclass(frozen=True)
class RotaryScaling:
    """A rule for new frequencies; its text is its spec string."""

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_real(value) or not value > 0:
                raise SkipwayError(f"{self}: the rule is {field.name} > 0")

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(f'{field.name}={getattr(self, field.name)}' for field in fields(self))})"

    def __call__(self, frequency: Tensor) -> Tensor:
        """The frequencies, in radians per token, that stand in place of the given ones."""
        raise NotImplementedError


SCALINGS: Registry[type[RotaryScaling]] = Registry("rotary scaling")


@dataclass(frozen=True)
class LinearScaling(RotaryScaling):
    """ω / factor: positions are interpolated (Chen et al. 2023, "Extending Context Window", eq. 3).

    >>> LinearScaling(4.0)(torch.tensor([1.0, 0.1]))
    tensor([0.2500, 0.0250])
    """

    kind = "linear"
    factor: float

    def __call__(self, frequency: Tensor) -> Tensor:
        return frequency / self.factor


@dataclass(frozen=True)
class Llama3Scaling(RotaryScaling):
    """ω / factor where less than `low` periods fit into `original` tokens, ω where more than `high` do, between them
    a mean of the two whose weight grows linearly with the number of periods (Llama 3.1, `apply_scaling` of its code).

    Args:
        factor: by which slow rotations are slowed down.
        low: periods within `original` tokens up to which a rotation is slow.
        high: periods from which on it stays as it is.
        original: tokens of the context before.
    """

    kind = "llama3"
    factor: float
    low: float
    high: float
    original: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.high > self.low:
            raise SkipwayError(f"{self}: the rule is high > low")

    def __call__(self, frequency: Tensor) -> Tensor:
        period = 2 * math.pi / frequency
        share = (self.original / period - self.low) / (self.high - self.low)
        between = (1 - share) * frequency / self.factor + share * frequency
        slow, fast = period > self.original / self.low, period < self.original / self.high
        return torch.where(slow, frequency / self.factor, torch.where(fast, frequency, between))


for each in (LinearScaling, Llama3Scaling):
    SCALINGS.add(each.kind, each)


def parse_rotary_scaling(spec: str | RotaryScaling | None) -> RotaryScaling | None:
    """The scaling that a spec string describes; a scaling, or None for the plain frequencies, is returned as it is.

    >>> parse_rotary_scaling("linear(factor=4.0)")
    LinearScaling(factor=4.0)
    """
    return parse_spec(spec, SCALINGS.__getitem__) if isinstance(spec, str) else spec
