"""A residual network as an ensemble of paths: blocks deleted after training, and the lengths of the paths that matter.

Claim:    deleting a block of a trained residual network changes little, deleting one of a plain network everything; the
          error rises smoothly with the number of deleted blocks; the gradient flows along paths shorter than the
          average path; stochastic depth trains such an ensemble and improves a network of 1202 layers.
Source:   Veit et al. 2016, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", fig. 3, 5 and 6;
          Huang et al. 2016, "Deep Networks with Stochastic Depth", sec. 4.
Command:  skipway study paths
Hardware: two shared cores of a virtual machine, one process each.
Time:     about 4 minutes (12 cells), on a loaded machine.
Result:   24 November 2026, digits, width 8, 10 epochs, 3 seeds: deleting one block costs a residual network of 110
          layers 0.9 points of test error, one of 20 layers 9 points, a plain network of 20 layers 83 points; with 54
          blocks the gradient flows along paths of 3.8 blocks on average (the average path crosses 27). 27 November:
          110 layers have 3.8 % test error with stochastic depth and 2.4 % without, and the seeds overlap; 1202 layers
          belong to the other budgets and were not measured here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import nn

from skipway.data import Data
from skipway.diagnosis import diagnose
from skipway.inference.metrics import percent
from skipway.models import build
from skipway.nn import Multiply
from skipway.nn.shortcut import Carry
from skipway.report.chart import Figure, Point, Series, format_value
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.fit import UNKNOWN_CHANCE, FitSettings, chance_of, data_of, fit, test_error_and_loss
from skipway.studies.statistics import SeedValues, group_values, series_over
from skipway.studies.study import STUDIES, Published, Study, Verdict
from skipway.tracing.chain import Connection, chain

__all__ = ["Paths", "binomial_share", "deleted"]

NAMES = {"identity": "residual", "plain": "plain"}
DROPPED = "stochasticdepth(0.5)"
TITLES = {**NAMES, DROPPED: "stochastic depth"}
COUNTS = (1, 2, 4, 8)
VERY_DEEP = (("identity", 1202), (DROPPED, 1202))
# blocks deleted one at a time; if there are more, this many are drawn at random
ALONE = 54
# (scheme, depth), width, epochs; plain only at a depth at which it trains
GRIDS: dict[Budget, tuple[tuple[tuple[str, int], ...], int, int]] = {
    "cpu": ((("identity", 110), ("identity", 20), ("plain", 20), (DROPPED, 110)), 8, 10),
    "gpu": ((*VERY_DEEP, ("identity", 110), ("identity", 56), ("identity", 20), ("plain", 20), (DROPPED, 110)), 16, 60),
    "paper": (
        (*VERY_DEEP, ("identity", 110), ("identity", 56), ("identity", 20), ("plain", 20), (DROPPED, 110)),
        16,
        164,
    ),
}


class Paths(Study):
    """Test error with blocks deleted, and the lengths of the gradient's paths."""

    name = "paths"
    title = "Ensemble of paths: deleted blocks and path lengths"
    claim = (
        "Deleting a block of a trained residual network changes little, deleting one of a plain network everything; "
        "most of the gradient flows along short paths."
    )
    source = "Veit et al. 2016, fig. 3, 5 and 6; Huang et al. 2016, sec. 4"
    settings = ("scheme", "depth", "seed", "width", "epochs", "lr", "data")
    results = ("intact", "deleted_1", "deleted_8", "worst", "effective_path")
    minutes = "4 minutes on two cores under load"
    published = (
        Published(
            what="ResNet-110, fraction of all paths that cross 19 to 35 of 54 blocks",
            value=0.980,
            where={"scheme": "identity", "depth": 110},
            column="paths_19_35",
            source="closed form, Veit et al. 2016, sec. 3 (95 % there)",
        ),
        Published(
            what="ResNet-110, fraction of all paths that cross 5 to 17 of 54 blocks",
            value=0.00454,
            where={"scheme": "identity", "depth": 110},
            column="paths_5_17",
            source="closed form, Veit et al. 2016, sec. 5 (0.45 %)",
        ),
        Published(
            what="ResNet-1202, test error",
            value=0.0793,
            where={"scheme": "identity", "depth": 1202, "width": 16, "dataset": "cifar10"},
            column="intact",
            source="He et al. 2015, table 6",
        ),
        Published(
            what="ResNet-1202 with stochastic depth, test error",
            value=0.0491,
            where={"scheme": DROPPED, "depth": 1202, "width": 16, "dataset": "cifar10"},
            column="intact",
            source="Huang et al. 2016, abstract",
        ),
    )

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        pairs, width, epochs = GRIDS[budget]
        if choices.depths or choices.schemes:
            schemes = choices.schemes or tuple(NAMES)
            pairs = tuple((s, d) for d in choices.depths or (20,) for s in schemes)
        return [
            self.cell(scheme=scheme, depth=depth, seed=seed, width=width, epochs=epochs, lr=0.05, data=choices.data)
            for scheme, depth in pairs
            for seed in choices.seeds or (0, 1, 2)
        ]

    def dial(self, cell: Cell) -> tuple[str, int]:
        return "resnet-cifar", cell["depth"]

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        data = data_of(cell.get("data"))
        torch.manual_seed(cell["seed"])
        width = cell["width"]
        model = build(
            "resnet-cifar",
            depth=cell["depth"],
            scheme=cell["scheme"],
            width=width,
            stem_width=width,
            channels=data.channels,
            classes=len(data.classes),
        )
        batch = 64 if data.size < 32 else 128
        settings = FitSettings(epochs=cell["epochs"], lr=cell["lr"], warmup=0.2, seed=cell["seed"], batch_size=batch)
        row = fit(model, data, settings, device)
        row["intact"] = row["test_error"]
        connections = list(chain(model))
        row["blocks"] = len(connections)
        row.update(lesions(model, connections, data, cell["seed"], torch.device(device)))
        if cell["scheme"] != "plain":
            row.update(path_lengths(model, data, device))
        for low, high in ((19, 35), (5, 17)):
            row[f"paths_{low}_{high}"] = binomial_share(len(connections), low, high)
        return row

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [one_block(rows), smooth(rows), short(rows), dropped(rows), robust(rows)]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        named = [{**row, "network": f"{TITLES.get(str(row['scheme']), row['scheme'])} {row['depth']}"} for row in rows]
        lines = []
        for network in dict.fromkeys(str(row["network"]) for row in named):
            own = [row for row in named if row["network"] == network]
            samples = [(0, group_values(own, [], "intact").get(()))]
            samples += [(count, group_values(own, [], f"deleted_{count}").get(())) for count in COUNTS]
            points = [Point(count, s.mean, s.low, s.high, len(s.values)) for count, s in samples if s is not None]
            lines.append(Series(network, tuple(points)))
        residual = [row for row in named if row["scheme"] == "identity"]
        lengths = (
            *series_over(
                [{**row, "of": "paths of the gradient"} for row in residual], "blocks", "effective_path", "of"
            ),
            Series.of(
                "all paths, L / 2",
                sorted({(float(row["blocks"] or 0), float(row["blocks"] or 0) / 2) for row in residual}),
                "theory",
            ),
        )
        return [
            Figure(
                name="deleted",
                title="Test error by number of deleted blocks",
                x_label="deleted blocks",
                y_label="test error",
                series=tuple(lines),
                percent=True,
            ),
            Figure(
                name="lengths",
                title="Mean path length in blocks",
                x_label="blocks",
                y_label="blocks crossed by a path",
                series=lengths,
            ),
        ]


@contextmanager
def deleted(connections: Sequence[Connection]) -> Iterator[None]:
    """Replace connections by the identity within the context, in place: the branch times 0, a cut skip restored."""
    kept = [(each.residual, each.residual.scale, each.residual.shortcut) for each in connections]
    try:
        for residual, _, shortcut in kept:
            residual.scale = Multiply(0.0)
            residual.shortcut = Carry() if type(shortcut).__name__ == "Cut" else shortcut
        yield
    finally:
        for residual, scale, shortcut in kept:
            residual.scale, residual.shortcut = scale, shortcut


def lesions(model: nn.Module, connections: Sequence[Connection], data: Data, seed: int, device: torch.device) -> Row:
    """Measure the test error without each single block, and without several drawn at random.

    Blocks that change the shape are never deleted. The model is restored after each measurement.
    """
    whole = [each for each in connections if each.site.entry == each.site.dim]
    alone = []
    for each in whole if len(whole) <= ALONE else random.Random(f"alone {seed}").sample(whole, ALONE):
        with deleted([each]):
            alone.append(test_error_and_loss(model, data, device)[0])
    row: Row = {"deleted_1": sum(alone) / len(alone), "worst": max(alone)}
    draw = random.Random(seed)
    for count in COUNTS[1:]:
        found = []
        for _ in range(5):
            if count < len(whole):
                with deleted(draw.sample(whole, count)):
                    found.append(test_error_and_loss(model, data, device)[0])
        if found:
            row[f"deleted_{count}"] = sum(found) / len(found)
    return row


def path_lengths(model: nn.Module, data: Data, device: str) -> Row:
    """Measure the number of branches that the gradient's paths cross: mean, 5 % and 95 % quantile.

    The probability of crossing a branch is the fraction of the squared gradient that flows through it; connections are
    taken as independent, so that the length has a Poisson binomial distribution. The model is not changed.
    """
    batch = data.sample(64, seed=0, device=torch.device(device))
    shares = [
        each.through_branch
        for each in diagnose(model, batch.inputs, targets=batch.labels, steps=1).measurement.connections
        if not math.isnan(each.through_branch)
    ]
    chances = [1.0]
    for share in shares:
        chances = [
            (chances[k] if k < len(chances) else 0.0) * (1 - share) + (chances[k - 1] * share if k else 0.0)
            for k in range(len(chances) + 1)
        ]
    return {"effective_path": sum(shares), "path_5": quantile(chances, 0.05), "path_95": quantile(chances, 0.95)}


def quantile(chances: Sequence[float], share: float) -> int:
    """Return the smallest length whose cumulative probability reaches `share`.

    >>> quantile([0.25, 0.5, 0.25], 0.5)
    1
    """
    total = 0.0
    for length, chance in enumerate(chances):
        total += chance
        if total >= share:
            return length
    return len(chances) - 1


def binomial_share(blocks: int, low: int, high: int) -> float:
    """Return the fraction of the 2^n paths through n blocks that cross `low` to `high` of them.

    >>> round(binomial_share(54, 19, 35), 3), round(binomial_share(54, 5, 17), 5)
    (0.98, 0.00454)
    """
    return sum(math.comb(blocks, k) for k in range(low, min(high, blocks) + 1)) / 2**blocks


def one_block(rows: Sequence[Row]) -> Verdict:
    """Compare the errors with one block deleted, residual and plain, which loses a third of the error of chance."""
    claim = "Without one block, a residual network is nearly as good (within 3 points), a plain network is not."
    found = {name: group_values(rows, ["scheme", "depth"], name) for name in ("intact", "deleted_1", "worst")}
    if not {key[0] for key in found["intact"]} >= set(NAMES):
        return Verdict(claim, "open", "not measured")
    chance = chance_of(rows)
    if chance is None:
        return Verdict(claim, "open", UNKNOWN_CHANCE)
    parts, little, much = [], [], []
    for key, sample in found["intact"].items():
        if key[0] not in NAMES:
            continue
        rise = found["deleted_1"][key].mean - sample.mean
        if key[0] == "plain":
            much.append(rise > chance / 3)
        elif rise < 0.03:
            little.append(key[1])
        parts.append(
            f"{NAMES[key[0]]}, {key[1]} layers: intact {sample.text(percent)}, one block deleted "
            f"{found['deleted_1'][key].text(percent)}, worst block {found['worst'][key].text(percent)}"
        )
    text = f"Test error, {'; '.join(parts)}."
    if not little or not all(much):
        return Verdict(claim, "does not hold", text)
    if len(little) + len(much) < len(parts):
        return Verdict(claim, "holds only when", f"the network has {', '.join(map(str, little))} layers. {text}")
    return Verdict(claim, "holds", text)


def smooth(rows: Sequence[Row]) -> Verdict:
    """Judge whether the error rises smoothly with the number of deleted blocks."""
    claim = "The error of the deepest residual network rises smoothly with the number of deleted blocks."
    own = [row for row in rows if row["scheme"] == "identity"]
    deepest = max((int(row["depth"] or 0) for row in own), default=0)
    chosen = [row for row in own if row["depth"] == deepest]
    found = [(count, group_values(chosen, [], f"deleted_{count}").get(())) for count in COUNTS]
    means = [sample.mean for _, sample in found if sample is not None]
    if len(means) < len(COUNTS):
        return Verdict(claim, "open", "not measured")
    chance = chance_of(own)
    if chance is None:
        return Verdict(claim, "open", UNKNOWN_CHANCE)
    text = ", ".join(f"{count} deleted: {sample.text(percent)}" for count, sample in found if sample is not None)
    holds = all(later >= earlier - 0.01 for earlier, later in pairwise(means)) and means[0] < chance * 2 / 9
    return Verdict(claim, "holds" if holds else "does not hold", f"Test error, {deepest} layers, blocks {text}.")


def short(rows: Sequence[Row]) -> Verdict:
    """Compare the gradient's paths with the average path."""
    claim = "The gradient of the deepest network flows along paths much shorter than the average path of L / 2 blocks."
    own = [row for row in rows if row["scheme"] == "identity"]
    deepest = max((int(row["depth"] or 0) for row in own), default=0)
    chosen = [row for row in own if row["depth"] == deepest]
    lengths = group_values(chosen, [], "effective_path").get(())
    if lengths is None:
        return Verdict(claim, "open", "not measured")
    blocks = float(chosen[0]["blocks"] or 0)
    low, high = (group_values(chosen, [], name)[()].mean for name in ("path_5", "path_95"))
    text = (
        f"{deepest} layers, {blocks:.0f} blocks: the gradient's paths cross {lengths} blocks on average, 90 % of them "
        f"{format_value(low)} to {format_value(high)}; the average path crosses {blocks / 2:.0f}. In the paper: 5 to "
        "17 of 54."
    )
    return Verdict(claim, "holds" if lengths.high < 0.75 * blocks / 2 else "does not hold", text)


def with_and_without(rows: Sequence[Row], value: str) -> dict[int, tuple[SeedValues, SeedValues]]:
    """Pair a result without and with stochastic depth, by depth."""
    found = group_values(rows, ["scheme", "depth"], value)
    depths = sorted(depth for scheme, depth in found if scheme == DROPPED and ("identity", depth) in found)
    return {depth: (found["identity", depth], found[DROPPED, depth]) for depth in depths}


def dropped(rows: Sequence[Row]) -> Verdict:
    """Compare test errors with and without stochastic depth."""
    claim = "Stochastic depth lowers the test error of the deepest network."
    pairs = with_and_without(rows, "intact")
    if not pairs:
        return Verdict(claim, "open", "not measured")
    text = "; ".join(
        f"{depth} layers: {own.text(percent)} with, {twin.text(percent)} without"
        for depth, (twin, own) in pairs.items()
    )
    twin, own = pairs[max(pairs)]
    if own.low <= twin.high and twin.low <= own.high:
        return Verdict(claim, "open", f"Test error, {text}. The seeds overlap.")
    return Verdict(claim, "holds" if own.high < twin.low else "does not hold", f"Test error, {text}.")


def robust(rows: Sequence[Row]) -> Verdict:
    """Compare the rise of the error after eight deleted blocks with and without stochastic depth."""
    claim = "A network trained with stochastic depth loses less accuracy when eight blocks are deleted."
    pairs = with_and_without([{**row, "rise": rise(row)} for row in rows], "rise")
    if not pairs:
        return Verdict(claim, "open", "not measured")
    text = "; ".join(
        f"{depth} layers: {own.text(percent)} with, {twin.text(percent)} without"
        for depth, (twin, own) in pairs.items()
    )
    twin, own = pairs[max(pairs)]
    if own.low <= twin.high and twin.low <= own.high:
        return Verdict(claim, "open", f"Rise in test error, {text}. The seeds overlap.")
    return Verdict(claim, "holds" if own.high < twin.low else "does not hold", f"Rise in test error, {text}.")


def rise(row: Row) -> float | None:
    """Return the rise in test error after eight deleted blocks."""
    intact, less = row.get("intact"), row.get("deleted_8")
    return less - intact if isinstance(intact, float) and isinstance(less, float) else None


STUDIES.add("paths", Paths())
