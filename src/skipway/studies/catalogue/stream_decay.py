"""Weight decay on the static weights of hyper-connections: it shrinks the skip itself.

Claim:    the static weights must not be decayed (Zhu et al. 2025, sec. 4); an author names decay as the cause of a
          ViT that became NaN (lucidrains/hyper-connections, issue 4). In theory decay leaves e^(-L λ Σ lr) of the
          stream after L connections.
Source:   Zhu et al. 2025, "Hyper-Connections", sec. 4, "Implementation"; the theory is ours.
Rule:     decay shrinks the skip as theory says if log₂ of what the skips carry falls, by decay, by at least half of L λ
          Σ lr / ln 2 and by more than the 95 % interval of paired seeds, for every weight decay λ. Losses: a difference
          counts if the 95 % interval of its mean over paired seeds excludes 0. Fixed before the run; the interval of
          the first was added after ten cells.
Command:  skipway study stream-decay
Hardware: two shared cores of a virtual machine, one process each.
Time:     13 minutes of one core on a loaded machine (30 cells).
Result:   29 November 2026, digits, 8 epochs, 5 seeds: decay takes 0.17, 1.8 and 8.7 bits from what the skips carry over
          16 connections (weight decay 0.05, 0.5 and 2; theory 0.31, 3.1 and 12.3, which leaves out what the gradient
          gives back). The test loss is higher with a weight decay of 2 alone (by 0.21 ± 0.08): at usual ones nothing is
          lost in so short a training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from skipway.data import Data
from skipway.nn import HyperConnection, Role
from skipway.optim.schedules import lr_factor
from skipway.report.chart import Figure, format_value
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.fit import FitSettings, data_of
from skipway.studies.statistics import PairedDifference, group_values, pair_by_seed, series_over
from skipway.studies.study import STUDIES, Verdict
from skipway.studies.variants import NetworkVariant, TrainingGrid, VariantStudy, name_depths, summarise_variants

__all__ = ["StreamDecay"]

KEPT, DECAYED = "not decayed", "decayed"
DECAYS = (0.05, 0.5, 2.0)
SEEDS = (0, 1, 2, 3, 4)


class StreamDecay(VariantStudy):
    """Losses, and what the skips carry, with and without decay of the static weights."""

    name = "stream-decay"
    title = "Weight decay on the static weights of hyper-connections"
    claim = "Weight decay on the static weights shrinks the skip, by e^(-L λ Σ lr) over L connections, and does harm."
    source = "Zhu et al. 2025, sec. 4"
    settings = (*VariantStudy.settings, "weight_decay")
    results = ("test_loss", "test_error", "carried", "carried_theory")
    minutes = "13 minutes of one core under load"
    variants: ClassVar = {name: NetworkVariant("hyperconnections(2, dynamic=False)") for name in (KEPT, DECAYED)}
    grids: ClassVar = {
        "cpu": {"vit": TrainingGrid(depths=(8,), width=32, epochs=8, rates=(3e-3,), seeds=SEEDS)},
        "gpu": {"vit": TrainingGrid(depths=(12, 24), width=192, epochs=60, rates=(1e-3,), seeds=SEEDS)},
        "paper": {"vit": TrainingGrid(depths=(12, 24), width=768, epochs=300, rates=(3e-3,))},
    }

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        return [
            self.cell(**dict(cell.settings), weight_decay=decay)
            for cell in super().cells(budget, choices)
            for decay in DECAYS
        ]

    def build(self, cell: Cell, data: Data) -> nn.Module:
        model = super().build(cell, data)
        if cell["scheme"] == DECAYED:
            for module in model.modules():
                if isinstance(module, HyperConnection):
                    module.role = Role("gain", decay=True)
        return model

    def fit_settings(self, cell: Cell, data: Data) -> FitSettings:
        return replace(super().fit_settings(cell, data), weight_decay=cell["weight_decay"])

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        row = super().measure(cell, device)
        data = data_of(cell.get("data"))
        chosen = self.fit_settings(cell, data)
        steps = chosen.epochs * data.steps(chosen.batch_size)
        total = sum(lr_factor(step, steps, chosen.warmup) for step in range(steps)) * chosen.lr
        shrinks = cell["scheme"] == DECAYED
        return {**row, "carried_theory": -2 * cell["depth"] * chosen.weight_decay * total / math.log(2) * shrinks}

    def observe(self, model: nn.Module) -> Row:
        return {"carried": carried_bits(model)}

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [shrinks(rows), harms(rows)]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        return [
            Figure(
                name=name,
                title=title,
                x_label="weight decay",
                y_label=label,
                log_x=True,
                series=series_over(name_depths(rows), "weight_decay", name.replace("-", "_"), "scheme"),
            )
            for name, title, label in (
                ("carried", "What the skips carry from the stem to the head after training", "log₂"),
                ("test-loss", "Test loss", "test loss"),
            )
        ]

    def summary(self, rows: Sequence[Row]) -> list[Row]:
        """One row per depth, variant and weight decay."""
        return summarise_variants(rows, "weight_decay")


@torch.no_grad()
def carried_bits(model: nn.Module) -> float:
    """log₂ of the share of the stem's signal that the skips alone carry to the head, the mean of the streams."""
    carried = torch.ones(())
    for module in model.modules():
        if isinstance(module, HyperConnection):
            mixing = module.static[:, 1:-1]
            carried = mixing.T @ (mixing.new_ones(module.count) if carried.ndim == 0 else carried)
    return math.log2(max(float(carried.mean()), 1e-30))


def by_decay(rows: Sequence[Row], value: str) -> dict[str, PairedDifference]:
    """Difference of decayed and not decayed by weight decay, of each depth where there are several."""
    found = {}
    for name, own in rows_by_decay(rows).items():
        with_it, without = ([row for row in own if row["scheme"] == each] for each in (DECAYED, KEPT))
        difference = pair_by_seed(with_it, without, value)
        if len(difference.differences.values) > 1:
            found[name] = difference
    return found


def rows_by_decay(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each weight decay, and of each depth where there are several."""
    found: dict[str, list[Row]] = {}
    several = len({row["depth"] for row in rows}) > 1
    for row in sorted(rows, key=lambda row: (row["depth"] or 0, row["weight_decay"] or 0)):
        name = f"{row['weight_decay'] or 0:g}" + (f" with {row['depth']} blocks" if several else "")
        found.setdefault(name, []).append(row)
    return found


def shrinks(rows: Sequence[Row]) -> Verdict:
    """Compare what the skips lose by decay with theory."""
    claim = "Decay takes from the skips at least half of the L λ Σ lr / ln 2 bits that theory says."
    rows = [row for row in rows if math.isfinite(float(row.get("carried") or 0))]  # NaN where a training diverged
    found = by_decay(rows, "carried")
    if not found:
        return Verdict(claim, "open", "not measured with two seeds")
    theory = {
        name: group_values([row for row in own if row["scheme"] == DECAYED], [], "carried_theory")[()].mean
        for name, own in rows_by_decay(rows).items()
        if name in found
    }
    good = [name for name, each in found.items() if each.sign < 0 and each.differences.mean < theory[name] / 2]
    text = "; ".join(f"{name}: {each} bits, theory {format_value(theory[name])}" for name, each in found.items())
    if good and len(good) < len(found):
        return Verdict(claim, "holds only when", f"the weight decay is {' or '.join(good)}. By weight decay: {text}.")
    return Verdict(claim, "holds" if good else "does not hold", f"By weight decay: {text}.")


def harms(rows: Sequence[Row]) -> Verdict:
    """Compare test losses at each weight decay."""
    claim = "With decay on the static weights, the test loss is higher than without."
    found = by_decay(rows, "test_loss")
    if not found:
        return Verdict(claim, "open", "not measured with two seeds")
    text = "Test loss with minus without, by weight decay: " + "; ".join(
        f"{name}: {each}" for name, each in found.items()
    )
    good = [name for name, each in found.items() if each.sign > 0]
    if good and len(good) < len(found):
        return Verdict(claim, "holds only when", f"the weight decay is {' or '.join(good)}. {text}.")
    opposite = any(each.sign < 0 for each in found.values())
    return Verdict(claim, "holds" if good else "does not hold" if opposite else "open", f"{text}.")


STUDIES.add("stream-decay", StreamDecay())
