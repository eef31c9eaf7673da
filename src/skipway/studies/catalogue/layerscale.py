"""LayerScale: learning rate and initial γ by depth, with AdamW and with SGD.

Claim:    one small learned gain per channel of every branch lets deep transformers train, at more learning rates, and
          should start smaller, the deeper the network is; it suits AdamW, whereas SGD hardly moves a tiny γ.
Source:   Touvron et al. 2021, "Going Deeper with Image Transformers" (CaiT), eq. 4, sec. 2 and table 1; initial γ of
          ConvNeXt from Liu et al. 2022, "A ConvNet for the 2020s".
Command:  skipway study layerscale
Hardware: two shared cores of a virtual machine, one process each.
Time:     about 8 minutes (270 cells), estimated from single cells; 18 minutes on a loaded machine.
Result:   27 November 2026, digits, 3 seeds, 3 learning rates: a ViT of 24 blocks has 4.6 % test error with γ₀ = 1e-4
          and 23.8 % without LayerScale; γ₀ = 0.1 is not enough (18.3 %). ConvNeXt and ResNet gain nothing at their best
          learning rates, but these shift: a ResNet with SGD and γ₀ = 1e-6 fails at 0.03 (65.3 %, 8.4 % without) and
          trains at 0.3 (5.9 %, 75.4 % without). SGD does move γ from its initial value, to 0.03 and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import nn

from skipway.data import Data
from skipway.inference.metrics import percent
from skipway.models import build
from skipway.nn import Gain, XavierNormal
from skipway.report.chart import Figure, Point, Series, format_value
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.fit import FitSettings, data_of, fit, restart_
from skipway.studies.statistics import SeedValues, best_rate_rows, group_values, series_over
from skipway.studies.study import STUDIES, Published, Study, Verdict
from skipway.tracing.chain import chain

__all__ = ["LayerScaleStudy"]

NONE = "no LayerScale"
STARTS = {"γ₀ = 1": 1.0, "γ₀ = 0.1": 0.1, "γ₀ = 1e-4": 1e-4, "γ₀ = 1e-6": 1e-6}
SMALL = tuple(STARTS)[1:]
# with that of the paper for 24 blocks
PAPER_STARTS = {**STARTS, "γ₀ = 1e-5": 1e-5}
TITLES = {"vit": "ViT, AdamW", "convnext": "ConvNeXt, AdamW", "resnet": "ResNet, SGD"}
RATES = {"vit": (1e-3, 4e-3, 1.6e-2), "convnext": (1e-3, 4e-3, 1.6e-2), "resnet": (0.03, 0.1, 0.3)}
# depths in blocks, width and epochs of each family
GRIDS: dict[Budget, tuple[tuple[int, ...], dict[str, tuple[int, int]]]] = {
    "cpu": ((4, 24), {"vit": (32, 4), "convnext": (16, 4), "resnet": (8, 3)}),
    "gpu": ((4, 12, 24, 48), {"vit": (192, 40), "convnext": (48, 40), "resnet": (16, 40)}),
    "paper": ((12, 18, 24, 36), {"vit": (384, 300), "convnext": (96, 300), "resnet": (16, 164)}),
}


class LayerScaleStudy(Study):
    """Errors with and without small learned gains, by family, depth and learning rate."""

    name = "layerscale"
    title = "LayerScale: learning rate and initial γ by depth"
    claim = (
        "A small learned gain per channel of every branch lets deep transformers train, and at more learning rates; it "
        "suits AdamW, whereas SGD hardly moves a tiny γ."
    )
    source = "Touvron et al. 2021, sec. 2 and table 1"
    settings = ("family", "scheme", "depth", "lr", "seed", "width", "epochs", "data")
    results = ("train_error", "test_error", "gain", "diverged")
    minutes = "8 minutes on two cores, 18 under load"
    published = tuple(
        Published(
            what=f"DeiT-S of {depth} blocks, {what}, test error on ImageNet",
            value=error,
            where={"family": "vit", "scheme": scheme, "depth": depth, "width": 384, "dataset": "imagenet"},
            column="test_error",
            source="Touvron et al. 2021, table 1, from secondary notes",
        )
        for depth, what, scheme, error in (
            (24, "no LayerScale", NONE, 0.190),
            (24, "LayerScale", "γ₀ = 1e-5", 0.176),
            (36, "no LayerScale", NONE, 0.181),
            (36, "LayerScale", "γ₀ = 1e-6", 0.171),
        )
    )

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        depths, families = GRIDS[budget]
        schemes = choices.schemes or (NONE, *(PAPER_STARTS if budget == "paper" else STARTS))
        return [
            self.cell(
                family=family, scheme=name, depth=depth, lr=rate, seed=seed, width=width, epochs=epochs,
                data=choices.data,
            )
            for depth in sorted(choices.depths or depths, reverse=True)
            for seed in choices.seeds or (0, 1, 2)
            for family, (width, epochs) in families.items()
            for name, rate in product(schemes, RATES[family])
        ]  # fmt: skip

    def dial(self, cell: Cell) -> tuple[str, int] | None:
        return ("resnet", 2 * cell["depth"] + 2) if cell["family"] == "resnet" else None

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        data = data_of(cell.get("data"))
        torch.manual_seed(cell["seed"])
        model = build_layerscale_network(cell, data)
        gains = [c.residual.scale.gain for c in chain(model) if isinstance(c.residual.scale, Gain)]
        means: list[float] = []

        def watch(epoch: int) -> None:
            if gains:
                means.append(float(torch.cat([gain.detach().flatten() for gain in gains]).abs().mean()))

        adam = cell["family"] != "resnet"
        settings = FitSettings(
            epochs=cell["epochs"],
            lr=cell["lr"],
            batch_size=64 if data.size < 32 else 128,
            optimizer="adamw" if adam else "sgd",
            weight_decay=0.05 if adam else 1e-4,
            warmup=0.1,
            clip=1.0 if adam else None,
            seed=cell["seed"],
        )
        row = fit(model, data, settings, device, watch)
        if gains:
            row["gain"] = means[-1]
            row["gains_by_epoch"] = " ".join(f"{mean:.4g}" for mean in means)
            row["gains"] = " ".join(f"{float(gain.detach().abs().mean()):.4g}" for gain in gains)
        return row

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [more_rates(rows), small_gain_helps(rows), start_matters(rows), sgd_learns_worse(rows), gain_moves(rows)]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        deepest = max((int(row["depth"] or 0) for row in rows), default=0)
        deep = [row for row in rows if row["depth"] == deepest]
        figures = [
            Figure(
                name=f"{family}-rates",
                title=f"{title}, {deepest} blocks: test error by learning rate",
                x_label="learning rate",
                y_label="test error",
                log_x=True,
                series=series_over([row for row in deep if row["family"] == family], "lr", "test_error", "scheme"),
                percent=True,
            )
            for family, title in TITLES.items()
        ]
        figures.append(
            Figure(
                name="gains",
                title="Mean |γ| after training from 1e-4 by depth of the branch",
                x_label="position of the branch, last = 1",
                y_label="mean |γ|",
                series=tuple(gains_by_depth(best_rate_rows(rows))),
                log_y=True,
                note="Learning rate with the lowest mean training error.",
            )
        )
        figures.append(
            Figure(
                name="growth",
                title=f"ViT, {deepest} blocks: mean |γ| by epoch",
                x_label="epochs",
                y_label="mean |γ|",
                series=tuple(gains_by_epoch(best_rate_rows([row for row in deep if row["family"] == "vit"]))),
                log_y=True,
                note="Learning rate with the lowest mean training error.",
            )
        )
        return figures


def build_layerscale_network(cell: Cell, data: Data) -> nn.Module:
    """Build the network of a cell; the blocks of ConvNeXt and ResNet form two equal stages."""
    start, depth, width = PAPER_STARTS.get(cell["scheme"]), cell["depth"], cell["width"]
    given = {NONE: "identity"}.get(cell["scheme"], cell["scheme"])
    common: dict[str, Any] = {
        "scheme": given if start is None else f"layerscale(init={start})",
        "channels": data.channels,
        "classes": len(data.classes),
    }
    halves, small = (depth - depth // 2, depth // 2), data.size < 32
    if cell["family"] == "resnet":
        common |= {"block": "basic", "stem": "cifar", "width": width, "stem_width": width}
        return build("resnet", depth=2 * depth + 2, blocks=halves, **common)
    if cell["family"] == "convnext":
        model = build("convnext", depth=depth, blocks=halves, width=width, patch=2, **common)
    else:
        shape: dict[str, Any] = {"dim": width, "heads": 4 if small else width // 32, "ratio": 2.0 if small else 4.0}
        shape |= {"patch": 2 if small else 4, "image": data.size, "pooling": "mean"}
        model = build("vit", depth=depth, **shape, **common)
    return restart_(model, {nn.Linear: XavierNormal()})


def gains_by_depth(rows: Sequence[Row], scheme: str = "γ₀ = 1e-4") -> list[Series]:
    """Mean |γ| by relative position of the branch, one series per family and depth."""
    lines = []
    for family, title in TITLES.items():
        for depth in sorted({int(row["depth"] or 0) for row in rows}):
            own = [row for row in rows if (row["family"], row["depth"], row["scheme"]) == (family, depth, scheme)]
            if points := over_seeds(own, "gains", first=1):
                last = points[-1].x
                lines.append(
                    Series(
                        f"{title.partition(',')[0]}, {depth} blocks",
                        tuple(Point(p.x / last, p.y, p.low, p.high, p.count) for p in points),
                    )
                )
    return lines


def gains_by_epoch(rows: Sequence[Row]) -> list[Series]:
    """Mean |γ| by epoch, one series per initial γ."""
    found = [(name, over_seeds([row for row in rows if row["scheme"] == name], "gains_by_epoch")) for name in STARTS]
    return [Series(name, points) for name, points in found if points]


def over_seeds(rows: Sequence[Row], column: str, first: int = 0) -> tuple[Point, ...]:
    """Mean and range over the seeds of a column whose values are lists of numbers."""
    series = [[float(each) for each in str(row[column]).split()] for row in rows if row.get(column)]
    samples = [SeedValues(values) for values in zip(*series, strict=False)]
    return tuple(Point(x, s.mean, s.low, s.high, len(s.values)) for x, s in enumerate(samples, first))


def errors_by_start(errors: dict[Any, SeedValues], names: Sequence[str]) -> str:
    """Format the errors by initial γ."""
    return ", ".join(f"{name} {errors[name,].text(percent)}" for name in names if (name,) in errors)


def grouped_errors(rows: Sequence[Row], by: Sequence[str] = ("scheme",), **where: object) -> dict[Any, SeedValues]:
    """Group the test errors of the rows with these values."""
    return group_values([row for row in rows if all(row[k] == v for k, v in where.items())], by, "test_error")


def deepest_baseline(rows: Sequence[Row], family: str) -> int:
    """Return the largest depth of a family at which a network without LayerScale was measured."""
    found = [row for row in rows if row["family"] == family and row["scheme"] == NONE]
    return max((int(row["depth"] or 0) for row in found), default=0)


def judge_cases(claim: str, good: Sequence[str], asked: int, text: str, condition: str) -> Verdict:
    """Return the verdict for a claim that holds in all, some or none of the cases asked about."""
    if good and len(good) < asked:
        return Verdict(claim, "holds only when", f"{condition.format(' or '.join(good))}. {text}")
    return Verdict(claim, "holds" if good else "does not hold", text)


def more_rates(rows: Sequence[Row]) -> Verdict:
    """Compare small initial γ with no LayerScale at the largest learning rate."""
    claim = "At the largest learning rate, a deep ViT learns better with a small initial γ than without LayerScale."
    depth = deepest_baseline(rows, "vit")
    rate = max((float(row["lr"] or 0) for row in rows if row["family"] == "vit"), default=0.0)
    errors = grouped_errors(rows, family="vit", depth=depth, lr=rate)
    if any((name,) not in errors for name in (NONE, *SMALL)):
        return Verdict(claim, "open", "not measured")
    good = [name for name in SMALL if errors[name,].high < errors[NONE,].low]
    text = f"Test error, {depth} blocks, learning rate {rate:g}: {errors_by_start(errors, (NONE, *STARTS))}."
    return judge_cases(claim, good, len(SMALL), text, "{}")


def small_gain_helps(rows: Sequence[Row]) -> Verdict:
    """Compare small initial γ with no LayerScale, each at its best learning rate."""
    claim = "At its best learning rate, a deep network learns better with a small initial γ than without LayerScale."
    good, parts, chosen = [], [], best_rate_rows(rows)
    for family, title in TITLES.items():
        depth = deepest_baseline(rows, family)
        errors = grouped_errors(chosen, family=family, depth=depth)
        small = [errors[name,] for name in SMALL if (name,) in errors]
        if (NONE,) not in errors or len(small) < len(SMALL):
            return Verdict(claim, "open", "not measured")
        if min(small, key=lambda sample: sample.mean).high < errors[NONE,].low:
            good.append(title.partition(",")[0])
        parts.append(f"{title}, {depth} blocks: {errors_by_start(errors, (NONE, *STARTS))}")
    text = f"Test error, {'; '.join(parts)}."
    return judge_cases(claim, good, len(TITLES), text, "the network is a {}")


def start_matters(rows: Sequence[Row]) -> Verdict:
    """Compare the range of errors over initial γ at the smallest and the largest depth."""
    claim = "The initial γ matters more, the deeper the network is."
    good, parts, chosen = [], [], best_rate_rows(rows)
    for family, title in TITLES.items():
        spread = {}
        for depth in sorted({int(row["depth"] or 0) for row in chosen if row["family"] == family}):
            errors = grouped_errors(chosen, family=family, depth=depth)
            means = [sample.mean for (name,), sample in errors.items() if name in STARTS]
            if len(means) == len(STARTS):
                spread[depth] = max(means) - min(means)
        if len(spread) < 2:
            return Verdict(claim, "open", "not measured at two depths")
        shallow, deep = min(spread), max(spread)
        if spread[deep] > spread[shallow] + 0.01:
            good.append(title.partition(",")[0])
        parts.append(f"{title} " + ", ".join(f"{100 * far:.1f} at {depth} blocks" for depth, far in spread.items()))
    text = (
        "Difference in test error (points) between the best and the worst initial γ, each at its best learning rate: "
        f"{'; '.join(parts)}."
    )
    return judge_cases(claim, good, len(TITLES), text, "the network is a {}")


def sgd_learns_worse(rows: Sequence[Row]) -> Verdict:
    """Compare a tiny initial γ with no LayerScale under SGD."""
    claim = "With SGD, a deep ResNet learns worse with γ₀ = 1e-6 than without LayerScale."
    depth, tiny = deepest_baseline(rows, "resnet"), SMALL[-1]
    errors = grouped_errors(rows, ("scheme", "lr"), family="resnet", depth=depth)
    rates = sorted({rate for _, rate in errors if {(NONE, rate), (tiny, rate)} <= set(errors)})
    if not rates:
        return Verdict(claim, "open", "not measured")
    worse = [f"{rate:g}" for rate in rates if errors[tiny, rate].low > errors[NONE, rate].high]
    text = "; ".join(
        f"learning rate {rate:g}: {errors[tiny, rate].text(percent)} with, {errors[NONE, rate].text(percent)} without"
        for rate in rates
    )
    return judge_cases(claim, worse, len(rates), f"Test error, {depth} blocks, {text}.", "the learning rate is {}")


def gain_moves(rows: Sequence[Row]) -> Verdict:
    """Judge whether AdamW moves γ far from 1e-6 and SGD does not."""
    claim = "From 1e-6, AdamW raises γ at least a thousandfold; SGD does not."
    found = group_values([row for row in rows if row["scheme"] == SMALL[-1]], ["family", "depth", "lr"], "gain")
    families = {family for family, _, _ in found}
    if families != set(TITLES):
        return Verdict(claim, "open", "not measured")
    text = "; ".join(
        f"{TITLES[family]}, {depth} blocks, learning rate {rate:g}: {format_value(sample.mean)}"
        for (family, depth, rate), sample in found.items()
    )
    far = {key: sample.low > 1e-3 for key, sample in found.items()}
    adam = all(value for key, value in far.items() if key[0] != "resnet")
    still = not any(value for key, value in far.items() if key[0] == "resnet")
    return Verdict(claim, "holds" if adam and still else "does not hold", f"Mean |γ| after training: {text}.")


STUDIES.add("layerscale", LayerScaleStudy())
