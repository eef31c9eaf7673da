"""Branches scaled by depth: with which power does the learning rate of a shallow network suit a deep one?

Claim:    with branches multiplied by 1/m, m the ratio of depths, the best learning rate stays where it is; with 1/√m it
          does not, and without a factor it falls with depth (Dey et al. 2025, "CompleteP").
Source:   Dey et al. 2025, "Don't be lazy: CompleteP enables compute-efficient deep transformers", fig. 2 and 7; Yang et
          al. 2023, "Tensor Programs VI" for 1/√m.
Rule:     the best rate is that of the lowest training loss, a mean over the seeds; it is transferred if at the largest
          depth it differs by one step of the grid, a factor of 2, at most. Coordinates: flat if what five steps of Adam
          change in the last stream, relative to it, differs by a factor of 2 at most between the depths. Fixed before
          the run. The stream starts at unit size, as theory assumes; from ViT's embeddings of 0.02 a first run gave the
          opposite of the claim.
Command:  skipway study depth-transfer
Hardware: two shared cores of a virtual machine, one process each.
Time:     8 minutes of one core (87 cells).
Result:   29 November 2026, digits, 3 seeds, a stream of unit size: with 1/m and with 1/√m five steps change the stream
          alike (by 0.38 to 0.58 and 0.52 to 0.64 with 2 to 32 blocks; 3.1 without a factor), and the best rate of 2
          blocks is that of 12 (without a factor a quarter of it). With it 12 blocks reach a training loss of 0.11 with
          1/m, 0.30 with 1/√m and 0.73 without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from skipway.data import Data
from skipway.depth_transfer.coordinates import measure_coordinates, read_signals
from skipway.optim.groups import param_groups
from skipway.report.chart import Figure, format_value
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.fit import data_of
from skipway.studies.statistics import group_values, series_over
from skipway.studies.study import STUDIES, Verdict
from skipway.studies.variants import (
    NetworkVariant,
    TrainingGrid,
    VariantStudy,
    give_unit_stream_,
    share_base,
    trained_rows,
    transfers,
)
from skipway.tracing.chain import chain

__all__ = ["ImageDepthTransfer"]

BASE = 2
"""Blocks of the network whose learning rate is to hold; there all variants are one network."""
PLAIN, ROOT, INVERSE = "no factor", "1/√m", "1/m"
BRANCHES = 2 * BASE
COORDINATE_DEPTHS = (BASE, 8, 32)
STEPS, RATE = 5, 4e-3
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


class ImageDepthTransfer(VariantStudy):
    """Best learning rates, and the size of the first steps, by depth and power."""

    name = "depth-transfer"
    title = "The learning rate across depths: 1/m or 1/√m?"
    claim = (
        "With branches multiplied by 1/m, m the ratio of depths, the learning rate of a shallow network suits a deep "
        "one; with 1/√m, or no factor, it does not."
    )
    source = "Dey et al. 2025, fig. 2 and 7; Yang et al. 2023"
    results = ("train_loss", "test_loss", "moved", "diverged")
    minutes = "8 minutes of one core"
    variants: ClassVar = {
        PLAIN: NetworkVariant(),
        ROOT: NetworkVariant(f"depthscaled(exponent=0.5, base={BRANCHES})"),
        INVERSE: NetworkVariant(f"depthscaled(exponent=1.0, base={BRANCHES})"),
    }
    grids: ClassVar = {
        "cpu": {"vit": TrainingGrid(depths=(BASE, 12), width=32, epochs=4, rates=RATES)},
        "gpu": {"vit": TrainingGrid(depths=(BASE, 8, 32), width=192, epochs=30, rates=RATES)},
        "paper": {"vit": TrainingGrid(depths=(BASE, 8, 32, 64), width=256, epochs=100, rates=RATES)},
    }

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        names, seeds = choices.schemes or tuple(self.variants), choices.seeds or (0, 1, 2)
        steps = [
            self.cell(kind="coordinates", family="vit", scheme=name, depth=depth, seed=seed, width=32)
            for depth in reversed(choices.depths or COORDINATE_DEPTHS)
            for name in names
            for seed in seeds
        ]
        return [*steps, *share_base(super().cells(budget, choices), BASE, self.variants)]

    def build(self, cell: Cell, data: Data) -> nn.Module:
        """The network, whose stream starts at unit size: from ViT's embeddings of 0.02 what a branch adds turns the
        stream, and so changes what all others read.
        """
        images = data.sample(64, seed=0, device=torch.device("cpu")).inputs
        return give_unit_stream_(super().build(cell, data), images)

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        if cell["kind"] == "train":
            return super().measure(cell, device)
        data = data_of(cell.get("data"))
        torch.manual_seed(cell["seed"])
        model = self.build(cell, data).train()
        batch = data.sample(64, seed=cell["seed"], device=torch.device("cpu"))
        optimizer = torch.optim.AdamW(param_groups(model, lr=RATE))
        connections = tuple(chain(model, batch.inputs))
        before = read_signals(model, connections, batch.inputs, cell["seed"])
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs), batch.labels).backward()
            optimizer.step()
        sizes = measure_coordinates(model, connections, batch.inputs, before, cell["seed"])
        return {"moved": sizes["stream change"] / sizes["stream"]}

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [
            *(stays_flat(rows, name) for name in (INVERSE, ROOT)),
            *(transfers(rows, name, BASE, self.variants) for name in (INVERSE, ROOT, PLAIN)),
        ]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        deepest = max((int(row["depth"] or 0) for row in trained_rows(rows)), default=0)
        shown = [row for row in trained_rows(rows) if row["depth"] == deepest]
        base = [
            {**row, "scheme": f"{BASE} blocks" if row["scheme"] in self.variants else f"{row['scheme']}, {BASE} blocks"}
            for row in trained_rows(rows)
            if row["depth"] == BASE
        ]
        return [
            Figure(
                name="coordinates",
                title=f"Change of the last stream by {STEPS} steps of Adam",
                x_label="transformer blocks",
                y_label="relative change",
                log_x=True,
                series=series_over([r for r in rows if r["kind"] == "coordinates"], "depth", "moved", "scheme"),
            ),
            Figure(
                name="rates",
                title=f"Training loss of {deepest} blocks by learning rate",
                x_label="learning rate",
                y_label="training loss",
                log_x=True,
                series=series_over([*base, *shown], "lr", "train_loss", "scheme"),
            ),
        ]


def stays_flat(rows: Sequence[Row], name: str) -> Verdict:
    """Judge whether the first steps change the last stream by as much at every depth."""
    claim = f"With {name} the first steps change the last stream as much at every depth."
    own = [row for row in rows if (row["kind"], row["scheme"]) == ("coordinates", name)]
    found = {depth: sample.mean for (depth,), sample in sorted(group_values(own, ["depth"], "moved").items())}
    plain = [row for row in rows if (row["kind"], row["scheme"]) == ("coordinates", PLAIN)]
    without = {depth: sample.mean for (depth,), sample in sorted(group_values(plain, ["depth"], "moved").items())}
    if len(found) < 2:
        return Verdict(claim, "open", "not measured at two depths")
    text = (
        f"Relative change: {'; '.join(f'{depth} blocks {format_value(moved)}' for depth, moved in found.items())}; "
        f"without a factor {'; '.join(f'{depth} blocks {format_value(moved)}' for depth, moved in without.items())}."
    )
    flat = max(found.values()) <= 2 * min(found.values())
    return Verdict(claim, "holds" if flat else "does not hold", text)


STUDIES.add("depth-transfer", ImageDepthTransfer())
