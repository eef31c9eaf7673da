"""The learning rate as a function of progress: a linear warm-up, then a shape. No torch, no state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from skipway.errors import SkipwayError
from skipway.registry import Registry, parse_spec

if TYPE_CHECKING:
    import torch

__all__ = ["SCHEDULES", "Constant", "Cosine", "OneCycle", "Shape", "Step", "Trapezoid", "rate_factor", "schedule"]


class Shape(Protocol):
    """What multiplies the peak rate behind the warm-up, at progress 0 <= t < 1."""

    def __call__(self, t: float) -> float: ...


SCHEDULES: Registry[Callable[..., Shape]] = Registry("schedule")


def schedule(text: str) -> Shape:
    """The shape that a spec string describes.

    >>> schedule("step(at=(0.5, 0.75))")
    Step(at=(0.5, 0.75), factor=0.1)
    """
    return parse_spec(text, SCHEDULES.__getitem__)


@dataclass(frozen=True)
class Cosine:
    """(1 + cos(pi t)) / 2, down to `floor` (Loshchilov 2017, eq. 5).

    >>> Cosine()(0.5)
    0.5
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        within("floor", self.floor)

    def __call__(self, t: float) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * t)) / 2


@dataclass(frozen=True)
class Step:
    """1, and times `factor` at each share of the way (He 2015: a tenth at 1/2 and 3/4 on CIFAR-10).

    >>> [Step()(t) for t in (0.0, 0.5, 0.8)]
    [1.0, 0.1, 0.010000000000000002]
    """

    at: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1

    def __post_init__(self) -> None:
        for share in self.at:
            within("at", share)

    def __call__(self, t: float) -> float:
        return self.factor ** sum(t >= share for share in self.at)


@dataclass(frozen=True)
class OneCycle:
    """Up in a line from 1/`start` over the first `rise`, down in a line to 0 (Smith 2018). With `warmup=0`.

    >>> [round(OneCycle(rise=0.25, start=10)(t), 2) for t in (0.0, 0.25, 0.625)]
    [0.1, 1.0, 0.5]
    """

    rise: float = 0.3
    start: float = 25.0

    def __post_init__(self) -> None:
        within("rise", self.rise)

    def __call__(self, t: float) -> float:
        if t < self.rise:
            return 1 / self.start + (1 - 1 / self.start) * t / self.rise
        return (1 - t) / (1 - self.rise)


@dataclass(frozen=True)
class Trapezoid:
    """1, and in a line to 0 over the last share `fall` (Hägele 2024, "cooldown").

    >>> [Trapezoid(fall=0.25)(t) for t in (0.5, 0.75, 0.875)]
    [1.0, 1.0, 0.5]
    """

    fall: float = 0.2

    def __post_init__(self) -> None:
        within("fall", self.fall)

    def __call__(self, t: float) -> float:
        return min(1.0, (1 - t) / self.fall) if self.fall else 1.0


@dataclass(frozen=True)
class Constant:
    """1.

    >>> Constant()(0.9)
    1.0
    """

    def __call__(self, t: float) -> float:
        return 1.0


def within(name: str, value: float) -> None:
    """A share in [0, 1)."""
    if not 0 <= value < 1:
        raise SkipwayError(f"{name}={value}: the rule is 0 <= {name} < 1")


for shape in (Cosine, Step, OneCycle, Trapezoid, Constant):
    SCHEDULES.add(shape.__name__.lower(), shape)


def rate_factor(step: int, steps: int, warmup: float, shape: Shape = Cosine()) -> float:
    """What multiplies the peak rate at step 0 <= step < steps; `warmup` is a share of the steps.

    (step + 1) / w while step < w = round(warmup * steps) (Goyal 2017), then shape((step - w) / (steps - w)).

    >>> [round(rate_factor(step, steps=8, warmup=0.5), 3) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return shape((step - rising) / max(1, steps - rising))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its own peak, which the group keeps as `initial_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
