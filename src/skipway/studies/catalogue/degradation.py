"""Degradation: does the training error rise with depth, for plain and for residual networks?

Claim:    the training error of plain networks rises with depth; that of residual networks does not.
Source:   He et al. 2015, "Deep Residual Learning for Image Recognition", fig. 6 and table 6.
Command:  skipway study degradation
Hardware: two shared cores of a virtual machine, one process each.
Time:     about 5 minutes (24 cells).
Result:   24 November 2026, digits, width 8, 10 epochs, 3 seeds: holds. Training errors of plain networks are 0.0, 0.3,
          54.7 and 87.2 % at 8, 20, 56 and 110 layers; those of residual networks are 0.0 % at every depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from skipway.inference.metrics import percent
from skipway.models import build
from skipway.report.chart import Figure
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.fit import FitSettings, data_of, fit
from skipway.studies.statistics import SeedValues, group_values, series_over
from skipway.studies.study import STUDIES, Published, Study, Verdict

__all__ = ["Degradation"]

# depths, width, epochs
GRIDS: dict[Budget, tuple[tuple[int, ...], int, int]] = {
    "cpu": ((8, 20, 56, 110), 8, 10),
    "gpu": ((20, 32, 44, 56, 110), 16, 60),
    "paper": ((20, 32, 44, 56, 110), 16, 164),
}
# warm-up over a fifth of the steps and half of the paper's learning rate: at 0.1, whether 110 residual layers train
# depends on the seed
RATE, WARMUP = 0.05, 0.2
NAMES = {"plain": "plain", "identity": "residual"}
CIFAR = {20: 0.0875, 32: 0.0751, 44: 0.0717, 56: 0.0697, 110: 0.0661}


class Degradation(Study):
    """Training and test error of plain and residual networks by depth."""

    name = "degradation"
    title = "Degradation: plain and residual networks by depth"
    claim = (
        "The training error of plain networks rises with depth; that of residual networks with the same layers does "
        "not."
    )
    source = "He et al. 2015, fig. 6 and table 6"
    settings = ("scheme", "depth", "seed", "width", "epochs", "lr", "data")
    results = ("train_error", "test_error", "first_test_error", "diverged")
    minutes = "5 minutes on two shared cores"
    published = tuple(
        Published(
            what=f"ResNet-{depth}, test error",
            value=error,
            where={"scheme": "identity", "depth": depth, "dataset": "cifar10", "width": 16},
            column="test_error",
            source="He et al. 2015, table 6" + (", mean of 5" if depth == 110 else ""),
        )
        for depth, error in CIFAR.items()
    )

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        depths, width, epochs = GRIDS[budget]
        return [
            self.cell(scheme=scheme, depth=depth, seed=seed, width=width, epochs=epochs, lr=RATE, data=choices.data)
            for depth in sorted(choices.depths or depths, reverse=True)
            for seed in choices.seeds or (0, 1, 2)
            for scheme in choices.schemes or NAMES
        ]

    def dial(self, cell: Cell) -> tuple[str, int]:
        return "resnet-cifar", cell["depth"]

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        data = data_of(cell.get("data"))
        torch.manual_seed(cell["seed"])
        model = build(
            "resnet-cifar",
            depth=cell["depth"],
            scheme=cell["scheme"],
            width=cell["width"],
            stem_width=cell["width"],
            channels=data.channels,
            classes=len(data.classes),
        )
        batch = 64 if data.size < 32 else 128
        settings = FitSettings(epochs=cell["epochs"], lr=cell["lr"], warmup=WARMUP, seed=cell["seed"], batch_size=batch)
        return fit(model, data, settings, device)

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        errors = group_values(rows, ["scheme", "depth"], "train_error")
        return [
            by_depth(errors, "plain", "The training error of plain networks rises with depth.", rises=True),
            by_depth(
                errors, "identity", "The training error of residual networks does not rise with depth.", rises=False
            ),
            deepest(errors),
        ]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        return [
            Figure(
                name=value.replace("_", "-"),
                title=title,
                x_label="weight layers",
                y_label=title.lower(),
                log_x=True,
                series=series_over(rows, "depth", value, "scheme", lambda name: NAMES.get(str(name), str(name))),
                percent=True,
            )
            for value, title in (("train_error", "Training error"), ("test_error", "Test error"))
        ]


def by_depth(errors: dict, scheme: str, claim: str, *, rises: bool) -> Verdict:
    """Judge whether the deepest network has a higher error than the best shallower one beyond the range of seeds."""
    own: dict[int, SeedValues] = {depth: sample for (name, depth), sample in errors.items() if name == scheme}
    if len(own) < 2:
        return Verdict(claim, "open", "not measured at two depths")
    depths = sorted(own)
    best, last = min(depths[:-1], key=lambda depth: own[depth].mean), depths[-1]
    rose = own[last].low > own[best].high
    text = "; ".join(f"{depth} layers: {own[depth].text(percent)}" for depth in depths) + "."
    return Verdict(claim, "holds" if rose == rises else "does not hold", text)


def deepest(errors: dict) -> Verdict:
    """Compare plain and residual networks at the smallest and the largest depth."""
    claim = "The residual network is better at the largest depth; at the smallest depth the two differ little."
    depths = [depth for (name, depth) in errors if name == "plain" and ("identity", depth) in errors]
    if not depths:
        return Verdict(claim, "open", "not measured")
    text, apart = [], {}
    for depth in sorted({min(depths), max(depths)}):
        plain, residual = errors["plain", depth], errors["identity", depth]
        apart[depth] = plain.low > residual.high
        text.append(f"{depth} layers: plain {plain.text(percent)}, residual {residual.text(percent)}")
    small = errors["plain", min(depths)].mean - errors["identity", min(depths)].mean
    holds = apart[max(depths)] and abs(small) < 0.05
    return Verdict(claim, "holds" if holds else "does not hold", "; ".join(text) + ".")


STUDIES.add("degradation", Degradation())
