"""Learning-rate schedules: a linear warm-up, then a shape. Stateless, and importable without torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from skipway.registry import Registry, parse_spec
from skipway.validation import check_fraction

if TYPE_CHECKING:
    import torch

__all__ = [
    "SCHEDULES",
    "Constant",
    "Cosine",
    "OneCycle",
    "ScheduleShape",
    "StepDecay",
    "Trapezoid",
    "lr_factor",
    "parse_schedule",
    "usual_warmup",
]


class ScheduleShape(Protocol):
    """The factor on the peak learning rate after the warm-up, at progress 0 <= t < 1."""

    def __call__(self, t: float) -> float: ...


SCHEDULES: Registry[Callable[..., ScheduleShape]] = Registry("schedule")


def parse_schedule(text: str) -> ScheduleShape:
    """Parse a spec string into a schedule shape.

    >>> parse_schedule("step(at=(0.5, 0.75))")
    StepDecay(at=(0.5, 0.75), factor=0.1)
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
        check_fraction("floor", self.floor)

    def __call__(self, t: float) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * t)) / 2


@dataclass(frozen=True)
class StepDecay:
    """1, multiplied by `factor` at each fraction in `at` (He 2015: by 0.1 at 1/2 and 3/4 on CIFAR-10).

    >>> [StepDecay()(t) for t in (0.0, 0.5, 0.8)]
    [1.0, 0.1, 0.010000000000000002]
    """

    at: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1

    def __post_init__(self) -> None:
        for fraction in self.at:
            check_fraction("at", fraction)

    def __call__(self, t: float) -> float:
        return self.factor ** sum(t >= fraction for fraction in self.at)


@dataclass(frozen=True)
class OneCycle:
    """Linear from 1/`start` to 1 over the first fraction `rise`, then linear to 0 (Smith 2018): its own warm-up.

    >>> [round(OneCycle(rise=0.25, start=10)(t), 2) for t in (0.0, 0.25, 0.625)]
    [0.1, 1.0, 0.5]
    """

    rise: float = 0.3
    start: float = 25.0

    def __post_init__(self) -> None:
        check_fraction("rise", self.rise)

    def __call__(self, t: float) -> float:
        if t < self.rise:
            return 1 / self.start + (1 - 1 / self.start) * t / self.rise
        return (1 - t) / (1 - self.rise)


@dataclass(frozen=True)
class Trapezoid:
    """1, then linear to 0 over the last fraction `fall` (Hägele 2024, "cooldown").

    >>> [Trapezoid(fall=0.25)(t) for t in (0.5, 0.75, 0.875)]
    [1.0, 1.0, 0.5]
    """

    fall: float = 0.2

    def __post_init__(self) -> None:
        check_fraction("fall", self.fall)

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


for name, shape in (
    ("cosine", Cosine),
    ("step", StepDecay),
    ("onecycle", OneCycle),
    ("trapezoid", Trapezoid),
    ("constant", Constant),
):
    SCHEDULES.add(name, shape)


def usual_warmup(shape: ScheduleShape, share: float = 0.05) -> float:
    """The fraction of the steps used for warm-up where none is given: `share`, or 0 if the shape rises by itself.

    >>> usual_warmup(Cosine()), usual_warmup(OneCycle())
    (0.05, 0.0)
    """
    return 0.0 if shape(0.0) < 1 else share


def lr_factor(step: float, steps: int, warmup: float, shape: ScheduleShape = Cosine()) -> float:
    """The factor on the peak learning rate at step 0 <= step < steps; `warmup` is a fraction of the steps.

    (step + 1) / w while step < w = round(warmup * steps) (Goyal 2017), then shape((step - w) / (steps - w)).

    >>> [round(lr_factor(step, steps=8, warmup=0.5), 3) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    warmup_steps = round(warmup * steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return shape((step - warmup_steps) / max(1, steps - warmup_steps))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's `lr`, in place, to `factor` times its own peak, which is kept as `initial_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
