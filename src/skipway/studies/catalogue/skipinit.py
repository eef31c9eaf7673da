"""SkipInit: one small scalar per branch in place of BatchNorm.

Claim:    a scalar that starts at 0 or 1/√L lets a ResNet without normalisation train at any depth, nearly as well as
          with BatchNorm; starting at 1, or dividing the sum by √2, fails at a depth of 100 or 1000.
Source:   De & Smith 2020, "Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep Networks",
          tables 1 and 2.
Command:  skipway study skipinit
Hardware: two shared cores of a virtual machine, one process each.
Time:     about 6 minutes (84 cells).
Result:   24 November 2026, digits, width 8, 6 epochs, 3 seeds: at 64 layers α₀ = 0 and 1/√L come within 3 points of
          BatchNorm's 2.6 % (5.4 and 4.5 %), while 0.1 depends on the seed (14.2 ± 13.6 %); α₀ = 1 and the sum divided
          by √2 fail (90 %). Two learning rates are too few to decide which is best.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from skipway.inference.metrics import percent
from skipway.models import build
from skipway.nn import Multiply
from skipway.report.chart import Figure
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.fit import UNKNOWN_CHANCE, FitSettings, data_of, fit, trained_error
from skipway.studies.statistics import SeedValues, best_rate_rows, group_values, series_over
from skipway.studies.study import STUDIES, Published, Study, Verdict
from skipway.tracing.chain import chain

__all__ = ["SkipInitStudy"]

DIVIDED = "sum / √2, no norm"
VARIANTS = {
    "BatchNorm": "identity",
    "BatchNorm, α₀ = 0.1": "skipinit(init=0.1, norm='keep')",
    "α₀ = 0": "skipinit(init=0.0, norm='remove')",
    "α₀ = 0.1": "skipinit(init=0.1, norm='remove')",
    "α₀ = 1/√L": "skipinit(init='depth', norm='remove')",
    "α₀ = 1": "skipinit(init=1.0, norm='remove')",
    DIVIDED: "skipinit(init=1.0, norm='remove')",
}
SMALL = ("α₀ = 0", "α₀ = 0.1", "α₀ = 1/√L")
# depths, width, epochs, learning rates
GRIDS: dict[Budget, tuple[tuple[int, ...], int, int, tuple[float, ...]]] = {
    "cpu": ((16, 64), 8, 6, (0.1, 0.03)),
    "gpu": ((16, 100), 32, 30, (0.5, 0.25, 0.125, 0.03)),
    "paper": ((16, 100, 1000), 32, 200, (0.5, 0.25, 0.125, 0.0625, 0.03125)),
}


class SkipInitStudy(Study):
    """Errors of small and large initial scalars by depth and learning rate."""

    name = "skipinit"
    title = "SkipInit: a small scalar in place of BatchNorm"
    claim = (
        "With a scalar on every branch that starts at 0 or 1/√L, ResNets without normalisation train at any depth, "
        "nearly as well as with BatchNorm; with a start of 1, or the sum divided by √2, deep ResNets fail."
    )
    source = "De & Smith 2020, tables 1-2"
    settings = ("scheme", "depth", "lr", "seed", "width", "epochs", "data")
    results = ("train_error", "test_error", "diverged")
    minutes = "6 minutes on two shared cores"
    published = (
        Published(
            what="WRN-1000-2, α₀ = 0, test error",
            value=0.057,
            where={"scheme": "α₀ = 0", "depth": 1000, "width": 32, "dataset": "cifar10", "epochs": 200},
            column="test_error",
            source="De & Smith 2020, abstract of the first version",
        ),
    )

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        depths, width, epochs, rates = GRIDS[budget]
        return [
            self.cell(scheme=name, depth=depth, lr=rate, seed=seed, width=width, epochs=epochs, data=choices.data)
            for depth in sorted(choices.depths or depths, reverse=True)
            for seed in choices.seeds or (0, 1, 2)
            for name in choices.schemes or VARIANTS
            for rate in rates
        ]

    def dial(self, cell: Cell) -> tuple[str, int]:
        return "wrn", cell["depth"]

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        data = data_of(cell.get("data"))
        torch.manual_seed(cell["seed"])
        model = build(
            "wrn",
            depth=cell["depth"],
            scheme=VARIANTS.get(cell["scheme"], cell["scheme"]),
            width=cell["width"],
            stem_width=min(16, cell["width"]),
            channels=data.channels,
            classes=len(data.classes),
        )
        if cell["scheme"] == DIVIDED:
            divide_sums(model)
        settings = FitSettings(
            epochs=cell["epochs"], lr=cell["lr"], weight_decay=5e-4, batch_size=64, seed=cell["seed"], schedule="cosine"
        )
        return fit(model, data, settings, device)

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        errors = group_values(best_rate_rows(rows), ["scheme", "depth"], "test_error")
        return [small_trains(errors), large_fails(errors, trained_error(rows)), rate_is_lower(rows)]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        chosen = best_rate_rows(rows)
        figures = [
            Figure(
                name=value.replace("_", "-"),
                title=f"{what} at the best learning rate",
                x_label="weight layers",
                y_label=what.lower(),
                log_x=True,
                series=series_over(chosen, "depth", value, "scheme"),
                percent=True,
                note="Learning rate with the lowest mean training error over the seeds.",
            )
            for value, what in (("test_error", "Test error"), ("train_error", "Training error"))
        ]
        deepest = max((int(row["depth"] or 0) for row in rows), default=0)
        figures.append(
            Figure(
                name="rates",
                title=f"Test error by learning rate, {deepest} layers",
                x_label="learning rate",
                y_label="test error",
                log_x=True,
                series=series_over([row for row in rows if row["depth"] == deepest], "lr", "test_error", "scheme"),
                percent=True,
            )
        )
        return figures


def divide_sums(model: nn.Module) -> None:
    """Divide every sum of `model` by √2, in place; the scalars stay at 1 and are not learned."""
    for connection in chain(model):
        connection.residual.scale = nn.Identity()
        connection.residual.post = nn.Sequential(connection.residual.post, Multiply(2**-0.5))


def errors_by_variant(errors: dict[tuple, SeedValues], names: Sequence[str], depth: int) -> str:
    """Format the errors of some variants at a depth."""
    shown = [f"{name} {errors[name, depth].text(percent)}" for name in names if (name, depth) in errors]
    return f"{depth} layers: {', '.join(shown)}"


def small_trains(errors: dict[tuple, SeedValues]) -> Verdict:
    """Compare small initial scalars with BatchNorm at the largest depth."""
    claim = "Without normalisation, a small initial scalar brings the deepest network to within 3 points of BatchNorm."
    depths = sorted({depth for _, depth in errors})
    if not depths or any((name, depths[-1]) not in errors for name in ("BatchNorm", *SMALL)):
        return Verdict(claim, "open", "not measured")
    text = "Test error, " + "; ".join(errors_by_variant(errors, ("BatchNorm", *SMALL), depth) for depth in depths) + "."
    bound = errors["BatchNorm", depths[-1]].mean + 0.03
    good = [name for name in SMALL if errors[name, depths[-1]].mean <= bound]
    if good and len(good) < len(SMALL):
        return Verdict(claim, "holds only when", f"{' or '.join(good)}. {text}")
    return Verdict(claim, "holds" if good else "does not hold", text)


def large_fails(errors: dict[tuple, SeedValues], limit: float | None) -> Verdict:
    """Judge whether initial scalars of 1 fail at the largest depth only."""
    claim = "With an initial scalar of 1, the deepest network trains at no learning rate, while the shallowest trains."
    depths = sorted({depth for name, depth in errors if name == "α₀ = 1"})
    if len(depths) < 2:
        return Verdict(claim, "open", "not measured at two depths")
    if limit is None:
        return Verdict(claim, "open", UNKNOWN_CHANCE)
    text = "Test error, " + "; ".join(errors_by_variant(errors, ("α₀ = 1", DIVIDED), depth) for depth in depths) + "."
    holds = errors["α₀ = 1", depths[-1]].low > limit and errors["α₀ = 1", depths[0]].high < limit
    return Verdict(claim, "holds" if holds else "does not hold", text)


def rate_is_lower(rows: Sequence[Row]) -> Verdict:
    """Compare the best learning rates with and without normalisation."""
    claim = "The best learning rate is lower without normalisation than with it."
    chosen = {(row["scheme"], row["depth"]): float(row["lr"] or 0) for row in best_rate_rows(rows)}
    names = [name for name in ("BatchNorm", *SMALL) if any(key[0] == name for key in chosen)]
    if "BatchNorm" not in names or len(names) < 2:
        return Verdict(claim, "open", "not measured")
    depths = sorted({int(depth or 0) for _, depth in chosen})
    text = "; ".join(
        f"{depth} layers: " + ", ".join(f"{name} {chosen[name, depth]:g}" for name in names if (name, depth) in chosen)
        for depth in depths
    )
    pairs = [
        (rate, chosen["BatchNorm", depth])
        for (name, depth), rate in chosen.items()
        if name in SMALL and ("BatchNorm", depth) in chosen
    ]
    lower, higher = [own < with_norm for own, with_norm in pairs], [own > with_norm for own, with_norm in pairs]
    if lower and all(lower):
        return Verdict(claim, "holds", f"{text}.")
    return Verdict(claim, "does not hold" if any(higher) or not any(lower) else "open", f"{text}.")


STUDIES.add("skipinit", SkipInitStudy())
