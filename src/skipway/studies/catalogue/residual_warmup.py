"""Progressive residual warm-up: the order in which branches are switched on, and post-norm's rescue.

Claim:    switching branches on one after the other lowers the loss, first blocks first ("linear"); all at once
          ("equal") gains nothing, last blocks first ("reverse") does harm; post-norm trains far better with
          "linear-square" and diverges with "equal" and "reverse".
Source:   Chen et al. 2026, "Progressive Residual Warmup for Language Model Pretraining", tables 1, 2, 5 and 6.
Rule:     test loss, each variant at the learning rate with its lowest mean training loss; a difference counts if the
          95 % interval of its mean over paired seeds excludes 0. Fixed before the run,
          but for the seeds: three more were added when three had left the losses open.
Command:  skipway study residual-warmup
Hardware: two shared cores of a virtual machine, one process each.
Time:     29 minutes of one core on a loaded machine (96 cells).
Result:   29 November 2026, digits, ViT of 12 blocks, 6 epochs, 6 seeds (`--seeds 0,1,2,3,4,5`): with pre-norm equal is
          better than reverse by 0.41 ± 0.21, and reverse worse than no warm-up by 0.46 ± 0.28; that linear lowers the
          loss stays open (by 0.14 ± 0.33). Of post-norm nothing can be said, and nothing diverged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from skipway.studies.cell import Row
from skipway.studies.study import STUDIES, Verdict
from skipway.studies.variants import NetworkVariant, TrainingGrid, VariantStudy, compare

__all__ = ["ResidualWarmupStudy"]

SHARE = 0.25
"""Part of the training after which the last block is at its full size."""


def named(place: str, schedule: str | None = None) -> str:
    """Name of a variant."""
    return f"{place}, {schedule or 'no warm-up'}"


def dressed(place: str, schedule: str | None = None) -> NetworkVariant:
    """The variant with a schedule."""
    scheme = f"prores(warmup={SHARE}, schedule={schedule!r})" if schedule else "identity"
    return NetworkVariant(scheme, {"norm": place.removesuffix("-norm")})


PRE, POST = "pre-norm", "post-norm"
SCHEDULES = {PRE: (None, "linear", "equal", "reverse"), POST: (None, "linear-square", "equal", "reverse")}


class ResidualWarmupStudy(VariantStudy):
    """Losses of ViTs with pre-norm and post-norm whose branches are switched on in several orders."""

    name = "residual-warmup"
    title = "Progressive residual warm-up: order and norm placement"
    claim = (
        "Branches that are switched on one after the other, first blocks first, lower the loss; all at once or last "
        "blocks first do not; post-norm is rescued."
    )
    source = "Chen et al. 2026, tables 1, 2, 5 and 6"
    minutes = "29 minutes of one core under load"
    variants: ClassVar = {
        named(place, schedule): dressed(place, schedule)
        for place, schedules in SCHEDULES.items()
        for schedule in schedules
    }
    grids: ClassVar = {
        "cpu": {"vit": TrainingGrid(depths=(12,), width=32, epochs=6, rates=(2e-3, 6e-3))},
        "gpu": {"vit": TrainingGrid(depths=(12, 48), width=192, epochs=60, rates=(1e-3, 3e-3))},
        "paper": {"vit": TrainingGrid(depths=(12, 24, 72), width=384, epochs=300, rates=(1e-3, 2e-3))},
    }

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        linear, equal, reverse = (named(PRE, schedule) for schedule in ("linear", "equal", "reverse"))
        square = named(POST, "linear-square")
        return [
            compare("With pre-norm, linear lowers the loss.", rows, linear, named(PRE)),
            compare("With pre-norm, linear is better than equal.", rows, linear, equal),
            compare("With pre-norm, equal is better than reverse.", rows, equal, reverse),
            compare("With pre-norm, reverse is worse than no warm-up.", rows, named(PRE), reverse),
            compare("With post-norm, linear-square lowers the loss.", rows, square, named(POST)),
            compare("With post-norm, linear-square is better than equal.", rows, square, named(POST, "equal")),
            compare("With post-norm, linear-square is better than reverse.", rows, square, named(POST, "reverse")),
        ]


STUDIES.add("residual-warmup", ResidualWarmupStudy())
