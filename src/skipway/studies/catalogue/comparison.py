"""All schemes side by side: depth and learning rate they tolerate, need for a norm, time per step, memory.

Claim:    a skip decides whether deep networks train; schemes whose branches are silent at initialisation tolerate
          larger depths and learning rates; schemes cost next to nothing, and those without normalisation need less
          memory for the backward pass.
Source:   the papers of `skipway schemes`; the first epochs by depth follow Bachlechner et al. 2020, "ReZero is All You
          Need", and Zhang et al. 2019, "Fixup Initialization".
Command:  skipway study schemes
Hardware: two shared cores of a virtual machine, one process each.
Time:     about 10 minutes (588 cells), estimated from single cells; 21 minutes on a loaded machine.
Result:   27 November 2026, digits, width 4, 90 steps, 3 seeds: every scheme with a skip trains 110 layers, the plain
          network does not (86.4 % test error); rezero, skipinit and depthscaled are best (4.9 to 5.9 %). At a learning
          rate of 1 only preactivation, normfree and depthscaled train; identity trains at 0.01 only. Without norms, 56
          layers train if the branches start small. Not every scheme is free (a step of normfree takes 1.5 times as
          long), and those without norm need more memory (1.2 to 1.4 times as much).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import nn

from skipway.data import Data
from skipway.inference.metrics import percent
from skipway.models import build
from skipway.report.chart import Figure
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.fit import (
    UNKNOWN_CHANCE,
    FitSettings,
    chance_note,
    data_of,
    dataset_name,
    fit,
    fit_batch,
    trained_error,
)
from skipway.studies.statistics import SeedValues, best_rate_rows, group_values, series_over
from skipway.studies.study import STUDIES, Study, Verdict
from skipway.surgery.saved_tensors import saved_bytes

__all__ = ["SchemeComparison"]

RATES = (0.01, 0.1, 1.0)
ROUNDS = 20
SCHEMES = (
    *("plain", "identity", "preactivation", "zeroinit", "skipinit", "rezero"),
    *("fixup", "layerscale", "normfree", "deepnorm", "depthscaled", "stochasticdepth"),
)
"""Those of one stream that have to do with depth; `scheme-table` has all."""
# schemes with an option of their own that removes the norm; the others are combined with skipinit, its scalar at 1
NORMLESS = {"skipinit": "skipinit(norm='remove')", "rezero": "rezero(norm='remove')"}
FREE = {"fixup": "no (removes it)", "normfree": "no (standardises weights)"}
SMALL = {"zeroinit", "skipinit", "rezero", "layerscale", "depthscaled"}
SILENT = ("zeroinit", "rezero", "normfree", "fixup")
# depths, depths without norm, width, epochs
GRIDS: dict[Budget, tuple[tuple[int, ...], tuple[int, ...], int, int]] = {
    "cpu": ((8, 20, 56, 110), (20, 56), 4, 2),
    "gpu": ((8, 20, 56, 110), (20, 56), 16, 20),
    "paper": ((20, 56, 110, 1202), (20, 56), 16, 164),
}


class SchemeComparison(Study):
    """Trainability, error, time and memory of every scheme."""

    name = "schemes"
    title = "All schemes side by side"
    claim = (
        "A skip decides whether deep networks train; schemes whose branches are silent at initialisation tolerate "
        "larger depths and learning rates; no scheme costs much."
    )
    source = "the schemes' papers"
    settings = ("kind", "scheme", "depth", "lr", "seed", "width", "epochs", "data")
    results = ("train_error", "test_error", "diverged", "kept", "times")
    minutes = "10 minutes on two cores, 21 under load"

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        depths, without, width, epochs = GRIDS[budget]
        names, seeds = choices.schemes or SCHEMES, choices.seeds or (0, 1, 2)
        common = {"width": width, "epochs": epochs, "data": choices.data}
        cells = [
            self.cell(kind="as it is", scheme=name, depth=depth, lr=rate, seed=seed, **common)
            for depth in sorted(choices.depths or depths, reverse=True)
            for seed in seeds
            for name in names
            for rate in RATES
        ]
        cells += [
            self.cell(kind="no norm", scheme=name, depth=depth, lr=rate, seed=seed, **common)
            for depth in sorted(without, reverse=True)
            for seed in seeds
            for name in names
            if name not in FREE
            for rate in RATES[:2]
        ]
        cells += [
            self.cell(kind="cost", scheme=name, depth=max(without), seed=seed, width=width, data=choices.data)
            for seed in seeds
            for name in names
        ]
        return cells

    def dial(self, cell: Cell) -> tuple[str, int]:
        return "resnet-cifar", cell["depth"]

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        data = data_of(cell.get("data"))
        spec = cell["scheme"]
        if cell["kind"] == "no norm":
            spec = NORMLESS.get(spec, f"{spec} + skipinit(init=1.0, norm='remove')")
        torch.manual_seed(cell["seed"])
        model = build_resnet(spec, cell, data.channels, len(data.classes))
        batch = 32 if data.size < 32 else 128
        twin = build_resnet("identity", cell, data.channels, len(data.classes))
        if cell["kind"] == "cost":
            own, other = step_times([model, twin], data, batch, device)
            return {"times": own / other, "dataset": dataset_name(data)}
        images = data.sample(batch, seed=cell["seed"], device=torch.device("cpu")).inputs
        kept = saved_bytes(model, images) / saved_bytes(twin, images)
        settings = FitSettings(epochs=cell["epochs"], lr=cell["lr"], warmup=0.1, seed=cell["seed"], batch_size=batch)
        return {**fit(model, data, settings, device), "kept": kept}

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        found = {str(line["scheme"]): line for line in self.summary(rows)}
        unchanged, bare = ([row for row in rows if row["kind"] == kind] for kind in ("as it is", "no norm"))
        return [
            skips_decide(errors_of(unchanged), trained_error(unchanged)),
            silent_stand(errors_of(unchanged), trained_error(unchanged)),
            norm_needed(errors_of(bare), trained_error(bare)),
            cheap(found),
            less_memory(found),
        ]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        unchanged = [row for row in rows if row["kind"] == "as it is"]
        deepest = max((int(row["depth"] or 0) for row in unchanged), default=0)
        return [
            Figure(
                name="depth",
                title="Test error at the best learning rate",
                x_label="weight layers",
                y_label="test error",
                log_x=True,
                series=series_over(best_rate_rows(unchanged), "depth", "test_error", "scheme"),
                percent=True,
                note=chance_note(unchanged),
            ),
            Figure(
                name="rate",
                title=f"Test error by learning rate, {deepest} layers",
                x_label="learning rate",
                y_label="test error",
                log_x=True,
                series=series_over([row for row in unchanged if row["depth"] == deepest], "lr", "test_error", "scheme"),
                percent=True,
                note=chance_note(unchanged),
            ),
        ]

    def summary(self, rows: Sequence[Row]) -> list[Row]:
        """One row per scheme: need for a norm, largest depth and learning rate, test errors, time and memory."""
        unchanged = [row for row in rows if row["kind"] == "as it is"]
        errors, bare = errors_of(unchanged), errors_of([row for row in rows if row["kind"] == "no norm"])
        reached = group_values(best_rate_rows(unchanged), ["scheme", "depth"], "test_error")
        kept, times = group_values(unchanged, ["scheme"], "kept"), group_values(rows, ["scheme"], "times")
        lines: list[Row] = []
        limit = trained_error(unchanged)
        deep = largest_depth(errors)
        for name in dict.fromkeys(str(row["scheme"]) for row in unchanged):
            trained = [
                (depth, rate) for (own, depth, rate), sample in errors.items() if own == name and learned(sample, limit)
            ]
            depths = sorted(depth for own, depth in reached if own == name)
            alone = max(
                (depth for (own, depth, _), sample in bare.items() if own == name and learned(sample, limit)), default=0
            )
            measured = None if limit is None else f"no, up to {alone} layers" if alone else "yes"
            line: Row = {
                "scheme": name,
                "needs normalisation": FREE.get(name, measured),
                "largest depth that trains": max((depth for depth, _ in trained), default=None),
                f"largest learning rate, {deep} layers": max(
                    (rate for depth, rate in trained if depth == deep), default=None
                ),
            }
            for depth in depths:
                line[f"test error, {depth} layers"] = reached[name, depth].text(percent).partition(" (")[0]
            line["time per step"] = times[name,].mean if (name,) in times else None
            line["memory for backward"] = kept[name,].mean if (name,) in kept else None
            lines.append(line)
        return lines


def build_resnet(spec: str, cell: Cell, channels: int, classes: int) -> nn.Module:
    """Build a ResNet for small images with a scheme."""
    sizes = {"width": cell["width"], "stem_width": cell["width"], "channels": channels, "classes": classes}
    return build("resnet-cifar", depth=cell["depth"], scheme=spec, **sizes)


def errors_of(rows: Sequence[Row]) -> dict[tuple, SeedValues]:
    """Group test errors by scheme, depth and learning rate."""
    return group_values(rows, ["scheme", "depth", "lr"], "test_error")


def learned(sample: SeedValues, limit: float | None) -> bool:
    """Return whether the median seed has learned; without norm, single seeds fail at any depth."""
    return limit is not None and median(sample.values) < limit


def step_times(models: Sequence[nn.Module], data: Data, batch_size: int, device: str) -> list[float]:
    """Measure the seconds per step of several networks: the minimum over rounds in which they alternate, so that other
    load on the machine has little influence; on a CPU, processor time. The weights do not change (learning rate 0).
    """
    place = torch.device(device)
    batch = next(iter(data.train_batches(seed=0, epoch=0, batch_size=batch_size, device=place)))
    optimizers = [torch.optim.SGD(model.to(place).train().parameters(), lr=0.0) for model in models]
    clock = time.process_time if place.type == "cpu" else time.perf_counter
    least = [math.inf] * len(models)
    for _ in range(ROUNDS):
        for number, (model, chosen) in enumerate(zip(models, optimizers, strict=True)):
            began = clock()
            float(fit_batch(model, chosen, batch, None).sum())  # waits for a GPU
            least[number] = min(least[number], clock() - began)
    return least


def largest_depth(errors: Mapping[tuple, SeedValues]) -> int:
    """Return the largest depth; 0 without errors."""
    return max((depth for _, depth, _ in errors), default=0)


def trained_and_failed(errors: Mapping[tuple, SeedValues], depth: int, limit: float) -> tuple[list[str], list[str]]:
    """Return the schemes that learn at a depth at some learning rate, and those that do not."""
    names = dict.fromkeys(name for name, own, _ in errors if own == depth)
    good = [
        name
        for name in names
        if any(learned(sample, limit) for (own, at, _), sample in errors.items() if (own, at) == (name, depth))
    ]
    return good, [name for name in names if name not in good]


def skips_decide(errors: Mapping[tuple, SeedValues], limit: float | None) -> Verdict:
    """Judge whether every scheme but plain trains the deepest networks."""
    claim = "At the largest depth, every scheme with a skip trains at some learning rate, the plain network at none."
    if limit is None:
        return Verdict(claim, "open", UNKNOWN_CHANCE if errors else "not measured")
    depth = largest_depth(errors)
    good, bad = trained_and_failed(errors, depth, limit)
    if "plain" not in {*good, *bad} or len(good) + len(bad) < 3:
        return Verdict(claim, "open", "not measured")
    text = (
        f"{depth} layers, test error of the median seed below {100 * limit:.3g} %: {', '.join(good) or 'none'}; "
        f"not below: {', '.join(bad)}."
    )
    if bad == ["plain"]:
        return Verdict(claim, "holds", text)
    if "plain" in good or not good:
        return Verdict(claim, "does not hold", text)
    return Verdict(claim, "holds only when", f"the scheme is {', '.join(good)}. {text}")


def silent_stand(errors: Mapping[tuple, SeedValues], limit: float | None) -> Verdict:
    """Compare the largest learning rates at which the deepest networks train."""
    claim = (
        "At the largest depth, schemes whose branches are silent at initialisation tolerate a larger learning rate "
        "than identity."
    )
    if limit is None:
        return Verdict(claim, "open", UNKNOWN_CHANCE if errors else "not measured")
    depth = largest_depth(errors)
    most = {
        name: max(
            (rate for (own, at, rate), s in errors.items() if (own, at) == (name, depth) and learned(s, limit)),
            default=0.0,
        )
        for name in dict.fromkeys(name for name, own, _ in errors if own == depth)
    }
    asked = [name for name in SILENT if name in most]
    if "identity" not in most or not asked:
        return Verdict(claim, "open", "not measured")
    text = f"Largest learning rate that trains {depth} layers: " + ", ".join(
        f"{name} {f'{rate:g}' if rate else 'none'}" for name, rate in most.items()
    )
    larger = [name for name in asked if most[name] > most["identity"]]
    if larger and len(larger) < len(asked):
        return Verdict(claim, "holds only when", f"the scheme is {', '.join(larger)}. {text}.")
    return Verdict(claim, "holds" if larger else "does not hold", f"{text}.")


def norm_needed(errors: Mapping[tuple, SeedValues], limit: float | None) -> Verdict:
    """Judge whether branches that start small are needed to train without norms."""
    claim = "Without normalisation, only networks whose branches start small train."
    if limit is None:
        return Verdict(claim, "open", UNKNOWN_CHANCE if errors else "not measured")
    found = {depth: trained_and_failed(errors, depth, limit) for depth in sorted({depth for _, depth, _ in errors})}
    if not found or any(not {"identity", *SMALL} <= {*good, *bad} for good, bad in found.values()):
        return Verdict(claim, "open", "not measured")
    parts = "; ".join(
        f"{depth} layers: {', '.join(good) or 'none'}; not below: {', '.join(bad) or 'none'}"
        for depth, (good, bad) in found.items()
    )
    text = f"Test error of the median seed below {100 * limit:.3g} % at a learning rate of 0.01 or 0.1, {parts}."
    kept = [depth for depth, (good, _) in found.items() if good and set(good) <= SMALL]
    if kept and len(kept) < len(found):
        return Verdict(claim, "holds only when", f"the network has {', '.join(map(str, kept))} layers. {text}")
    return Verdict(claim, "holds" if kept else "does not hold", text)


def cheap(found: Mapping[str, Row]) -> Verdict:
    """Judge whether a step takes at most 1.25 times as long as with identity."""
    claim = "No scheme makes a step more than 25 % slower than the plain residual connection."
    ratios = {name: line["time per step"] for name, line in found.items() if line["time per step"] is not None}
    if len(ratios) < 3:
        return Verdict(claim, "open", "not measured")
    text = "Time per step relative to identity: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    slow = [name for name, ratio in ratios.items() if float(ratio or 0) > 1.25]
    return Verdict(claim, "does not hold" if slow else "holds", f"{text}.")


def less_memory(found: Mapping[str, Row]) -> Verdict:
    """Compare the memory for the backward pass with and without norm."""
    claim = "Schemes that remove the norm need less memory for the backward pass than identity."
    kept = {name: float(line["memory for backward"] or 0) for name, line in found.items()}
    if "identity" not in kept or not set(FREE) <= set(kept):
        return Verdict(claim, "open", "not measured")
    text = "Bytes saved for the backward pass, relative to identity: " + ", ".join(
        f"{name} {ratio:.2f}" for name, ratio in kept.items()
    )
    less = [name for name in FREE if kept[name] < 0.99]
    if less and len(less) < len(FREE):
        return Verdict(claim, "holds only when", f"the scheme is {', '.join(less)}. {text}.")
    return Verdict(claim, "holds" if less else "does not hold", f"{text}.")


STUDIES.add("schemes", SchemeComparison())
