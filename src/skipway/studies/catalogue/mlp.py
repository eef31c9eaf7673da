"""A deep fully connected network: vanilla, residual, LayerNorm, ReZero.

Claim:    of fully connected networks of 64 layers only the one with ReZero learns quickly; vanilla and residual
          networks begin with losses of tens of thousands, and LayerNorm without skips is slow.
Source:   Bachlechner et al. 2020, "ReZero is All You Need", sec. 4; the authors' notebook on CIFAR-10, whose losses
          are the published numbers.
Command:  skipway study fully-connected
Hardware: two shared cores of a virtual machine, one process each.
Time:     about 4 minutes (24 cells).
Result:   24 November 2026, digits, 3 seeds: holds. Losses of the third epoch at 64 layers: ReZero 0.017, vanilla 2.30,
          LayerNorm 2.33, residual 62.8; without ReZero or LayerNorm the first epoch's loss reaches 5e+7, as published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipway.report.chart import Figure, Point, Series, format_value
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.fit import (
    UNKNOWN_CHANCE,
    chance,
    chance_of,
    data_of,
    dataset_name,
    test_error_and_loss,
    trained_error,
)
from skipway.studies.statistics import group_losses, group_values, series_over
from skipway.studies.study import STUDIES, Published, Study, Verdict

__all__ = ["FullyConnected", "NotebookMlp"]


@dataclass(frozen=True)
class HiddenLayer:
    """A hidden layer of the authors' notebook: x ← skip · x + α relu(W x), followed by LayerNorm if `norm`.

    Args:
        gain: of the Xavier initialisation of W.
        skip: add x.
        norm: normalise the sum.
        zero: learn α, from 0; otherwise α = 1.
    """

    gain: float
    skip: bool = False
    norm: bool = False
    zero: bool = False


VARIANTS = {
    "vanilla": HiddenLayer(2**0.5),
    "residual": HiddenLayer(0.25**0.5, skip=True),
    "LayerNorm": HiddenLayer(2**0.5, norm=True),
    "ReZero": HiddenLayer(2**0.5, skip=True, zero=True),
}
# mean training losses of epochs 1, 2 and 3 (the notebook's output; epoch 1 of vanilla and residual differs by machine)
LOSSES = {
    "vanilla": (54693.80, 2.34, 2.30),
    "residual": (131269.63, 26.92, 11.76),
    "LayerNorm": (2.23, 2.14, 2.14),
    "ReZero": (1.68, 1.37, 1.24),
}
# depths, width, epochs
GRIDS: dict[Budget, tuple[tuple[int, ...], int, int]] = {
    "cpu": ((8, 64), 256, 3),
    "gpu": ((8, 64), 256, 3),
    "paper": ((8, 64), 256, 10),
}


class FullyConnected(Study):
    """Training loss by epoch of deep fully connected networks."""

    name = "fully-connected"
    title = "64 fully connected layers: vanilla, residual, LayerNorm, ReZero"
    claim = (
        "Of networks of 64 fully connected layers, only the one with ReZero learns quickly; the others begin with huge "
        "losses or learn slowly."
    )
    source = "Bachlechner et al. 2020, sec. 4, and the authors' notebook"
    settings = ("scheme", "depth", "seed", "width", "epochs", "lr", "data")
    results = ("loss_1", "loss_2", "loss_3", "test_error", "diverged")
    minutes = "4 minutes on two shared cores"
    specs = False
    published = tuple(
        Published(
            what=f"{scheme}, mean training loss of epoch {epoch}",
            value=loss,
            where={"scheme": scheme, "depth": 64, "width": 256, "dataset": "cifar10"},
            column=f"loss_{epoch}",
            source="the authors' notebook" + (", order of magnitude only" if loss > 1000 else ""),
        )
        for scheme, losses in LOSSES.items()
        for epoch, loss in enumerate(losses, 1)
    )

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        depths, width, epochs = GRIDS[budget]
        return [
            self.cell(scheme=scheme, depth=depth, seed=seed, width=width, epochs=epochs, lr=0.01, data=choices.data)
            for depth in sorted(choices.depths or depths, reverse=True)
            for scheme in choices.schemes or VARIANTS
            for seed in choices.seeds or (0, 1, 2)
        ]

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        data = data_of(cell.get("data"), vary=False)  # as in the notebook
        torch.manual_seed(cell["seed"])
        inputs = data.channels * data.size**2
        network = NotebookMlp(VARIANTS[cell["scheme"]], inputs, cell["width"], cell["depth"], len(data.classes)).to(
            device
        )
        optimizer = torch.optim.Adagrad(network.parameters(), lr=cell["lr"])
        row: Row = {}
        # the notebook's batch size is 100; smaller for the digits, which are few
        batch = 100 if data.size >= 32 else 20
        for epoch in range(cell["epochs"]):
            total, steps = 0.0, 0
            place = torch.device(device)
            for each in data.train_batches(seed=cell["seed"], epoch=epoch, batch_size=batch, device=place):
                loss = F.cross_entropy(network(each.inputs), each.targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, steps = total + float(loss.detach()), steps + 1
            row[f"loss_{epoch + 1}"] = total / steps
        row["diverged"] = not math.isfinite(float(row[f"loss_{cell['epochs']}"] or 0.0))
        row["test_error"], row["dataset"] = (
            test_error_and_loss(network, data, torch.device(device))[0],
            dataset_name(data),
        )
        return {**row, **chance(data)}

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [fastest(rows, 64), starts(rows), shallow(rows)]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        deep = [row for row in rows if row["depth"] == max((int(row["depth"] or 0) for row in rows), default=0)]
        epochs = sorted({name for row in deep for name in row if name.startswith("loss_")}, key=lambda n: int(n[5:]))
        lines = []
        for scheme in dict.fromkeys(str(row["scheme"]) for row in deep):
            own = [row for row in deep if row["scheme"] == scheme]
            samples = [(int(name[5:]), group_values(own, [], name).get(())) for name in epochs]
            points = [Point(epoch, s.mean, s.low, s.high, len(s.values)) for epoch, s in samples if s is not None]
            lines.append(Series(scheme, tuple(points)))
        return [
            Figure(
                name="losses",
                title="Training loss of the deepest networks by epoch",
                x_label="epoch",
                y_label="mean training loss",
                series=tuple(lines),
                log_y=True,
            ),
            Figure(
                name="test-error",
                title="Test error after the last epoch",
                x_label="hidden layers",
                y_label="test error",
                log_x=True,
                series=series_over(rows, "depth", "test_error", "scheme"),
                percent=True,
            ),
        ]


class NotebookMlp(nn.Module):
    """The notebook's network: input layer, `depth` hidden layers, output layer; all layers share one LayerNorm."""

    def __init__(self, variant: HiddenLayer, inputs: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.variant = variant
        self.entry, self.exit = nn.Linear(inputs, width), nn.Linear(width, classes)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width) if variant.norm else nn.Identity()
        self.gains = nn.Parameter(torch.zeros(depth) if variant.zero else torch.ones(depth), requires_grad=variant.zero)
        nn.init.kaiming_normal_(self.entry.weight, nonlinearity="relu")
        for layer in self.layers:
            nn.init.xavier_normal_(layer.weight, gain=variant.gain)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.entry(x.flatten(1)))
        for layer, gain in zip(self.layers, self.gains, strict=True):
            branch = gain * F.relu(layer(x))
            x = self.norm(x + branch if self.variant.skip else branch)
        return self.exit(x)


def last_losses(rows: Sequence[Row], depth: int) -> dict:
    """Group the losses of the third epoch by scheme."""
    found = group_losses([row for row in rows if row["depth"] == depth], ["scheme"], "loss_3")
    return {key[0]: sample for key, sample in found.items()}


def fastest(rows: Sequence[Row], depth: int) -> Verdict:
    """Judge whether ReZero has the lowest loss in the third epoch."""
    claim = "At 64 layers, ReZero has the lowest training loss after three epochs."
    found = last_losses(rows, depth)
    if len(found) < len(VARIANTS):
        return Verdict(claim, "open", "not measured")
    text = "Training loss of epoch 3: " + ", ".join(f"{name} {sample}" for name, sample in found.items()) + "."
    holds = all(found["ReZero"].high < sample.low for name, sample in found.items() if name != "ReZero")
    return Verdict(claim, "holds" if holds else "does not hold", text)


def starts(rows: Sequence[Row]) -> Verdict:
    """Judge whether the first epoch's losses without ReZero or LayerNorm are huge."""
    claim = "Without ReZero or normalisation, the first epoch's loss is at least a hundred times that of guessing."
    found = group_losses([row for row in rows if row["depth"] == 64], ["scheme"], "loss_1")
    if not {("vanilla",), ("residual",)} <= set(found):
        return Verdict(claim, "open", "not measured")
    guessed = chance_of(rows, "chance_loss")
    if guessed is None:
        return Verdict(claim, "open", UNKNOWN_CHANCE)
    text = "Training loss of epoch 1: " + ", ".join(
        f"{key[0]} {format_value(sample.low)} to {format_value(sample.high)}" for key, sample in found.items()
    )
    large = [name for name in ("vanilla", "residual") if found[name,].low > 100 * guessed]
    answer = "holds" if len(large) == 2 else "holds only when" if large else "does not hold"
    condition = f"the network is {large[0]}. " if answer == "holds only when" else ""
    return Verdict(claim, answer, f"{condition}{text}.")


def shallow(rows: Sequence[Row]) -> Verdict:
    """Judge whether all four variants learn at 8 layers."""
    claim = "At 8 layers, all four networks learn."
    found = group_values([row for row in rows if row["depth"] == 8], ["scheme"], "test_error")
    if len(found) < len(VARIANTS):
        return Verdict(claim, "open", "not measured")
    limit = trained_error(rows)
    if limit is None:
        return Verdict(claim, "open", UNKNOWN_CHANCE)
    text = "Test error: " + ", ".join(f"{key[0]} {sample}" for key, sample in found.items()) + "."
    return Verdict(claim, "holds" if all(sample.high < limit for sample in found.values()) else "does not hold", text)


STUDIES.add("fully-connected", FullyConnected())
