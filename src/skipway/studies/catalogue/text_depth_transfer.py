"""Depth-scaled branches in a decoder: with which power does the learning rate of a shallow one suit a deep one?

Claim:    with branches multiplied by 1/m, m the ratio of depths, and the rates that go with it, the best learning rate
          of a shallow language model is that of a deep one; with 1/√m, or no factor, it is not (Dey et al. 2025,
          "CompleteP").
Source:   Dey et al. 2025, fig. 2, on decoders of 2 to 128 layers; Yang et al. 2023, "Tensor Programs VI" for 1/√m.
Rule:     the best rate is that of the lowest training loss, a mean over the seeds; it is transferred if at the largest
          depth it differs by one step of the grid, a factor of 2, at most. Fixed before the run.
Command:  skipway study text-depth-transfer
Hardware: two shared cores of a virtual machine, one process each.
Time:     29 minutes on a heavily loaded machine (48 cells).
Result:   29 November 2026, bytes of Python's standard library, 200 steps, 3 seeds: with 2 and 8 blocks the best rate is
          the same in all variants but for one step of the grid (0.004; 1/√m 0.008), so no factor is needed for it at
          this ratio; 1/√m reaches a lower training loss (2.65) than 1/m (2.80) and no factor (2.84).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from skipway.data.text import TextData
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.study import STUDIES, Verdict
from skipway.studies.text import TextGrid, TextStudy
from skipway.studies.variants import NetworkVariant, compare, give_unit_stream_, share_base, transfers

__all__ = ["TextDepthTransfer"]

BASE = 2
"""Blocks of the network whose learning rate is to hold; there all variants are one network."""
PLAIN, ROOT, INVERSE = "no factor", "1/√m", "1/m"
UNTIED = {"tied": False}
"""An embedding of unit size is too large a classifier."""
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


class TextDepthTransfer(TextStudy):
    """Best learning rates of decoders by depth and power."""

    name = "text-depth-transfer"
    title = "The learning rate across depths in a decoder: 1/m or 1/√m?"
    claim = (
        "With branches multiplied by 1/m, m the ratio of depths, the learning rate of a shallow language model suits a "
        "deep one; with 1/√m, or no factor, it does not."
    )
    source = "Dey et al. 2025, fig. 2; Yang et al. 2023"
    minutes = "29 minutes on two shared cores under heavy load"
    variants: ClassVar = {
        PLAIN: NetworkVariant(options=UNTIED),
        ROOT: NetworkVariant(f"depthscaled(exponent=0.5, base={2 * BASE})", UNTIED),
        INVERSE: NetworkVariant(f"depthscaled(exponent=1.0, base={2 * BASE})", UNTIED),
    }
    revision = 2
    text_grids: ClassVar = {
        "cpu": TextGrid(depths=(BASE, 8), rates=RATES[:4], steps=200),
        "gpu": TextGrid(depths=(BASE, 8, 32), rates=RATES, width=256, context=256, steps=4000),
        "paper": TextGrid(depths=(BASE, 8, 32, 64), rates=RATES, width=256, context=1024, steps=20_000),
    }

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        return share_base(super().cells(budget, choices), BASE, self.variants)

    def decoder(self, cell: Cell, data: TextData) -> nn.Module:
        """The network, whose stream starts at unit size, as theory assumes."""
        return give_unit_stream_(super().decoder(cell, data), data.train_batch(0, 0, 16)[0])

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [
            *(transfers(rows, name, BASE, self.variants) for name in (INVERSE, ROOT, PLAIN)),
            compare("With 1/m a lower training loss is reached than with 1/√m.", rows, INVERSE, ROOT, "train_loss"),
        ]


STUDIES.add("text-depth-transfer", TextDepthTransfer())
