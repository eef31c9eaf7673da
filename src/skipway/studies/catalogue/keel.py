"""Keel, DeepNorm and post-norm: what their skips keep of the gradient, and how they train.

Claim:    post-norm with a skip of α = L and a norm before the branch, too, trains networks of more than 1000 layers
          (Chen & Wei 2026); in theory its skips pass e^(-v / 2L) of the gradient, where those of post-norm pass
          (1 + v)^(-L / 2) (ours).
Source:   Chen & Wei 2026, "Post-LayerNorm Is Back", arXiv:2601.19895; Wang et al. 2022, "DeepNet"; Xiong et al. 2020.
Rule:     closed forms: log₂ of the gradient along the skips within 10 % or half a bit. First block's gradient: kept if
          it is at least half of the last block's. Losses: a difference counts if the 95 % interval of its mean over
          paired seeds excludes 0. Fixed before the run.
Command:  skipway study keel
Hardware: two shared cores of a virtual machine, one process each.
Time:     10 minutes of one core on a loaded machine (192 cells).
Result:   29 November 2026, digits, 6 epochs, 3 seeds: the closed forms hold up to 512 branches, but DeepNorm's skips
          pass as much as Keel's, and along all paths post-norm keeps the gradient of perceptron blocks, too, if with a
          wide spread. In a ViT of 48 blocks its first block gets 0.8 of the last one's gradient (Keel 1.1, DeepNorm
          1.0, pre-norm 12). Trained, Keel is far better than post-norm at 12 blocks (test loss 0.43 and 1.21) and worse
          at 4 (0.45 and 0.25); from DeepNorm (0.59) and pre-norm (0.73) three seeds do not tell it apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from skipway.report.chart import Figure, Series, format_value
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.chains import DetachedBranch, block_chain, cross
from skipway.studies.fit import data_of
from skipway.studies.statistics import group_values, series_over
from skipway.studies.study import STUDIES, Verdict
from skipway.studies.variants import NetworkVariant, TrainingGrid, VariantStudy, compare
from skipway.tracing.chain import chain

__all__ = ["KeelStudy"]

POST, DEEP, KEEL, PRE = "post-norm", "DeepNorm", "Keel", "pre-norm"
SCHEMES = {
    POST: ("identity", "post"),
    DEEP: ("deepnorm", "post"),
    KEEL: ("keel", "pre"),
    PRE: ("identity", "pre"),
}
DEPTHS = (8, 32, 128, 512)
BLOCKS = (6, 12, 24, 48)
WIDTH = 128
PLACES = {"post": "post", "pre": "transformer"}


def skip_bits(name: str, depth: int) -> float:
    """log₂ of the second moment of the gradient that passes along all skips: -L log₂(1 + v / α²).

    v is the branch's second moment: 2 from He's start, β⁴ / 2 = 1 / 8L from DeepNorm's.
    """
    factor = {POST: 2.0, DEEP: 1 / (8 * depth) / depth**0.5, KEEL: 2.0 / depth**2, PRE: 0.0}[name]
    return -depth * math.log2(1 + factor)


class KeelStudy(VariantStudy):
    """Gradients at the start and losses of post-norm, DeepNorm, Keel and pre-norm, by depth."""

    name = "keel"
    title = "Keel: post-norm with a strong skip"
    claim = (
        "Keel's skips pass the gradient through any depth, where those of post-norm lose it exponentially, and deep "
        "transformers with it train better than with post-norm or DeepNorm."
    )
    source = "Chen & Wei 2026; the closed forms are ours"
    results = ("backward", "backward_theory", "gradient_ratio", "test_loss", "test_error")
    minutes = "10 minutes of one core under load"
    variants: ClassVar = {name: NetworkVariant(scheme, {"norm": place}) for name, (scheme, place) in SCHEMES.items()}
    grids: ClassVar = {
        "cpu": {"vit": TrainingGrid(depths=(4, 12), width=32, epochs=6, rates=(2e-3, 6e-3))},
        "gpu": {"vit": TrainingGrid(depths=(12, 48), width=192, epochs=60, rates=(1e-3, 3e-3))},
        "paper": {"vit": TrainingGrid(depths=(24, 100, 500), width=384, epochs=300, rates=(1e-3, 3e-3))},
    }

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        seeds, names = choices.seeds or (0, 1, 2), choices.schemes or tuple(SCHEMES)
        starts = [
            self.cell(kind=kind, scheme=name, depth=depth, seed=seed, width=width)
            for kind, depths, width in (("skips", DEPTHS, WIDTH), ("all paths", DEPTHS, WIDTH), ("blocks", BLOCKS, 32))
            for depth in reversed(depths)
            for name in names
            for seed in seeds
        ]
        return [*starts, *super().cells(budget, choices)]

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        if cell["kind"] == "train":
            return super().measure(cell, device)
        torch.manual_seed(cell["seed"])
        if cell["kind"] == "blocks":
            data = data_of(None)
            settings = {"family": "vit", **dict(cell.settings)}
            return first_over_last(self.build(self.cell(**settings), data), cell["seed"])
        scheme, place = SCHEMES.get(cell["scheme"], (cell["scheme"], "pre"))
        blocks = block_chain(scheme, cell["depth"], width=cell["width"], norm="layer", place=PLACES[place])
        if cell["kind"] == "skips":
            for connection in chain(blocks):
                connection.residual.branch = DetachedBranch(connection.residual.branch)
        row: Row = {"backward": cross(blocks, seed=cell["seed"]).backward}
        if cell["kind"] == "skips" and cell["scheme"] in SCHEMES:
            row["backward_theory"] = skip_bits(cell["scheme"], cell["depth"])
        return row

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [
            passes(rows, KEEL, "Keel's skips pass e^(-v / 2L) of the gradient, close to all of it."),
            passes(rows, POST, "Post-norm's skips pass (1 + v)^(-L / 2) of it."),
            passes(rows, DEEP, "DeepNorm's skips pass almost all of it, too."),
            blocks_starve(rows),
            compare("At the same depth Keel has a lower test loss than post-norm.", rows, KEEL, POST),
            compare("It has a lower test loss than DeepNorm.", rows, KEEL, DEEP),
            compare("It has a lower test loss than pre-norm.", rows, KEEL, PRE),
        ]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        lines = [Series.of(name, [(depth, skip_bits(name, depth)) for depth in DEPTHS], "theory") for name in SCHEMES]
        figures = [
            Figure(
                name=kind.replace(" ", "-"),
                title=title,
                x_label="residual branches L",
                y_label="log₂ of the ratio of second moments",
                log_x=True,
                series=(
                    *(lines if kind == "skips" else ()),
                    *series_over([row for row in rows if row["kind"] == kind], "depth", "backward", "scheme"),
                ),
                note="Perceptron blocks with LayerNorm at the start. Dashed: closed form." if kind == "skips" else "",
            )
            for kind, title in (("skips", "Gradient along the skips alone"), ("all paths", "Gradient along all paths"))
        ]
        figures.append(
            Figure(
                name="blocks",
                title="Gradient of the first block over that of the last, ViT at the start",
                x_label="transformer blocks",
                y_label="ratio of the norms",
                log_x=True,
                log_y=True,
                series=series_over([r for r in rows if r["kind"] == "blocks"], "depth", "gradient_ratio", "scheme"),
            )
        )
        return [*figures, *super().figures(rows)]


def first_over_last(model: nn.Module, seed: int) -> Row:
    """Measure the gradient norm of all weights of the first block's MLP over that of the last block's."""
    batch = data_of(None).sample(64, seed=seed, device=torch.device("cpu"))
    F.cross_entropy(model(batch.inputs), batch.labels).backward()
    branches = [connection.residual.branch for connection in chain(model)]
    norms = [
        math.hypot(*(float(p.grad.norm()) for p in branch.parameters() if p.grad is not None))
        for branch in (branches[1], branches[-1])
    ]
    return {"gradient_ratio": norms[0] / max(norms[1], 1e-30)}


def passes(rows: Sequence[Row], scheme: str, claim: str) -> Verdict:
    """Judge whether the gradient along the skips agrees with theory, within 10 % or half a bit."""
    own = [row for row in rows if (row["kind"], row["scheme"]) == ("skips", scheme)]
    found = {depth: sample.mean for (depth,), sample in sorted(group_values(own, ["depth"], "backward").items())}
    if not found:
        return Verdict(claim, "open", "not measured")
    fits = [abs(bits - skip_bits(scheme, d)) <= max(0.5, 0.1 * abs(skip_bits(scheme, d))) for d, bits in found.items()]
    text = "; ".join(
        f"L = {depth}: {format_value(bits)}, theory {format_value(skip_bits(scheme, depth))}"
        for depth, bits in found.items()
    )
    return Verdict(claim, "holds" if all(fits) else "does not hold", f"log₂ of the squared gradient, {text}.")


def blocks_starve(rows: Sequence[Row]) -> Verdict:
    """Judge whether post-norm alone leaves the first block with less than half of the last block's gradient."""
    claim = (
        "In a deep ViT at the start, post-norm leaves the first block with less than half of the last block's "
        "gradient, Keel and DeepNorm do not."
    )
    own = [row for row in rows if row["kind"] == "blocks"]
    found = group_values(own, ["scheme", "depth"], "gradient_ratio")
    deepest = max((depth for _, depth in found), default=0)
    if any((name, deepest) not in found for name in (POST, DEEP, KEEL)):
        return Verdict(claim, "open", "not measured")
    text = f"{deepest} blocks, first over last: " + ", ".join(
        f"{name} {format_value(found[name, deepest].mean)}" for name in SCHEMES if (name, deepest) in found
    )
    starved = {name: found[name, deepest].mean < 0.5 for name in (POST, DEEP, KEEL)}
    holds = starved == {POST: True, DEEP: False, KEEL: False}
    return Verdict(claim, "holds" if holds else "does not hold", f"{text}.")


STUDIES.add("keel", KeelStudy())
