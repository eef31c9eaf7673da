"""GPT-2's start: the last map of every branch divided by √L.

Claim:    "weights of residual layers at initialization by a factor of 1/√N where N is the number of residual layers"
          (Radford et al. 2019, sec. 2.3) keep the stream from growing with depth and help training.
Source:   Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", sec. 2.3; the closed forms are
          ours.
Rule:     what all branches add to the stream's second moment at the start is in proportion to L in theory where they
          start alike, and the same at every depth with the division; holds if the ratio of the largest and the smallest
          depth is that within 20 %. Losses: a difference counts if the 95 % interval of its mean over paired seeds
          excludes 0, each variant at its best rate. Fixed before the run.
Command:  skipway study text-starts
Hardware: two shared cores of a virtual machine, one process each.
Time:     5 minutes on a loaded machine (48 cells).
Result:   29 November 2026, bytes of Python's standard library, 3 seeds: divided, the branches add as much with 24
          blocks as with 2 (1.1 times); all alike they add 16 times as much, where independent ones would add 12 times.
          Losses after 250 steps are not told apart with 3 and 10 blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from skipway.report.chart import Figure, format_value
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.statistics import group_values, series_over
from skipway.studies.study import STUDIES, Verdict
from skipway.studies.text import TextGrid, TextStudy, text_of
from skipway.studies.variants import NetworkVariant, compare

__all__ = ["TextStarts"]

SAME, DIVIDED = "all alike", "divided by √L"
DEPTHS = (2, 6, 12, 24)
WIDTH, CONTEXT = 128, 64


class TextStarts(TextStudy):
    """What branches add to the stream at the start, and losses, with and without the division."""

    name = "text-starts"
    title = "GPT-2's start: 1/√L in the last map of every branch"
    claim = "Dividing the last map of every branch by √L at the start keeps the stream from growing and helps training."
    source = "Radford et al. 2019, sec. 2.3"
    minutes = "5 minutes on two shared cores under load"
    results = ("added", "train_loss", "test_loss", "diverged")
    variants: ClassVar = {SAME: NetworkVariant(), DIVIDED: NetworkVariant("depthscaled(how='init')")}
    text_grids: ClassVar = {
        "cpu": TextGrid(depths=(3, 10), rates=(4e-3, 8e-3)),
        "gpu": TextGrid(depths=(6, 24), rates=(1e-3, 2e-3, 4e-3), width=256, context=256, steps=4000),
        "paper": TextGrid(depths=(12, 24, 48), rates=(6e-4, 1.2e-3), width=768, context=1024, steps=50_000),
    }

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        starts = [
            self.cell(kind="start", family="GPT", scheme=name, depth=depth, seed=seed, width=WIDTH, context=CONTEXT)
            for depth in reversed(DEPTHS)
            for name in choices.schemes or tuple(self.variants)
            for seed in choices.seeds or (0, 1, 2)
        ]
        return [*starts, *super().cells(budget, choices)]

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        if cell["kind"] == "train":
            return super().measure(cell, device)
        data = text_of(cell.get("data"), cell["context"])
        torch.manual_seed(cell["seed"])
        model = self.decoder(cell, data)
        streams = [model.stem(data.train_batch(0, 0, 32, seed=cell["seed"])[0])]  # type: ignore[operator]
        with torch.no_grad():
            for block in model.blocks:  # type: ignore[union-attr]
                streams.append(block(streams[-1]))  # type: ignore[operator]
        moments = [float(stream.detach().square().mean()) for stream in streams]
        return {"added": moments[-1] - moments[0]}

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [
            grows(rows, SAME, "Without the division all branches together add L times as much as one."),
            grows(rows, DIVIDED, "With it they add as much as one."),
            compare("At the same depth the network that starts divided has a lower test loss.", rows, DIVIDED, SAME),
        ]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        return [
            Figure(
                name="added",
                title="What all branches add to the stream at the start",
                x_label="transformer blocks",
                y_label="second moment",
                log_x=True,
                log_y=True,
                series=series_over([row for row in rows if row["kind"] == "start"], "depth", "added", "scheme"),
            ),
            *super().figures(rows),
        ]


def grows(rows: Sequence[Row], name: str, claim: str) -> Verdict:
    """Judge whether what is added grows with depth as theory says: in proportion to it, or not at all."""
    own = [row for row in rows if (row["kind"], row["scheme"]) == ("start", name)]
    found = {depth: sample.mean for (depth,), sample in sorted(group_values(own, ["depth"], "added").items())}
    if len(found) < 2:
        return Verdict(claim, "open", "not measured at two depths")
    low, high = min(found), max(found)
    ratio, expected = found[high] / found[low], high / low if name == SAME else 1.0
    text = f"From {low} to {high} blocks {format_value(ratio)} times as much, theory {format_value(expected)}."
    return Verdict(claim, "holds" if abs(ratio / expected - 1) <= 0.2 else "does not hold", text)


STUDIES.add("text-starts", TextStarts())
