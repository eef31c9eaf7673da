"""The learning rate as a function of the step: linear warm-up, then half a cosine to 0."""

from __future__ import annotations

import math

import torch

__all__ = ["rate_factor", "set_rates"]


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """What multiplies the peak rate at step 0 <= step < steps; `warmup` is a share of the steps.

    (step + 1) / w while step < w = round(warmup * steps), then (1 + cos(pi * t)) / 2 with t = (step - w) / (steps - w)
    (Loshchilov 2017; warm-up: Goyal 2017).

    >>> [round(rate_factor(step, steps=8, warmup=0.5), 3) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its own peak, which the group keeps as `initial_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
