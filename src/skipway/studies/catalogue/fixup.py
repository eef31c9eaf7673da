"""Fixup: depth in the first epoch, the factor L^(-1/(2m-2)), and small batches, which impair BatchNorm.

Claim:    initialisation alone trains ResNets without normalisation at any depth in the first epoch; without the factor,
          deep networks are slower or fail; unlike BatchNorm, Fixup does not suffer from batches of 2.
Source:   Zhang, Dauphin, Ma 2019, "Fixup Initialization: Residual Learning Without Normalization", fig. 3 and sec. 3.
Command:  skipway study fixup
Hardware: two shared cores of a virtual machine, one process each.
Time:     about 6 minutes (48 cells).
Result:   24 November 2026, digits, width 8, 3 seeds: at 56 layers He initialisation alone fails (90 % test error),
          Fixup trains (3.6 %), and is worse without the factor (5.8 %). With batches of 2, BatchNorm is still better
          than Fixup (3.2 and 7.1 %), although only BatchNorm loses accuracy (2.0 % with batches of 32).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from skipway.inference.metrics import percent
from skipway.models import build
from skipway.report.chart import Figure
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.fit import UNKNOWN_CHANCE, FitSettings, chance_note, chance_of, data_of, fit
from skipway.studies.statistics import SeedValues, group_values, series_over, value_labels
from skipway.studies.study import STUDIES, Study, Verdict

__all__ = ["FixupStudy"]

HE = "He's start, no norm"
label = value_labels({HE: "He initialisation, no norm"})
VARIANTS = {
    "BatchNorm": "identity",
    "Fixup": "fixup",
    "Fixup without the factor": "fixup(rescale=False)",
    HE: "skipinit(init=1.0, norm='remove')",
}
BY_DEPTH = ("Fixup", "Fixup without the factor", HE, "BatchNorm")
BY_BATCH = ("Fixup", "BatchNorm")
FEWER = "Fixup without the factor"
# depths, width, epochs (on digits as many as make the steps of one on CIFAR-10), batch sizes
GRIDS: dict[Budget, tuple[tuple[int, ...], int, int, tuple[int, ...]]] = {
    "cpu": ((20, 56), 8, 8, (2, 4, 8, 32)),
    "gpu": ((20, 56, 110, 1202, 3002), 16, 1, (2, 4, 8, 32, 128)),
    "paper": ((20, 110, 1202, 3002, 10_004), 16, 1, (2, 4, 8, 32, 128)),
}
SMALL_DEPTH, PASSES = 20, 4


class FixupStudy(Study):
    """Test error of Fixup and BatchNorm by depth and by batch size."""

    name = "fixup"
    title = "Fixup: depth, rescaling factor, small batches"
    claim = (
        "Fixup trains ResNets without normalisation at any depth in the first epoch; its depth-dependent factor "
        "matters; batches of 2 impair BatchNorm only."
    )
    source = "Zhang et al. 2019, fig. 3 and sec. 3"
    settings = ("kind", "scheme", "depth", "batch", "lr", "seed", "width", "epochs", "data")
    results = ("test_error", "train_loss", "diverged")
    minutes = "6 minutes on two shared cores"

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        depths, width, epochs, batches = GRIDS[budget]
        common = {"width": width, "data": choices.data}
        seeds = choices.seeds or (0, 1, 2)
        cells = [
            self.cell(kind="depth", scheme=scheme, depth=depth, batch=32, lr=0.05, seed=seed, epochs=epochs, **common)
            for depth in sorted(choices.depths or depths, reverse=True)
            for scheme in choices.schemes or BY_DEPTH
            for seed in seeds
        ]
        # the learning rate is proportional to the batch size (Goyal 2017)
        cells += [
            self.cell(
                kind="batch",
                scheme=scheme,
                depth=SMALL_DEPTH,
                batch=batch,
                lr=0.05 * batch / 32,
                seed=seed,
                epochs=PASSES,
                **common,
            )
            for batch in batches
            for scheme in (choices.schemes or BY_BATCH)
            for seed in seeds
        ]
        return cells

    def dial(self, cell: Cell) -> tuple[str, int]:
        return "resnet-cifar", cell["depth"]

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        data = data_of(cell.get("data"))
        torch.manual_seed(cell["seed"])
        model = build(
            "resnet-cifar",
            depth=cell["depth"],
            scheme=VARIANTS.get(cell["scheme"], cell["scheme"]),
            width=cell["width"],
            stem_width=cell["width"],
            channels=data.channels,
            classes=len(data.classes),
        )
        settings = FitSettings(
            epochs=cell["epochs"],
            lr=cell["lr"],
            batch_size=cell["batch"],
            seed=cell["seed"],
            schedule="constant",
            warmup=0.0,
        )
        return fit(model, data, settings, device)

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        deep = group_values([row for row in rows if row["kind"] == "depth"], ["scheme", "depth"], "test_error")
        small = group_values([row for row in rows if row["kind"] == "batch"], ["scheme", "batch"], "test_error")
        return [any_depth(deep, chance_of(rows)), factor(deep), batches(small)]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        note = chance_note(rows)
        return [
            Figure(
                name="depth",
                title="Test error after the first steps by depth",
                x_label="weight layers",
                y_label="test error",
                log_x=True,
                series=series_over(
                    [row for row in rows if row["kind"] == "depth"], "depth", "test_error", "scheme", label
                ),
                percent=True,
                note=note,
            ),
            Figure(
                name="batch",
                title=f"Test error after {PASSES} epochs by batch size, {SMALL_DEPTH} layers",
                x_label="batch size",
                y_label="test error",
                log_x=True,
                series=series_over(
                    [row for row in rows if row["kind"] == "batch"], "batch", "test_error", "scheme", label
                ),
                percent=True,
                note=note,
            ),
        ]


def errors_by_setting(found: dict[tuple, SeedValues], names: Sequence[str], unit: str) -> str:
    """Format the errors of some variants for each value of the second setting."""
    places = sorted({place for _, place in found})
    return "; ".join(
        f"{place} {unit}: "
        + ", ".join(f"{label(name)} {found[name, place].text(percent)}" for name in names if (name, place) in found)
        for place in places
    )


def any_depth(found: dict[tuple, SeedValues], chance: float | None) -> Verdict:
    """Judge whether Fixup learns at every depth: its errors are below 8/9 of that of chance."""
    claim = "With Fixup, a network without normalisation learns in the first epoch at every depth."
    own = {depth: sample for (name, depth), sample in found.items() if name == "Fixup"}
    if len(own) < 2:
        return Verdict(claim, "open", "not measured at two depths")
    if chance is None:
        return Verdict(claim, "open", UNKNOWN_CHANCE)
    text = f"Test error, {errors_by_setting(found, ('Fixup', 'BatchNorm', HE), 'layers')}."
    learned = [depth for depth, sample in own.items() if sample.high < chance * 8 / 9]
    if len(learned) == len(own):
        return Verdict(claim, "holds", text)
    if not learned:
        return Verdict(claim, "does not hold", text)
    return Verdict(claim, "holds only when", f"the network has {', '.join(map(str, sorted(learned)))} layers. {text}")


def factor(found: dict[tuple, SeedValues]) -> Verdict:
    """Compare the deepest networks with and without L^(-1/(2m-2))."""
    claim = "Without the depth-dependent factor, the deepest network learns worse."
    depths = [depth for name, depth in found if name == FEWER and ("Fixup", depth) in found]
    if not depths:
        return Verdict(claim, "open", "not measured")
    last = max(depths)
    text = f"Test error, {errors_by_setting(found, ('Fixup', FEWER), 'layers')}."
    return Verdict(claim, "holds" if found[FEWER, last].low > found["Fixup", last].high else "does not hold", text)


def batches(found: dict[tuple, SeedValues]) -> Verdict:
    """Compare Fixup and BatchNorm with batches of 2."""
    claim = "Batches of 2 impair BatchNorm more than Fixup."
    if any((name, 2) not in found for name in BY_BATCH):
        return Verdict(claim, "open", "not measured")
    text = f"Test error after {PASSES} epochs, {errors_by_setting(found, BY_BATCH, 'images per batch')}."
    apart = found["BatchNorm", 2].low > found["Fixup", 2].high
    return Verdict(claim, "holds" if apart else "does not hold", text)


STUDIES.add("fixup", FixupStudy())
