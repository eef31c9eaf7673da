"""ConvNeXt ablation: effect of the skip, the position of the norm, the large kernel and LayerScale without attention.

Claim:    a block without attention performs as well as a transformer block: depthwise 7×7 convolution, one norm inside
          the branch, a clean skip; each of these parts lowers the error.
Source:   Liu et al. 2022, "A ConvNet for the 2020s", sec. 2 and fig. 2.
Command:  skipway study convnext-parts
Hardware: two shared cores of a virtual machine, one process each.
Time:     about 6 minutes (84 cells), on a loaded machine.
Result:   27 November 2026, digits, width 8, 4 epochs, 3 seeds: the skip is decisive (24 blocks: 47.7 % test error
          without, 5.8 % with), the kernel matters at 6 blocks (11.8 % with 3, 7.7 % with 7). The position of the norm,
          the norm itself and LayerScale make no difference beyond the range of the seeds; at 6 blocks LayerScale costs
          2 points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from skipway.inference.metrics import percent
from skipway.models import build
from skipway.nn import LayerNorm2d, XavierNormal
from skipway.nn.initial import FanInNormal
from skipway.report.chart import Figure
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.fit import FitSettings, data_of, fit, restart_
from skipway.studies.statistics import SeedValues, best_rate_rows, group_values, series_over, value_labels
from skipway.studies.study import STUDIES, Published, Study, Verdict
from skipway.tracing.chain import chain

__all__ = ["ConvNeXtParts"]

GAMMA = "layerscale(init=1e-6)"


@dataclass(frozen=True)
class ConvNeXtVariant:
    """A ConvNeXt with one part changed: scheme, kernel size, or a change in place after the network is built."""

    scheme: str = GAMMA
    kernel: int = 7
    change: Callable[[nn.Module], None] | None = None


def remove_norms(model: nn.Module) -> None:
    """Remove the norms of all branches of `model`, in place; stem, downsampling and head keep theirs."""
    for connection in chain(model):
        connection.residual.branch.inside = nn.Identity()


def norm_after_addition(model: nn.Module) -> None:
    """Move the norm of every branch of `model` to after the addition, in place."""
    remove_norms(model)
    for connection in chain(model):
        connection.residual.post = LayerNorm2d(connection.site.dim)


COMPLETE, NO_GAMMA, NO_SKIP = "all parts", "no LayerScale", "no skip, no LayerScale"
BEFORE, AFTER, NO_NORM, SMALL = "norm before the branch", "norm behind the addition", "no norm in branches", "kernel 3"
VARIANTS = {
    COMPLETE: ConvNeXtVariant(),
    NO_GAMMA: ConvNeXtVariant("identity"),
    # without the skip, a γ of 1e-6 would block the signal
    NO_SKIP: ConvNeXtVariant("plain"),
    SMALL: ConvNeXtVariant(kernel=3),
    BEFORE: ConvNeXtVariant(f"preactivation + {GAMMA}"),
    AFTER: ConvNeXtVariant(change=norm_after_addition),
    NO_NORM: ConvNeXtVariant(change=remove_norms),
}
label = value_labels({AFTER: "norm after the addition"})
# depths in blocks, width, epochs, learning rates
GRIDS: dict[Budget, tuple[tuple[int, ...], int, int, tuple[float, ...]]] = {
    "cpu": ((6, 24), 8, 4, (4e-3, 1.6e-2)),
    "gpu": ((6, 18, 36, 72), 48, 40, (1e-3, 4e-3, 1.6e-2)),
    "paper": ((18, 36, 72), 96, 300, (1e-3, 4e-3)),
}


class ConvNeXtParts(Study):
    """Test error with each part of the block removed or moved."""

    name = "convnext-parts"
    title = "ConvNeXt ablation: skip, norm, kernel, LayerScale"
    claim = (
        "Blocks without attention train at the depths of transformers with a clean skip, one norm inside the branch, a "
        "large kernel and LayerScale, each of which lowers the error."
    )
    source = "Liu et al. 2022, sec. 2 and fig. 2"
    settings = ("scheme", "depth", "lr", "seed", "width", "epochs", "data")
    results = ("train_error", "test_error", "train_loss", "diverged")
    minutes = "6 minutes on two cores under load"
    published = (
        Published(
            what="ConvNeXt-T, 18 blocks, test error on ImageNet",
            value=0.179,
            where={"scheme": COMPLETE, "depth": 18, "width": 96, "dataset": "imagenet"},
            column="test_error",
            source="Liu et al. 2022, table 1",
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

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        data = data_of(cell.get("data"))
        torch.manual_seed(cell["seed"])
        variant, depth = VARIANTS.get(cell["scheme"], ConvNeXtVariant(cell["scheme"])), cell["depth"]
        small = data.size < 32
        model = build(
            "convnext",
            depth=depth,
            blocks=(depth - depth // 2, depth // 2),
            width=cell["width"],
            patch=1 if small else 2,
            kernel=variant.kernel,
            scheme=variant.scheme,
            channels=data.channels,
            classes=len(data.classes),
        )
        restart_(model, {nn.Linear: XavierNormal(), nn.Conv2d: FanInNormal()})
        if variant.change is not None:
            variant.change(model)
        settings = FitSettings(
            epochs=cell["epochs"],
            lr=cell["lr"],
            batch_size=64 if small else 128,
            optimizer="adamw",
            weight_decay=0.05,
            warmup=0.1,
            clip=1.0,
            seed=cell["seed"],
        )
        return fit(model, data, settings, device)

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        errors = group_values(best_rate_rows(rows), ["scheme", "depth"], "test_error")
        return [
            judge_part(errors, "A ConvNeXt without skips learns worse (both without LayerScale).", NO_GAMMA, NO_SKIP),
            judge_part(errors, "A 3×3 kernel is worse than a 7×7 kernel.", COMPLETE, SMALL),
            judge_part(errors, "A ConvNeXt without LayerScale learns worse.", COMPLETE, NO_GAMMA),
            judge_part(errors, "A norm before the branch is worse than a norm inside it.", COMPLETE, BEFORE),
            judge_part(errors, "A norm after the addition is worse than a norm inside the branch.", COMPLETE, AFTER),
            judge_part(errors, "A ConvNeXt without norms in its branches learns worse.", COMPLETE, NO_NORM),
        ]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        return [
            Figure(
                name=value.replace("_", "-"),
                title=f"{what} at the best learning rate",
                x_label="blocks",
                y_label=what.lower(),
                log_x=True,
                series=series_over(best_rate_rows(rows), "depth", value, "scheme", label),
                percent=True,
                note="Learning rate with the lowest mean training error over the seeds.",
            )
            for value, what in (("test_error", "Test error"), ("train_error", "Training error"))
        ]


def judge_part(errors: dict[tuple, SeedValues], claim: str, complete: str, reduced: str) -> Verdict:
    """Judge whether the error is higher without a part, by depth and beyond the range of the seeds."""
    depths = sorted(depth for name, depth in errors if name == reduced and (complete, depth) in errors)
    if not depths:
        return Verdict(claim, "open", "not measured")
    text = "; ".join(
        f"{depth} blocks: {label(reduced)} {errors[reduced, depth].text(percent)}, "
        f"{complete} {errors[complete, depth].text(percent)}"
        for depth in depths
    )
    text = f"Test error, {text}."
    worse = [depth for depth in depths if errors[reduced, depth].low > errors[complete, depth].high]
    better = [depth for depth in depths if errors[reduced, depth].high < errors[complete, depth].low]
    if worse and worse != depths:
        return Verdict(claim, "holds only when", f"the network has {', '.join(map(str, worse))} blocks. {text}")
    if worse or better:
        return Verdict(claim, "holds" if worse else "does not hold", text)
    return Verdict(claim, "open", f"{text} The seeds overlap.")


STUDIES.add("convnext-parts", ConvNeXtParts())
