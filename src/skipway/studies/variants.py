"""Studies that train variants of one network on images and compare them seed by seed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from skipway.data import Data
from skipway.models import build
from skipway.nn.initial import XavierNormal
from skipway.report.chart import Figure
from skipway.schemes.initialisation import initialise_
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.fit import FitSettings, data_of, fit
from skipway.studies.statistics import PairedDifference, group_values, pair_by_seed, select_best, series_over
from skipway.studies.study import Study, Verdict
from skipway.tracing.chain import chain

__all__ = [
    "FAMILIES",
    "NetworkVariant",
    "TrainingGrid",
    "VariantStudy",
    "build_network",
    "compare",
    "differences_from",
    "give_unit_stream_",
    "lowest_rate_rows",
    "name_depths",
    "share_base",
    "summarise_variants",
    "transfers",
]

FAMILIES = {"vit": "ViT", "resnet": "ResNet"}


@dataclass(frozen=True)
class NetworkVariant:
    """A network of a comparison.

    Args:
        scheme: spec string.
        options: further arguments of the family, {"norm": "post"} for example.
    """

    scheme: str = "identity"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainingGrid:
    """Sizes of the trainings of one family.

    Args:
        depths: in blocks.
        width: channels of the ViT, or of the first stage of the ResNet.
        epochs: passes over the training images.
        rates: peak learning rates.
        seeds: of weights and data order.
    """

    depths: tuple[int, ...]
    width: int
    epochs: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)


class VariantStudy(Study):
    """Errors and losses of variants of a ViT (AdamW) or a ResNet (SGD) by depth and learning rate; abstract.

    A variant is compared at the learning rate with its lowest mean training loss.
    """

    settings = ("kind", "family", "scheme", "depth", "lr", "seed", "width", "epochs", "data")
    results = ("train_error", "test_error", "test_loss", "diverged")
    criterion = "train_loss"
    variants: ClassVar[Mapping[str, NetworkVariant]]
    """Networks by name; a scheme that the user names is a variant, too."""
    grids: ClassVar[Mapping[Budget, Mapping[str, TrainingGrid]]]
    """Sizes by family."""

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        return [
            self.cell(
                kind="train",
                family=family, scheme=name, depth=depth, lr=rate, seed=seed, width=grid.width, epochs=grid.epochs,
                data=choices.data,
            )
            for family, grid in self.grids[budget].items()
            for depth in sorted(choices.depths or grid.depths, reverse=True)
            for seed in choices.seeds or grid.seeds
            for name in choices.schemes or self.names(family)
            for rate in grid.rates
        ]  # fmt: skip

    def names(self, family: str) -> Sequence[str]:
        """Return the variants that are trained in a family."""
        return list(self.variants)

    def dial(self, cell: Cell) -> tuple[str, int] | None:
        return ("resnet", 2 * cell["depth"] + 2) if cell.get("family") == "resnet" else None

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        data = data_of(cell.get("data"))
        torch.manual_seed(cell["seed"])
        model = self.build(cell, data)
        return {**fit(model, data, self.fit_settings(cell, data), device), **self.observe(model)}

    def build(self, cell: Cell, data: Data) -> nn.Module:
        """Build the network of a cell."""
        variant = self.variants.get(cell["scheme"]) or NetworkVariant(cell["scheme"])
        return build_network(cell["family"], variant, cell["depth"], cell["width"], data)

    def fit_settings(self, cell: Cell, data: Data) -> FitSettings:
        """Return the hyperparameters of a cell."""
        adam = cell["family"] == "vit"
        return FitSettings(
            epochs=cell["epochs"],
            lr=cell["lr"],
            batch_size=64 if data.size < 32 else 128,
            optimizer="adamw" if adam else "sgd",
            weight_decay=0.05 if adam else 5e-4,
            warmup=0.1,
            clip=1.0 if adam else None,
            seed=cell["seed"],
        )

    def observe(self, model: nn.Module) -> Row:
        """Return what else is measured of a trained network; nothing by default."""
        return {}

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        trained = trained_rows(rows)
        figures = []
        for family, title in FAMILIES.items():
            own = [row for row in trained if row["family"] == family]
            deepest = max((int(row["depth"] or 0) for row in own), default=0)
            if own or family in self.grids["cpu"]:
                figures.append(
                    Figure(
                        name=f"{family}-rates",
                        title=f"{title}, {deepest} blocks: test loss by learning rate",
                        x_label="learning rate",
                        y_label="test loss",
                        log_x=True,
                        series=series_over(
                            [row for row in own if row["depth"] == deepest], "lr", "test_loss", "scheme"
                        ),
                    )
                )
        return figures

    def summary(self, rows: Sequence[Row]) -> list[Row]:
        """One row per variant and depth: loss and error at its best learning rate."""
        return summarise_variants(trained_rows(rows))


def build_network(family: str, variant: NetworkVariant, depth: int, width: int, data: Data) -> nn.Module:
    """Build a small ViT or ResNet for the images of `data`, initialised.

    The maps in the ViT's branches start from Xavier's normal distribution, since the N(0, 0.02²) of ViTs is far too
    small for so few channels; then the scheme takes its own step.

    Args:
        family: vit or resnet.
        variant: scheme and options.
        depth: blocks; those of the ResNet, two convolutions each, form two equal stages.
        width: channels.
        data: decides image size, channels and classes.
    """
    common: dict[str, Any] = {"scheme": variant.scheme, "channels": data.channels, "classes": len(data.classes)}
    common |= variant.options
    if family == "resnet":
        halves = (depth - depth // 2, depth // 2)
        common |= {"block": "basic", "stem": "cifar", "width": width, "stem_width": width}
        return build("resnet", depth=2 * depth + 2, blocks=halves, **common)
    small = data.size < 32
    shape: dict[str, Any] = {"dim": width, "heads": 4 if small else width // 32, "ratio": 2.0 if small else 4.0}
    shape |= {"patch": 2 if small else 4, "image": data.size, "pooling": "mean"}
    model = build("vit", depth=depth, **shape, **common)
    for connection in chain(model):
        for module in connection.residual.branch.modules():
            if isinstance(module, nn.Linear):
                module.initial = XavierNormal()  # type: ignore[assignment]
    return initialise_(model)


@torch.no_grad()
def give_unit_stream_(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Divide the stem's parameters, in place, so that the stream starts at unit size, as theory of depth assumes."""
    size = model.stem(inputs).square().mean().sqrt()  # type: ignore[operator]
    for parameter in model.stem.parameters():  # type: ignore[union-attr]
        parameter.div_(size)
    return model


def trained_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of trainings."""
    return [row for row in rows if row.get("kind") == "train"]


def name_depths(rows: Sequence[Row]) -> list[Row]:
    """The rows with their depth in the name of their variant, where there are several depths.

    >>> [row["scheme"] for row in name_depths([{"scheme": "plain", "depth": 4}, {"scheme": "plain", "depth": 8}])]
    ['plain, 4 blocks', 'plain, 8 blocks']
    """
    if len({row["depth"] for row in rows}) < 2:
        return list(rows)
    return [{**row, "scheme": f"{row['scheme']}, {row['depth']} blocks"} for row in rows]


def lowest_rate_rows(rows: Sequence[Row]) -> list[Row]:
    """Keep, for each family, variant and depth, the rows of the learning rate with the lowest mean training loss."""
    return select_best(trained_rows(rows), ["family", "scheme", "depth"], "lr", "train_loss")


def summarise_variants(rows: Sequence[Row], *by: str) -> list[Row]:
    """One row per family, depth, variant and settings `by`, at its best learning rate."""
    best = select_best(trained_rows(rows), ["family", "scheme", "depth", *by], "lr", "train_loss")
    keys = ["family", "depth", "scheme", "lr", *by]
    losses, errors = group_values(best, keys, "test_loss"), group_values(best, keys, "test_error")
    return [
        {
            "network": f"{FAMILIES.get(family, family)}, {depth} blocks",
            "variant": scheme,
            **{name.replace("_", " "): value for name, value in zip(by, others, strict=True)},
            "best learning rate": rate,
            "test loss": loss.text().partition(" (")[0],
            "test error": f"{100 * errors[family, depth, scheme, rate, *others].mean:.1f} %",
            "seeds": len(loss.values),
        }
        for (family, depth, scheme, rate, *others), loss in losses.items()
    ]


def differences_from(rows: Sequence[Row], baseline: str, value: str = "test_loss") -> dict[str, PairedDifference]:
    """`value` of every other variant minus that of `baseline`, paired by seed and depth, where two seeds have both.

    Args:
        rows: of one family, each variant at its best learning rate.
        baseline: name of a variant.
        value: column.

    Returns:
        differences by name of the variant, with the depth where there are several.
    """
    found = {}
    for depth in dict.fromkeys(row["depth"] for row in rows):
        own = [(row, shown) for row, shown in zip(rows, name_depths(rows), strict=True) if row["depth"] == depth]
        plain = [row for row, _ in own if row["scheme"] == baseline]
        for name in dict.fromkeys(str(shown["scheme"]) for row, shown in own if row["scheme"] != baseline):
            difference = pair_by_seed([row for row, shown in own if shown["scheme"] == name], plain, value)
            if len(difference.differences.values) > 1:
                found[name] = difference
    return found


def compare(claim: str, rows: Sequence[Row], better: str, worse: str, value: str = "test_loss") -> Verdict:
    """Judge whether one variant has a lower `value` than another, in every network that trained both.

    A difference counts if the 95 % interval of its mean over the seeds, paired, excludes 0; where one of the two
    diverges, it is infinite. The claim holds if all
    networks show it, holds only when some do, does not hold if none does and one shows the opposite, and is open
    otherwise.

    Args:
        rows: of all cells; the trainings are selected, each variant at its best learning rate.
        better, worse: names of the variants.
        value: column; lower is better.
    """
    best = lowest_rate_rows(rows)
    signs, parts = {}, []
    for family, depth in dict.fromkeys((row["family"], row["depth"]) for row in best):
        own = [row for row in best if (row["family"], row["depth"]) == (family, depth)]
        low, high = ([row for row in own if row["scheme"] == name] for name in (better, worse))
        found = pair_by_seed(low, high, value)
        if len(found.differences.values) < 2:
            continue
        title = f"{FAMILIES.get(str(family), family)}, {depth} blocks"
        signs[title] = found.sign
        parts.append(f"{title}: {found} ({len(found.differences.values)} seeds)")
    if not signs:
        return Verdict(claim, "open", "not measured with two seeds")
    text = f"{value.replace('_', ' ').capitalize()} of {better} minus {worse}: {'; '.join(parts)}."
    good = [title for title, sign in signs.items() if sign < 0]
    if good and len(good) < len(signs):
        return Verdict(claim, "holds only when", f"the network is a {' or '.join(good)}. {text}")
    opposite = any(sign > 0 for sign in signs.values())
    return Verdict(claim, "holds" if good else "does not hold" if opposite else "open", text)


def share_base(cells: Sequence[Cell], base: int, variants: Collection[str]) -> list[Cell]:
    """Leave out repeated trainings at the base depth, where all of the study's own variants are one network.

    Args:
        cells: of trainings.
        base: depth.
        variants: names of the study's own; another scheme is another network there, too, and stays.
    """
    first = next((cell["scheme"] for cell in cells if cell["scheme"] in variants), None)
    return [
        cell for cell in cells if cell["depth"] != base or cell["scheme"] == first or cell["scheme"] not in variants
    ]


def transfers(rows: Sequence[Row], name: str, base: int, variants: Collection[str]) -> Verdict:
    """Judge whether the deepest network has the best rate of the one with `base` blocks, within a factor of 2.

    Args:
        rows: of all cells.
        name: of the variant that is judged.
        base: depth at which all of `variants` are one network, see `share_base`.
        variants: names of the study's own.
    """
    claim = f"With {name} the best learning rate of the shallow network is that of the deep one."
    best = {(row["scheme"], row["depth"]): float(row["lr"] or 0) for row in lowest_rate_rows(rows)}
    shallow = next((best[own, base] for own in (name, *variants) if (own, base) in best), None)
    deepest = max((int(depth or 0) for own, depth in best if own == name), default=0)
    if shallow is None or deepest <= base:
        return Verdict(claim, "open", "not measured at two depths")
    losses = group_values(lowest_rate_rows(rows), ["scheme", "depth"], "train_loss")
    text = (
        f"Best rate {shallow:g} with {base} blocks, {best[name, deepest]:g} with {deepest} "
        f"(training loss {losses[name, deepest]})."
    )
    near = abs(math.log2(best[name, deepest] / shallow)) < 1.01
    return Verdict(claim, "holds" if near else "does not hold", text)
