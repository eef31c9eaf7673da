"""Dense connections over depth: fixed mixtures of earlier outputs against mixtures that depend on the token.

Claim:    fixed mixtures of all earlier blocks gain nothing over pre-norm (1.767 and 1.766), mixtures that depend on the
          token do: attention residuals 1.737 (Kimi Team 2026); DenseFormer's own paper reports a gain.
Source:   Kimi Team 2026, "Attention Residuals", table 4; Pagliardini et al. 2024, "DenseFormer"; Xiao et al. 2025,
          "MUDDFormer".
Rule:     test loss, each variant at the learning rate with its lowest mean training loss; a difference counts if the
          95 % interval of its mean over paired seeds excludes 0. Fixed before the run.
Command:  skipway study dense-mixing
Hardware: two shared cores of a virtual machine, one process each.
Time:     18 minutes of one core on a loaded machine (50 cells).
Result:   29 November 2026, digits, ViT of 6 blocks, 8 epochs, 5 seeds: fixed mixtures (DenseFormer) lower the test loss
          by 0.10 ± 0.06, attention residuals by 0.07 ± 0.04; of MUDD and of x₀ scalars five seeds show nothing. That
          dynamic mixtures are better than fixed ones did not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from skipway.studies.cell import Row
from skipway.studies.study import STUDIES, Verdict
from skipway.studies.variants import NetworkVariant, TrainingGrid, VariantStudy, compare

__all__ = ["DenseMixing"]

PLAIN, STATIC, DYNAMIC, ATTENTION, STEM = "pre-norm", "DenseFormer", "MUDD", "attention residuals", "x₀ residual"
SEEDS = (0, 1, 2, 3, 4)


class DenseMixing(VariantStudy):
    """Losses of ViTs whose blocks read earlier outputs."""

    name = "dense-mixing"
    title = "Reading earlier outputs: fixed and dynamic mixtures"
    claim = "Fixed mixtures of earlier blocks gain nothing over pre-norm; mixtures that depend on the token do."
    source = "Kimi Team 2026, table 4; Pagliardini et al. 2024; Xiao et al. 2025"
    minutes = "18 minutes of one core under load"
    variants: ClassVar = {
        PLAIN: NetworkVariant(),
        STATIC: NetworkVariant("denseformer"),
        DYNAMIC: NetworkVariant("mudd"),
        ATTENTION: NetworkVariant("attentionresiduals(blocks=None)"),
        STEM: NetworkVariant("x0residual"),
    }
    grids: ClassVar = {
        "cpu": {"vit": TrainingGrid(depths=(6,), width=32, epochs=8, rates=(3e-3, 1e-2), seeds=SEEDS)},
        "gpu": {"vit": TrainingGrid(depths=(12, 24), width=192, epochs=60, rates=(1e-3, 3e-3), seeds=SEEDS)},
        "paper": {"vit": TrainingGrid(depths=(12, 24, 48), width=384, epochs=300, rates=(1e-3, 3e-3))},
    }

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [
            compare("Fixed mixtures (DenseFormer) lower the test loss.", rows, STATIC, PLAIN),
            compare("Mixtures that depend on the token (MUDD) lower the test loss.", rows, DYNAMIC, PLAIN),
            compare("Attention residuals lower the test loss.", rows, ATTENTION, PLAIN),
            compare("Reading the stem's output again (x₀) lowers the test loss.", rows, STEM, PLAIN),
            compare("Mixtures that depend on the token are better than fixed ones.", rows, DYNAMIC, STATIC),
        ]


STUDIES.add("dense-mixing", DenseMixing())
