"""Where the norm stands in a decoder: before the branch, after it, both (Peri-LN), after the addition; by depth and
rate.

Claim:    without a long warm-up, a deep decoder trains with its norm before the branch and not after the addition
          (Xiong et al. 2020); with a norm at the branch's end, too, it tolerates higher rates and reaches a lower loss
          (Kim et al. 2025).
Source:   Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", sec. 3; Kim et al. 2025,
          "Peri-LN", tables 1 and 2. Its network is that of the sandwich (Ding et al. 2021, "CogView") with a gain that
          learns.
Rule:     a difference counts if the 95 % interval of its mean over paired seeds excludes 0, each variant at its best
          rate; a variant tolerates a rate if its training loss there is at most 0.1 above that of its best rate. Fixed
          before the run.
Command:  skipway study text-norms
Hardware: two shared cores of a virtual machine, one process each.
Time:     12 minutes on a heavily loaded machine (48 cells).
Result:   29 November 2026, bytes of Python's standard library, 250 steps, 3 seeds: pre-norm is better than post-norm
          with 3 and 10 blocks (test loss lower by 0.17 ± 0.08 and 0.47 ± 0.10); Peri-LN is worse than pre-norm with 3
          (0.13 ± 0.04), not told apart with 10, and tolerates no higher rate: 250 steps are short for its claim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from skipway.report.chart import format_value
from skipway.studies.cell import Row
from skipway.studies.statistics import group_losses
from skipway.studies.study import STUDIES, Verdict
from skipway.studies.text import TextGrid, TextStudy
from skipway.studies.variants import NetworkVariant, compare, trained_rows

__all__ = ["TextNorms"]

PRE, POST, OUTPUT, PERI = "pre-norm", "post-norm", "output norm", "Peri-LN"
TOLERANCE = 0.1


class TextNorms(TextStudy):
    """Losses by position of the norm."""

    name = "text-norms"
    title = "Position of the norm in a decoder"
    claim = (
        "A deep decoder trains with its norm before the branch and not after the addition; a norm at the branch's end, "
        "too, lets it tolerate higher rates and reach a lower loss."
    )
    source = "Xiong et al. 2020, sec. 3; Kim et al. 2025, tables 1 and 2"
    minutes = "12 minutes on two shared cores under heavy load"
    variants: ClassVar = {
        PRE: NetworkVariant(),
        POST: NetworkVariant(options={"norm": "post"}),
        OUTPUT: NetworkVariant(options={"norm": "respost"}),
        PERI: NetworkVariant("perinorm"),
    }
    text_grids: ClassVar = {
        "cpu": TextGrid(depths=(3, 10), rates=(2e-3, 8e-3)),
        "gpu": TextGrid(depths=(6, 12, 24), rates=(1e-3, 2e-3, 4e-3, 8e-3), width=256, context=256, steps=4000),
        "paper": TextGrid(depths=(12, 24, 48), rates=(1e-3, 2e-3, 4e-3), width=768, context=1024, steps=50_000),
    }

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [
            compare("At the same depth pre-norm has a lower test loss than post-norm.", rows, PRE, POST),
            compare("Peri-LN has a lower test loss than pre-norm.", rows, PERI, PRE),
            compare("Peri-LN has a lower test loss than a norm at the branch's end alone.", rows, PERI, OUTPUT),
            tolerates_higher_rates(rows),
        ]


def tolerates_higher_rates(rows: Sequence[Row]) -> Verdict:
    """Judge whether the deep network with Peri-LN tolerates a higher rate than that with pre-norm."""
    claim = "In the deeper network Peri-LN tolerates higher rates than pre-norm."
    deepest = max((int(row["depth"] or 0) for row in trained_rows(rows)), default=0)
    own = [row for row in trained_rows(rows) if row["depth"] == deepest]
    losses = {key: sample.mean for key, sample in group_losses(own, ["scheme", "lr"], "train_loss").items()}
    highest = {}
    for name in (PRE, POST, PERI):
        found = {float(rate): loss for (scheme, rate), loss in losses.items() if scheme == name}
        if len(found) < 2:
            return Verdict(claim, "open", "not measured at two rates")
        best = min(found.values())
        tolerated = (rate for rate, loss in found.items() if math.isfinite(loss) and loss <= best + TOLERANCE)
        highest[name] = max(tolerated, default=0.0)
    text = f"{deepest} blocks, highest rate within {TOLERANCE} nats of the best: " + ", ".join(
        f"{name} {format_value(rate) if rate else 'none'}" for name, rate in highest.items()
    )
    return Verdict(claim, "holds" if highest[PERI] > highest[PRE] else "does not hold", f"{text}.")


STUDIES.add("text-norms", TextNorms())
