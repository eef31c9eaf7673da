"""A residual network as an ensemble of paths: blocks deleted after training, and how long the paths are that matter.

Claim:    deleting a block of a trained residual net changes little, one of a plain net everything; the error rises
          smoothly with the number of deleted blocks; the gradient comes through paths shorter than the average one;
          stochastic depth trains such an ensemble, and 1202 layers with it are better than without.
Source:   Veit et al. 2016, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", fig. 3, 5 and 6;
          Huang et al. 2016, "Deep Networks with Stochastic Depth", sec. 4.
Command:  skipway study paths
Hardware: two shared cores of a virtual machine, one process each.
Time:     about 4 minutes (12 cells), beside other work.
Result:   24 November 2026, digits, width 8, 10 epochs, 3 seeds: one block deleted costs a residual net of 110 layers
          0.9 points of test error, one of 20 layers 9, a plain one of 20 layers 83; the gradient of 54 blocks comes
          through paths of 3.8 in the mean (the average path has 27). 27 November: stochastic depth at 110 layers, 3.8 %
          test error against 2.4 % without, the seeds overlap; 1202 layers are in the other budgets, not measured here.
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
from skipway.studies.fit import FitSettings, data_of, fit, test_error_and_loss
from skipway.studies.statistics import SeedValues, group_values, series_over
from skipway.studies.study import STUDIES, Published, Study, Verdict
from skipway.tracing.chain import Connection, chain

__all__ = ["Paths", "binomial_share", "deleted"]

NAMES = {"identity": "residual", "plain": "plain"}
DROPPED = "stochasticdepth(0.5)"
TITLES = {**NAMES, DROPPED: "stochastic depth"}
COUNTS = (1, 2, 4, 8)
VERY_DEEP = (("identity", 1202), (DROPPED, 1202))
# blocks that are deleted one at a time at most; of more, so many are drawn
ALONE = 54
# (scheme, depth), width, epochs; the plain net as deep as still trains
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
    """Blocks deleted, and the lengths of paths."""

    name = "paths"
    title = "An ensemble of paths: blocks deleted, and the paths that matter"
    claim = (
        "Deleting a block of a trained residual network changes little, of a plain one everything; most of the "
        "gradient comes through short paths."
    )
    source = "Veit et al. 2016, fig. 3, 5 and 6; Huang et al. 2016, sec. 4"
    settings = ("scheme", "depth", "seed", "width", "epochs", "lr", "data")
    results = ("intact", "deleted_1", "deleted_8", "worst", "effective_path")
    minutes = "4 minutes on two cores, beside other work"
    published = (
        Published(
            what="ResNet-110, share of all paths that cross 19 to 35 of 54 blocks",
            value=0.980,
            where={"scheme": "identity", "depth": 110},
            column="paths_19_35",
            source="closed form, Veit et al. 2016, sec. 3 (95 % there)",
        ),
        Published(
            what="ResNet-110, share of all paths that cross 5 to 17 of 54 blocks",
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
        plan = FitSettings(epochs=cell["epochs"], lr=cell["lr"], warmup=0.2, seed=cell["seed"], batch_size=batch)
        row = fit(model, data, plan, device)
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
        named = [{**row, "net": f"{TITLES.get(str(row['scheme']), row['scheme'])} {row['depth']}"} for row in rows]
        lines = []
        for net in dict.fromkeys(str(row["net"]) for row in named):
            own = [row for row in named if row["net"] == net]
            samples = [(0, group_values(own, [], "intact").get(()))]
            samples += [(count, group_values(own, [], f"deleted_{count}").get(())) for count in COUNTS]
            points = [Point(count, s.mean, s.low, s.high, len(s.values)) for count, s in samples if s is not None]
            lines.append(Series(net, tuple(points)))
        residual = [row for row in named if row["scheme"] == "identity"]
        lengths = (
            *series_over([{**row, "of": "the gradient's paths"} for row in residual], "blocks", "effective_path", "of"),
            Series.of(
                "all paths, L / 2",
                sorted({(float(row["blocks"] or 0), float(row["blocks"] or 0) / 2) for row in residual}),
                "theory",
            ),
        )
        return [
            Figure(
                name="deleted",
                title="Test error by blocks deleted",
                x_label="blocks deleted",
                y_label="test error",
                series=tuple(lines),
                percent=True,
            ),
            Figure(
                name="lengths",
                title="Mean length of paths, in blocks",
                x_label="blocks",
                y_label="blocks that a path crosses",
                series=lengths,
            ),
        ]


@contextmanager
def deleted(connections: Sequence[Connection]) -> Iterator[None]:
    """The connections pass on what they are given: the branch silenced, a cut skip closed; undone afterwards."""
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
    """Test errors without one block, each in turn, and without several, drawn; blocks that change shapes stay."""
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
    """How many branches the gradient's paths cross: of each connection the share of the squared gradient that comes
    through the branch; with independent connections the length is the sum of as many coins.
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
    """The smallest length up to which so much lies.

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
    """Share of the 2^n paths through n blocks that cross `low` to `high` of them.

    >>> round(binomial_share(54, 19, 35), 3), round(binomial_share(54, 5, 17), 5)
    (0.98, 0.00454)
    """
    return sum(math.comb(blocks, k) for k in range(low, min(high, blocks) + 1)) / 2**blocks


def one_block(rows: Sequence[Row]) -> Verdict:
    """Residual against plain."""
    claim = "Without one block a residual net is nearly as good (within 3 points), a plain net is not."
    found = {name: group_values(rows, ["scheme", "depth"], name) for name in ("intact", "deleted_1", "worst")}
    if not {key[0] for key in found["intact"]} >= set(NAMES):
        return Verdict(claim, "open", "not measured")
    parts, little, much = [], [], []
    for key, sample in found["intact"].items():
        if key[0] not in NAMES:
            continue
        rise = found["deleted_1"][key].mean - sample.mean
        if key[0] == "plain":
            much.append(rise > 0.3)
        elif rise < 0.03:
            little.append(key[1])
        parts.append(
            f"{NAMES[key[0]]} {key[1]}: intact {sample.text(percent)}, one deleted "
            f"{found['deleted_1'][key].text(percent)}, the worst {found['worst'][key].text(percent)}"
        )
    text = f"Test error, {'; '.join(parts)}."
    if not little or not all(much):
        return Verdict(claim, "does not hold", text)
    if len(little) + len(much) < len(parts):
        return Verdict(claim, "holds only when", f"there are {', '.join(map(str, little))} layers. {text}")
    return Verdict(claim, "holds", text)


def smooth(rows: Sequence[Row]) -> Verdict:
    """More and more blocks."""
    claim = "The error of the deepest residual net rises smoothly with the number of deleted blocks."
    own = [row for row in rows if row["scheme"] == "identity"]
    deepest = max((int(row["depth"] or 0) for row in own), default=0)
    chosen = [row for row in own if row["depth"] == deepest]
    found = [(count, group_values(chosen, [], f"deleted_{count}").get(())) for count in COUNTS]
    means = [sample.mean for _, sample in found if sample is not None]
    if len(means) < len(COUNTS):
        return Verdict(claim, "open", "not measured")
    text = ", ".join(f"{count} deleted {sample.text(percent)}" for count, sample in found if sample is not None)
    holds = all(later >= earlier - 0.01 for earlier, later in pairwise(means)) and means[0] < 0.2
    return Verdict(claim, "holds" if holds else "does not hold", f"{deepest} layers: {text}.")


def short(rows: Sequence[Row]) -> Verdict:
    """The gradient's paths against the average one."""
    claim = "The gradient of the deepest net flows along paths much shorter than the average path of L / 2 blocks."
    own = [row for row in rows if row["scheme"] == "identity"]
    deepest = max((int(row["depth"] or 0) for row in own), default=0)
    chosen = [row for row in own if row["depth"] == deepest]
    lengths = group_values(chosen, [], "effective_path").get(())
    if lengths is None:
        return Verdict(claim, "open", "not measured")
    blocks = float(chosen[0]["blocks"] or 0)
    low, high = (group_values(chosen, [], name)[()].mean for name in ("path_5", "path_95"))
    text = (
        f"{deepest} layers, {blocks:.0f} blocks: {lengths} blocks on average, 90 % of it from {format_value(low)} to "
        f"{format_value(high)}, where the average path crosses {blocks / 2:.0f}. The paper: 5 to 17 of 54."
    )
    return Verdict(claim, "holds" if lengths.high < 0.75 * blocks / 2 else "does not hold", text)


def with_and_without(rows: Sequence[Row], value: str) -> dict[int, tuple[SeedValues, SeedValues]]:
    """A result without and with stochastic depth, by depth."""
    found = group_values(rows, ["scheme", "depth"], value)
    depths = sorted(depth for scheme, depth in found if scheme == DROPPED and ("identity", depth) in found)
    return {depth: (found["identity", depth], found[DROPPED, depth]) for depth in depths}


def dropped(rows: Sequence[Row]) -> Verdict:
    """Stochastic depth as a regulariser."""
    claim = "With stochastic depth the deepest net has the smaller test error."
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
    """Stochastic depth against deleted blocks."""
    claim = "A net trained with stochastic depth loses less when eight blocks are deleted."
    pairs = with_and_without([{**row, "rise": rise(row)} for row in rows], "rise")
    if not pairs:
        return Verdict(claim, "open", "not measured")
    text = "; ".join(
        f"{depth} layers: {own.text(percent)} with, {twin.text(percent)} without"
        for depth, (twin, own) in pairs.items()
    )
    twin, own = pairs[max(pairs)]
    if own.low <= twin.high and twin.low <= own.high:
        return Verdict(claim, "open", f"Test error rises, {text}. The seeds overlap.")
    return Verdict(claim, "holds" if own.high < twin.low else "does not hold", f"Test error rises, {text}.")


def rise(row: Row) -> float | None:
    """What eight deleted blocks cost."""
    intact, less = row.get("intact"), row.get("deleted_8")
    return less - intact if isinstance(intact, float) and isinstance(less, float) else None


STUDIES.add("paths", Paths())
