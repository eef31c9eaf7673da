"""Number of streams in hyper-connections: one is worse than none, several are better.

Claim:    dynamic hyper-connections with one stream are worse than the plain residual connection, with two or four they
          are better (language models of 1B); static ones with two streams gain 1.2 points in a ViT.
Source:   Zhu et al. 2025, "Hyper-Connections", tables 1, 2 and 5.
Rule:     test loss, each variant at the learning rate with its lowest mean training loss; a difference counts if the
          95 % interval of its mean over paired seeds excludes 0. Fixed before the run.
Command:  skipway study streams
Hardware: two shared cores of a virtual machine, one process each.
Time:     25 minutes of one core on a loaded machine (70 cells).
Result:   29 November 2026, digits, ViT of 6 blocks, 10 epochs, 5 seeds: two dynamic streams lower the test loss from
          0.210 to 0.146, and so, up to the spread of the seeds, do one (0.146) and four (0.154), and static weights
          with one, two and four (0.153, 0.147, 0.142). That one stream is worse than none does not show; that more than
          one are needed does not either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from skipway.studies.cell import Row
from skipway.studies.study import STUDIES, Published, Verdict
from skipway.studies.variants import NetworkVariant, TrainingGrid, VariantStudy, compare

__all__ = ["StreamCount"]

NONE = "no hyper-connections"
COUNTS = (1, 2, 4)
SEEDS = (0, 1, 2, 3, 4)


def dynamic(count: int) -> str:
    """Name of the variant with dynamic weights."""
    return f"dynamic, n = {count}"


def static(count: int) -> str:
    """Name of the variant with static weights."""
    return f"static, n = {count}"


class StreamCount(VariantStudy):
    """Losses of a ViT with 1, 2 and 4 streams, static and dynamic."""

    name = "streams"
    title = "Hyper-connections: how many streams?"
    claim = (
        "Hyper-connections with one stream are worse than the plain residual connection; with two and four streams "
        "they are better."
    )
    source = "Zhu et al. 2025, tables 1, 2 and 5"
    minutes = "25 minutes of one core under load"
    variants: ClassVar = {
        NONE: NetworkVariant(),
        **{dynamic(count): NetworkVariant(f"hyperconnections({count})") for count in COUNTS},
        **{static(count): NetworkVariant(f"hyperconnections({count}, dynamic=False)") for count in COUNTS},
    }
    grids: ClassVar = {
        "cpu": {"vit": TrainingGrid(depths=(6,), width=32, epochs=10, rates=(3e-3, 1e-2), seeds=SEEDS)},
        "gpu": {"vit": TrainingGrid(depths=(6, 12), width=192, epochs=60, rates=(1e-3, 3e-3), seeds=SEEDS)},
        "paper": {"vit": TrainingGrid(depths=(12, 24), width=768, epochs=300, rates=(3e-3,))},
    }
    published = tuple(
        Published(
            what=f"ViT-B/16, 300 epochs, {name}, test error on ImageNet",
            value=error,
            where={"scheme": name, "depth": 12, "width": 768, "dataset": "imagenet"},
            column="test_error",
            source="Zhu et al. 2025, table 5, from secondary notes",
        )
        for name, error in ((NONE, 0.2362), (static(2), 0.2240), (dynamic(2), 0.2274))
    )

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [
            compare("One dynamic stream is worse than no hyper-connections.", rows, NONE, dynamic(1)),
            compare("Two dynamic streams are better than no hyper-connections.", rows, dynamic(2), NONE),
            compare("Four dynamic streams are better than no hyper-connections.", rows, dynamic(4), NONE),
            compare("Two static streams are better than no hyper-connections.", rows, static(2), NONE),
            compare("Four dynamic streams are better than one.", rows, dynamic(4), dynamic(1)),
        ]


STUDIES.add("streams", StreamCount())
