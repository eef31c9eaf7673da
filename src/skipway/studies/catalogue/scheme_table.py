"""Every scheme on one ViT and one ResNet: which lower the loss of the plain residual connection?

Claim:    each scheme's paper reports a gain over the plain residual connection of its family.
Source:   the papers of `skipway schemes`.
Rule:     test loss, each scheme at the learning rate with its lowest mean training loss; a difference from the plain
          residual connection counts if the 95 % interval of its mean over paired seeds excludes 0. With so many schemes
          one or two differ by chance: the table is an overview, no ranking. Fixed before the run.
Command:  skipway study scheme-table
Hardware: two shared cores of a virtual machine, one process each.
Time:     17 minutes of two cores on a loaded machine (348 cells).
Result:   29 November 2026, digits, ViT of 4 blocks and 5 epochs, ResNet of 6 branches and 3 epochs, 3 seeds: in the ViT
          LayerScale and 1/√L lower the test loss of the plain connection, Fixup and DyT raise it. In the ResNet hyper-
          connections lower it a little, and sixteen schemes raise it, the silent ones most: three epochs are too few
          for branches that start at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from skipway.report.chart import Figure
from skipway.schemes import all_schemes
from skipway.studies.cell import Row
from skipway.studies.statistics import group_losses, group_values
from skipway.studies.study import STUDIES, Verdict
from skipway.studies.variants import (
    FAMILIES,
    NetworkVariant,
    TrainingGrid,
    VariantStudy,
    differences_from,
    lowest_rate_rows,
)

__all__ = ["SchemeTable"]

PLAIN = "identity"
# warm-ups of a whole number of steps are meant for longer trainings
SPECS = {"prores": "prores(0.25)"}


class SchemeTable(VariantStudy):
    """Losses of all schemes, with their defaults, in a ViT and in a ResNet."""

    name = "scheme-table"
    title = "Every scheme on one ViT and one ResNet"
    claim = "The schemes lower the loss of the plain residual connection."
    source = "the schemes' papers"
    minutes = "34 minutes of one core under load"
    variants: ClassVar = {name: NetworkVariant(SPECS.get(name, name)) for name in all_schemes()}
    grids: ClassVar = {
        "cpu": {
            "vit": TrainingGrid(depths=(4,), width=32, epochs=5, rates=(3e-3, 1e-2)),
            "resnet": TrainingGrid(depths=(6,), width=8, epochs=3, rates=(0.03, 0.1)),
        },
        "gpu": {
            "vit": TrainingGrid(depths=(12,), width=192, epochs=60, rates=(1e-3, 3e-3)),
            "resnet": TrainingGrid(depths=(18,), width=16, epochs=60, rates=(0.03, 0.1, 0.3)),
        },
        "paper": {
            "vit": TrainingGrid(depths=(12,), width=384, epochs=300, rates=(1e-3, 3e-3)),
            "resnet": TrainingGrid(depths=(54,), width=16, epochs=164, rates=(0.03, 0.1, 0.3)),
        },
    }

    def names(self, family: str) -> Sequence[str]:
        """Return the schemes that the family takes."""
        if family == "resnet":
            return list(all_schemes("conv"))
        mlp = all_schemes("mlp")
        return [name for name in all_schemes("attention") if name in mlp]

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [better_than_plain(rows, family) for family in FAMILIES]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        return []

    def summary(self, rows: Sequence[Row]) -> list[Row]:
        """One row per scheme: loss, difference from the plain connection and error, in each network."""
        lines: dict[str, Row] = {}
        for family, title in FAMILIES.items():
            own = [row for row in lowest_rate_rows(rows) if row["family"] == family]
            found, several = differences_from(own, PLAIN), len({row["depth"] for row in own}) > 1
            errors = group_values(own, ["scheme", "depth"], "test_error")
            losses = group_losses(own, ["scheme", "depth"], "test_loss")
            for (name, depth), loss in sorted(losses.items(), key=lambda each: each[1].mean):
                suffix = f", {depth} blocks" if several else ""
                line = lines.setdefault(str(name), {"scheme": str(name)})
                line[f"{title}{suffix}: test loss"] = loss.text().partition(" (")[0]
                line[f"{title}{suffix}: minus plain"] = str(found.get(f"{name}{suffix}", ""))
                line[f"{title}{suffix}: test error"] = f"{100 * errors[name, depth].mean:.1f} %"
        return list(lines.values())


def better_than_plain(rows: Sequence[Row], family: str) -> Verdict:
    """Judge which schemes have a lower test loss than the plain residual connection."""
    title = FAMILIES[family]
    claim = f"In a small {title} every scheme lowers the test loss of the plain residual connection."
    own = [row for row in lowest_rate_rows(rows) if row["family"] == family]
    signs = {name: found.sign for name, found in differences_from(own, PLAIN).items()}
    if len(signs) < 3:
        return Verdict(claim, "open", "not measured with two seeds")
    lower, higher, same = ([name for name, sign in signs.items() if sign == wanted] for wanted in (-1, 1, 0))
    text = (
        f"Lower: {', '.join(lower) or 'none'}. Higher: {', '.join(higher) or 'none'}. "
        f"Not different: {', '.join(same) or 'none'}."
    )
    if lower and len(lower) < len(signs):
        return Verdict(claim, "holds only when", f"the scheme is {', '.join(lower)}. {text}")
    return Verdict(claim, "holds" if lower else "does not hold", text)


STUDIES.add("scheme-table", SchemeTable())
