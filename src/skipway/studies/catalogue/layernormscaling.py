"""LayerNorm Scaling: growth of the stream, and what a depth-scaled start does to it.

Claim:    pre-norm's variance grows with the depth, that of LayerNorm Scaling far more slowly, so that its deep blocks
          learn and the loss falls; with a start that is scaled by depth, too, the effect diminishes (the authors).
Source:   Sun et al. 2025, "The Curse of Depth in Large Language Models", and the README of its code; the closed forms
          are ours: 1 + v l without, 1 + v Σ 1/b with the scaling, b the number of the block and v = 2 here.
Rule:     closed forms: within 10 % or half a bit. Losses: a difference counts if the 95 % interval of its mean over
          paired seeds excludes 0, each variant at the learning rate with its lowest training loss. Fixed before the
          run, but for the seeds: three more were added when three had left the losses open.
Command:  skipway study layernorm-scaling
Hardware: two shared cores of a virtual machine, one process each.
Time:     14 minutes of one core on a loaded machine (144 cells).
Result:   29 November 2026, digits, 6 seeds (`--seeds 0,1,2,3,4,5`): the variances follow the closed forms, 32 with the
          scaling and 2,200 without at 1024 branches. In a ViT of 12 blocks the scaling lowers the test loss by 0.25 ±
          0.23, and by 0.26 ± 0.22 with a start divided by √L: the effect does not diminish there, and such a start
          alone is worse by 0.65 ± 0.07.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from skipway.report.chart import Figure, Series, format_value
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.chains import block_chain, cross
from skipway.studies.statistics import group_values, series_over
from skipway.studies.study import STUDIES, Verdict
from skipway.studies.variants import NetworkVariant, TrainingGrid, VariantStudy, compare

__all__ = ["LayerNormScalingStudy"]

PLAIN, SCALED = "pre-norm", "LayerNorm Scaling"
PLAIN_START, SCALED_START = "pre-norm, start / √L", "LayerNorm Scaling, start / √L"
SCHEMES = {
    PLAIN: "identity",
    SCALED: "layernormscaling",
    PLAIN_START: "depthscaled(how='init')",
    SCALED_START: "layernormscaling + depthscaled(how='init')",
}
DEPTHS = (16, 64, 256, 1024)
WIDTH = 128
SEEDS = (0, 1, 2, 3, 4)
VARIANCE = 2.0
"""Second moment v of a branch whose input has 1: He's start doubles it in both maps, the ReLU between halves it."""


def theory(name: str, depth: int) -> float:
    """log₂ of the second moment after `depth` branches, two to a block."""
    scaled, start = name in (SCALED, SCALED_START), name in (PLAIN_START, SCALED_START)
    total = sum(1 / (index // 2 + 1) if scaled else 1.0 for index in range(depth))
    return math.log2(1 + VARIANCE * total / (depth if start else 1))


class LayerNormScalingStudy(VariantStudy):
    """Variance by depth at the start, and losses of ViTs, with and without a depth-scaled start."""

    name = "layernorm-scaling"
    title = "LayerNorm Scaling and a depth-scaled start"
    claim = (
        "With LayerNorm Scaling the variance of the stream grows with the logarithm of the depth, and deep "
        "transformers learn better; a start that is scaled by depth takes the effect away."
    )
    source = "Sun et al. 2025, and the README of its code"
    results = ("forward", "forward_theory", "test_loss", "test_error")
    minutes = "14 minutes of one core under load"
    variants: ClassVar = {name: NetworkVariant(scheme) for name, scheme in SCHEMES.items()}
    grids: ClassVar = {
        "cpu": {"vit": TrainingGrid(depths=(12,), width=32, epochs=6, rates=(2e-3, 6e-3))},
        "gpu": {"vit": TrainingGrid(depths=(12, 48), width=192, epochs=60, rates=(1e-3, 3e-3), seeds=SEEDS)},
        "paper": {"vit": TrainingGrid(depths=(12, 24, 48), width=384, epochs=300, rates=(1e-3, 3e-3))},
    }

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        chains = [
            self.cell(kind="chain", scheme=name, depth=depth, seed=seed, width=WIDTH)
            for depth in reversed(DEPTHS)
            for name in choices.schemes or SCHEMES
            for seed in choices.seeds or (0, 1, 2)
        ]
        return [*chains, *super().cells(budget, choices)]

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        if cell["kind"] == "train":
            return super().measure(cell, device)
        torch.manual_seed(cell["seed"])
        scheme, depth = SCHEMES.get(cell["scheme"], cell["scheme"]), cell["depth"]
        chain = block_chain(scheme, depth, width=cell["width"], norm="layer", place="transformer")
        row: Row = {"forward": cross(chain, seed=cell["seed"]).forward}
        return row | ({"forward_theory": theory(cell["scheme"], depth)} if cell["scheme"] in SCHEMES else {})

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [
            grows_as(rows, PLAIN, "Pre-norm's variance grows as 1 + 2 l."),
            grows_as(rows, SCALED, "With LayerNorm Scaling it grows as 1 + 2 Σ 1/b, with the logarithm of the depth."),
            grows_as(
                rows, PLAIN_START, "With a start divided by √L pre-norm's variance stays below 3, without the scaling."
            ),
            compare("With LayerNorm Scaling the test loss is lower.", rows, SCALED, PLAIN),
            compare(
                "With LayerNorm Scaling the test loss is lower also where the start is divided by √L.",
                rows, SCALED_START, PLAIN_START,
            ),
            compare(
                "A start divided by √L alone is as good as LayerNorm Scaling, or better.", rows, PLAIN_START, SCALED
            ),
        ]  # fmt: skip

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        chains = [row for row in rows if row["kind"] == "chain"]
        lines = [Series.of(name, [(depth, theory(name, depth)) for depth in DEPTHS], "theory") for name in SCHEMES]
        growth = Figure(
            name="growth",
            title="Variance of the stream at the start",
            x_label="residual branches L",
            y_label="log₂ of the ratio of second moments",
            log_x=True,
            series=(*lines, *series_over(chains, "depth", "forward", "scheme")),
            note="Dashed: closed form.",
        )
        return [growth, *super().figures(rows)]


def grows_as(rows: Sequence[Row], scheme: str, claim: str) -> Verdict:
    """Judge whether the bits of a chain agree with theory, within 10 % or half a bit."""
    own = [row for row in rows if row["kind"] == "chain" and row["scheme"] == scheme]
    found = {depth: sample for (depth,), sample in sorted(group_values(own, ["depth"], "forward").items())}
    if not found:
        return Verdict(claim, "open", "not measured")
    off = [depth for depth, s in found.items() if abs(s.mean - theory(scheme, depth)) > max(0.5, 0.1 * s.mean)]
    text = "; ".join(
        f"L = {depth}: {format_value(2**sample.mean)}, theory {format_value(2 ** theory(scheme, depth))}"
        for depth, sample in found.items()
    )
    return Verdict(claim, "does not hold" if off else "holds", f"Variance, {text}.")


STUDIES.add("layernorm-scaling", LayerNormScalingStudy())
