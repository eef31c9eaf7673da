"""The search for the best rate of a network: few steps at far rates first, all steps and seeds at near ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from skipway.depth_transfer.regression import Estimate, fit_lowest, paired_difference
from skipway.depth_transfer.runs import Trainings

__all__ = ["BestRate", "RateSearch", "TriedRate"]

FARTHEST = 14
"""Octaves from the first guess, beyond which no rate is tried."""
LEAST_HALF_WIDTH = 0.25
"""Octaves: what a parabola through rates an octave apart cannot resolve."""
CLEAR = 2.0
"""Octaves: an interval that is wider asks for two rates more."""


@dataclass(frozen=True)
class TriedRate:
    """The loss at one rate.

    Args:
        lr: the rate.
        mean, low, high: over the seeds; infinite where a training diverged.
        seeds: trainings of all steps; 0 where only the first quarter was looked at.
    """

    lr: float
    mean: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class BestRate:
    """The best rate of a network.

    Args:
        scheme, depth, branches: which network.
        lr: with its 95 % interval.
        loss: mean over the seeds at the best of the rates that were tried.
        first_loss: before the first step.
        shallow_lr: the rate of the shallowest network that was tried here.
        lost: by how much more it loses, paired by seed.
        tried: all rates.
        remark: why the rate is less certain than its interval says; "" for nothing.
    """

    scheme: str
    depth: int
    branches: int
    lr: Estimate
    loss: float
    first_loss: float
    shallow_lr: float
    lost: Estimate
    tried: tuple[TriedRate, ...]
    remark: str = ""

    @property
    def known(self) -> bool:
        """Whether there is a best rate with a finite interval."""
        return all(math.isfinite(each) and each > 0 for each in (self.lr.value, self.lr.low, self.lr.high))


@dataclass
class RateSearch:
    """The search at one depth with one scheme. Rates are `unit` · 2^k.

    Args:
        trainings: that are asked for.
        scheme: a key of `trainings.schemes`.
        depth: of the network.
        unit: a rate.
    """

    trainings: Trainings
    scheme: str
    depth: int
    unit: float
    complete: set[float] = field(default_factory=set, init=False)
    """The k at which all seeds took all steps."""

    def rate(self, k: float) -> float:
        """The rate of a k, with six digits, so that it is the same in every session."""
        return float(f"{self.unit * 2.0**k:.6g}")

    def loss(self, k: float, seed: int, steps: int | None = None) -> float:
        """The smoothed loss of one training."""
        steps = self.trainings.plan.steps if steps is None else steps
        return self.trainings.run(self.scheme, self.depth, self.rate(k), seed, steps).smoothed(steps)

    def curve(self, k: float) -> dict[int, float]:
        """The smoothed loss of each seed."""
        self.complete.add(k)
        return {seed: self.loss(k, seed) for seed in range(self.trainings.plan.seeds)}

    def mean(self, k: float) -> float:
        """The smoothed loss over all seeds."""
        return fmean(self.curve(k).values())

    def find(self, ks: Sequence[int]) -> tuple[int, Estimate, str]:
        """The k with the lowest loss, the best k between the rates with its interval, and a remark.

        Args:
            ks: where to look first, two octaves apart.
        """
        quarter = max(1, self.trainings.plan.steps // 4)
        best = bracket(lambda k: self.loss(k, 0, quarter), ks, 2)
        best = bracket(lambda k: self.loss(k, 0), (best - 1, best, best + 1), 1)
        best = bracket(self.mean, (best - 1, best, best + 1), 1)
        return best, *self.lowest(best)

    def lowest(self, best: int) -> tuple[Estimate, str]:
        """The best k with its interval, from the losses around the lowest one."""
        if not math.isfinite(self.mean(best)):
            return Estimate(math.nan, -math.inf, math.inf), "the training diverges at every rate that was tried"
        if abs(best) >= FARTHEST:
            side = "upwards" if best > 0 else "downwards"
            return Estimate(best, -math.inf, math.inf), f"the loss still falls {side} at the last rate that was tried"
        ends = self.mean(best - 1), self.mean(best + 1)
        if not all(map(math.isfinite, ends)):
            side = "above" if math.isfinite(ends[0]) else "below"
            nearest = min((best - 0.5, best, best + 0.5), key=self.mean)
            return Estimate(nearest, nearest - 0.5, nearest + 0.5), f"the training diverges {side} it within an octave"
        if self.trainings.plan.seeds < 2:
            found = fit_lowest({0: {k: self.loss(k, 0) for k in (best - 1, best, best + 1)}})
            return Estimate(found.value, best - 1, best + 1), "one seed: the noise is not known"
        found = self.fitted((best - 1, best, best + 1))
        if found.width > CLEAR and math.isfinite(self.mean(best - 2)) and math.isfinite(self.mean(best + 2)):
            found = self.fitted(range(best - 2, best + 3))
        if found.width > 2 * CLEAR or not math.isfinite(found.value):
            return self.plateau(best)
        low, high = min(found.low, found.value - LEAST_HALF_WIDTH), max(found.high, found.value + LEAST_HALF_WIDTH)
        return Estimate(found.value, low, high), ""

    def fitted(self, ks: Sequence[int]) -> Estimate:
        """Where a parabola through the losses at some k is lowest."""
        curves: dict[int, dict[float, float]] = {seed: {} for seed in range(self.trainings.plan.seeds)}
        for k in ks:
            for seed, loss in self.curve(k).items():
                curves[seed][k] = loss
        return fit_lowest(curves)

    def plateau(self, best: int) -> tuple[Estimate, str]:
        """All rates whose loss cannot be told from the lowest one, between those on either side whose loss can, or that
        diverge.
        """
        own = self.curve(best)
        ends = []
        for step in (-1, 1):
            k = best + step
            while k in self.complete and math.isfinite(self.mean(k)) and paired_difference(self.curve(k), own).holds(0):
                k += step
            ends.append(k)
        low, high = ends
        between = f"{self.rate(low + 1):.3g} to {self.rate(high - 1):.3g}"
        return Estimate(best, low, high), f"the rates {between} cannot be told apart by the noise between seeds"

    def tried(self) -> tuple[TriedRate, ...]:
        """The loss at every rate that was tried, all seeds where they took all steps, else of the first quarter."""
        plan, runs = self.trainings.plan, self.trainings.file.runs
        rates = {lr for scheme, depth, lr, _ in runs if (scheme, depth) == (self.scheme, self.depth)}
        found = []
        for lr in sorted(rates):
            own = [runs[key] for seed in range(plan.seeds) if (key := (self.scheme, self.depth, lr, seed)) in runs]
            whole = [run.smoothed(plan.steps) for run in own if len(run.losses) >= plan.steps or run.diverged]
            quarter = max(1, plan.steps // 4)
            values = whole or [run.smoothed(min(quarter, len(run.losses))) for run in own]
            found.append(TriedRate(lr, fmean(values), min(values), max(values), len(whole)))
        return tuple(found)


def bracket(loss: Callable[[int], float], ks: Sequence[int], step: int) -> int:
    """The k with the lowest loss, which is not at an end of those that are tried unless it lies beyond all bounds.

    >>> bracket(lambda k: (k - 5) ** 2, (-2, 0, 2), 2)
    4
    """
    losses = {k: loss(k) for k in ks if abs(k) <= FARTHEST}
    while True:
        best = min(losses, key=lambda k: (losses[k], k))
        if not math.isfinite(losses[best]):  # where everything diverges, lower rates may not
            best = min(losses)
        ends = [k for k in (best - step, best + step) if k not in losses and abs(k) <= FARTHEST]
        ends = ends if math.isfinite(losses[best]) else [k for k in ends if k < best]
        if not ends:
            return best
        losses[ends[0]] = loss(ends[0])
