"""The classic failures: diagnosis, remedy, and real trainings before and after.

    python -m benchmarks.failures [NAME…]       # all of them take about ten minutes on one core

Every network is trained on the embedded digits for 300 steps of 64 images, before `Diagnosis.fix()` with the settings
that were asked about, and after it with those that the remedies chose. Shown is the mean training accuracy of the last
20 steps; chance is 0.1.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import skipway as sw
from benchmarks.trainability import nets
from benchmarks.trainability.tasks import digits, shuffled
from skipway.diagnosis import Diagnosis, Settings, diagnose

__all__ = ["FAILURES", "Failure", "main"]

STEPS, BATCH = 300, 64
GREY = {"channels": 1, "classes": 10}
VIT = {"dim": 32, "heads": 2, "ratio": 2.0, "patch": 2, "image": 8, "pooling": "mean", **GREY}


@dataclass(frozen=True)
class Failure:
    """A network that does not train, or not with these settings.

    Args:
        name: usual name of the failure.
        make: returns the network.
        causes: rules of which the diagnosis should find at least one.
        settings: of its training.
        half: train in float16.
    """

    name: str
    make: Callable[[], nn.Module]
    causes: frozenset[str]
    settings: dict[str, Any] = field(default_factory=dict)
    half: bool = False


def two_zeros() -> nn.Module:
    """A pre-norm transformer whose branches end in a zero scale after a zero last map (lint rule P13)."""
    model = sw.build("vit-tiny-16", blocks=6, scheme="layerscale(init=0.0)", **VIT)
    for connection in sw.chain(model):
        nn.init.zeros_(connection.path[-1].module.weight)
        nn.init.zeros_(connection.path[-1].module.bias)
    return model


SHATTERED = frozenset({"no-skips", "exploding-gradient", "vanishing-gradient", "samples-collapse"})
ADAM = {"optimizer": "adamw", "lr": 1e-3}
FAILURES = [
    Failure("plain 56 layers", lambda: sw.build("resnet", depth=56, scheme="plain", width=8, **GREY), SHATTERED),
    Failure("plain 56 layers, in plain torch", lambda: nets.VGG(56, "relu", "he", True), SHATTERED),
    Failure(
        "post-norm ViT, 48 layers",
        lambda: sw.build("vit-tiny-16", blocks=24, norm="post", **VIT),
        frozenset({"post-norm"}),
        {"optimizer": "adamw", "lr": 5e-3},
    ),
    Failure("post-norm, torch's own", lambda: nets.Encoder(96, "post", "relu"), frozenset({"post-norm"}), ADAM),
    *(
        Failure(
            f"ViT without skips, {layers} layers",
            lambda layers=layers: sw.build("vit-tiny-16", blocks=layers, scheme="plain", **VIT),
            frozenset({"no-skips", "samples-collapse", "rank-collapse"}),
            ADAM,
        )
        for layers in (6, 12, 24, 48)
    ),
    Failure("no norm, no scale", lambda: nets.ResidualConvNet(100, 1.0), frozenset({"stream-grows", "not-finite"})),
    Failure("two zeros in a branch", two_zeros, frozenset({"two-zeros"}), ADAM),
    Failure(
        "learning rate ten times too high, MLP",
        lambda: nets.ResidualMLP(20, "relu", "none"),
        frozenset({"rate-too-high"}),
        {"lr": 0.3},
    ),
    Failure(
        "learning rate ten times too high, CNN",
        lambda: nets.ResidualConvNet(20, 0.3),
        frozenset({"rate-too-high", "does-not-learn"}),
        {"lr": 0.5},
    ),
    Failure(
        "float16 overflow",
        lambda: nets.ResidualConvNet(80, 1.0),
        frozenset({"overflow", "stream-grows"}),
        {"lr": 0.01},
        half=True,
    ),
]


def accuracy(model: nn.Module, settings: Settings, *, half: bool) -> float:
    """Train a copy, and return the mean training accuracy of the last 20 of 300 steps; NaN if it diverged."""
    model = copy.deepcopy(model).train()
    images, labels = digits()
    optimizer = settings.make(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    stream = shuffled(images, labels, 0, BATCH)
    right: list[float] = []
    for step in range(STEPS):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / max(settings.warmup, 1))
        x, y = next(stream)
        with torch.autocast("cpu", torch.float16, enabled=half):
            output = model(x)
        loss = F.cross_entropy(output.float(), y)
        if not math.isfinite(float(loss.detach())):
            return math.nan
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append(float((output.argmax(1) == y).float().mean()))
    return sum(right[-20:]) / 20


def show(failure: Failure) -> bool:
    """Diagnose, fix, train both and print; True if a cause was named and the mended network learns."""
    torch.manual_seed(0)
    model = failure.make()
    images, labels = digits()
    stream = shuffled(images, labels, 1000, BATCH)
    pairs = [next(stream) for _ in range(128 // BATCH)]
    images, labels = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    with torch.autocast("cpu", torch.float16, enabled=failure.half):
        diagnosis = diagnose(model, images, targets=labels, steps=STEPS, **failure.settings)
    named = [finding.rule for finding in diagnosis.findings if finding.rule in failure.causes]
    with torch.autocast("cpu", torch.float16, enabled=failure.half):
        treatment = diagnosis.fix() if diagnosis.remedies else None
    before = accuracy(model, diagnosis.settings, half=failure.half)
    after = accuracy(treatment.model, treatment.settings, half=failure.half) if treatment else math.nan
    print(f"{failure.name}: {diagnosis.verdict}; named {', '.join(named) or 'nothing of ' + str(failure.causes)}")
    samples, tokens = similarities(diagnosis)
    print(f"    similarity of samples up to {samples:.6f}, of tokens {tokens:.6f}; ", end="")
    print(f"{diagnosis.measurement.passes:.1f} passes")
    if treatment:
        print(f"    {'; '.join(map(str, treatment.applied))}; then {treatment.after.verdict}")
    print(f"    accuracy after {STEPS} steps: {before:.2f} → {after:.2f}", flush=True)
    return bool(named) and after > 0.6


def similarities(diagnosis: Diagnosis) -> tuple[float, float]:
    """The highest mean cosine between samples, and between the tokens of a sample, before the classifier."""
    measured = diagnosis.measurement
    points = measured.connections or measured.layers[:-1]
    return 1 - min(p.distinct for p in points), 1 - min(p.tokens_distinct for p in points)


def main(names: list[str]) -> int:
    """Show all failures, or those named; exit status 1 if one was not diagnosed or not mended."""
    chosen = [failure for failure in FAILURES if not names or failure.name in names]
    done = [show(failure) for failure in chosen]
    print(f"{sum(done)} of {len(done)} failures named and repaired")
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
