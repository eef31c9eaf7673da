"""Simpler forecasts at the cost of as many real steps: the loss reached, a learning-rate range test, and rules of
thumb.

    python -m benchmarks.trainability.baselines --cifar cifar10-jpeg.tar.xz --text tinyshakespeare.txt.xz   # resumes

One line of baselines.jsonl per configuration, of numbers alone; `verdicts` chooses the thresholds on the half that is
not held out.

* Loss after k steps: share of the best constant answer's loss that the last five steps are below it.
* Range test (Smith 2017, https://arxiv.org/abs/1506.01186, sec. 3.3): the rate grows from a hundredth of the planned
  one to ten times it; by how much the smoothed loss is below its start where the rate is the planned one, less by how
  much it has risen again above its lowest value on the way there.
* Rules of thumb, as debuggers of trainings have them: how many of these hold in the k steps: a loss that is not finite;
  no decrease from the first ten steps to the last ten; a gradient of the first map more than 10⁴ times smaller or
  larger than the last one's; a median relative update below 10⁻⁶ or above 0.1; a map whose gradient is exactly 0.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from benchmarks.trainability.configurations import Configuration
from benchmarks.trainability.truth import add_data_options, resume
from skipway.optim.schedules import set_lr

__all__ = ["BASELINES", "STEPS_AHEAD", "main"]

STEPS_AHEAD, OTHER_ORDER = 45, 1000
"""3 % of 1,500 steps; added to the seed, so that other batches are seen than in the training."""
LOWEST, HIGHEST = 0.01, 10.0
"""Rates of the range test over the planned one."""
BASELINES = Path(__file__).with_name("baselines.jsonl")


def steps_of(configuration: Configuration, factors: list[float], rules: dict[str, float] | None = None) -> list[float]:
    """Losses of a step at each factor of the planned rate; with `rules`, what the rules of thumb look at."""
    model = configuration.build()
    optimizers = configuration.make_optimizers(model)
    stream = configuration.task.batches(configuration.seed + OTHER_ORDER)
    losses = []
    for number, factor in enumerate(factors):
        x, y = next(stream)
        loss = configuration.task.loss(model(x), y)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            set_lr(optimizer, factor)
        watched = rules is not None and number in (0, len(factors) - 1)
        before = [p.detach().clone() for p in model.parameters()] if watched else []
        for optimizer in optimizers:
            optimizer.step()
        if watched and rules is not None:
            read_rules(model, before, rules)
    return losses


def read_rules(model: nn.Module, before: list[torch.Tensor], rules: dict[str, float]) -> None:
    """Note what the rules of thumb look at, the worst so far."""
    maps = [p.grad for p in model.parameters() if p.ndim > 1 and p.grad is not None]
    sizes = [float(g.norm()) / g.numel() ** 0.5 for g in maps]
    ratio = sizes[0] / sizes[-1] if sizes and sizes[-1] > 0 else math.inf
    moved = [
        float((p.detach() - old).norm() / old.norm())
        for p, old in zip(model.parameters(), before, strict=True)
        if p.ndim > 1 and bool(old.any())
    ]
    update = median(moved) if moved else 0.0
    rules["gradients differ"] = max(rules.get("gradients differ", 0.0), float(not 1e-4 < ratio < 1e4))
    rules["updates"] = max(rules.get("updates", 0.0), float(not 1e-6 < update < 0.1))
    rules["no gradient"] = max(rules.get("no gradient", 0.0), float(any(size == 0 for size in sizes)))


def measured(configuration: Configuration) -> dict[str, Any]:
    """One line of the file."""
    constant = configuration.task.constant()
    rules: dict[str, float] = {}
    losses = steps_of(configuration, [configuration.rate_factor(step) for step in range(STEPS_AHEAD)], rules)
    finite = math.isfinite(losses[-1]) and len(losses) == STEPS_AHEAD
    rules["not finite"] = float(not finite)
    rules["no decrease"] = float(not fmean(losses[-10:]) < 0.99 * fmean(losses[:10]))
    growth = (HIGHEST / LOWEST) ** (1 / (STEPS_AHEAD - 1))
    swept = steps_of(configuration, [LOWEST * growth**step for step in range(STEPS_AHEAD)])
    return {
        "name": configuration.name,
        "loss": (constant - fmean(losses[-5:])) / constant if finite else -99.0,
        "range": range_score(swept, round(math.log(1 / LOWEST) / math.log(growth))),
        "rules": -sum(rules.values()),
    }


def range_score(losses: list[float], planned: int) -> float:
    """Fall of the smoothed loss up to the planned rate, less its rise after the lowest value on the way there."""
    if len(losses) <= planned or not math.isfinite(losses[planned]):
        return -99.0
    smooth = [fmean(losses[max(0, k - 2) : k + 3]) for k in range(planned + 1)]
    start = max(abs(fmean(losses[:3])), 1e-9)
    return ((start - smooth[-1]) - (smooth[-1] - min(smooth))) / start


def main() -> None:
    """Measure what is not yet measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_options(parser)
    parser.add_argument("--out", type=Path, default=BASELINES)
    resume(parser.parse_args(), measured)


if __name__ == "__main__":
    main()
