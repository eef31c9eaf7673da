"""Position of the norm: pre- or post-activation, pre- or post-norm, with and without warm-up.

Claim:    a post-norm transformer needs a warm-up, a pre-norm transformer does not; pre-activation improves a ResNet
          slightly at 110 layers and considerably at 1001.
Source:   He et al. 2016, "Identity Mappings in Deep Residual Networks", tables 2-4; Xiong et al. 2020, "On Layer
          Normalization in the Transformer Architecture", fig. 2 and sec. 3.
Command:  skipway study norm-placement
Hardware: two shared cores of a virtual machine, one process each.
Time:     about 5 minutes (48 cells).
Result:   24 November 2026, digits, 3 seeds: post-norm needs its warm-up at 16 blocks (training error 90.6 % without,
          43.7 ± 42.3 % with) but not at 4; pre-norm trains without a warm-up, though better with one (10.3 and 2.8 %);
          at 56 layers the seeds of pre- and post-activation overlap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from skipway.inference.metrics import percent
from skipway.models import build
from skipway.report.chart import Figure
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.fit import UNKNOWN_CHANCE, FitSettings, data_of, fit, trained_error, xavier_
from skipway.studies.statistics import group_values, series_over
from skipway.studies.study import STUDIES, Published, Study, Verdict

__all__ = ["NormPlacement"]

RESNETS = {"post-activation": "identity", "pre-activation": "preactivation"}
TRANSFORMERS = {"post-norm": "post", "pre-norm": "pre"}
# depths of ResNet and ViT, width, epochs of each
GRIDS: dict[Budget, tuple[tuple[int, ...], tuple[int, ...], int, int, int]] = {
    "cpu": ((20, 56), (4, 16), 8, 6, 6),
    "gpu": ((20, 56, 110, 164), (6, 12, 24, 48), 16, 60, 60),
    "paper": ((110, 164, 1001), (12, 24, 48), 16, 164, 100),
}
WARM = 0.2


class NormPlacement(Study):
    """Errors with the norm before the branch and after the addition, by depth."""

    name = "norm-placement"
    title = "Position of the norm: before the branch or after the addition"
    claim = (
        "Post-norm transformers need a warm-up, pre-norm transformers do not; pre-activation improves a ResNet more, "
        "the deeper it is."
    )
    source = "He et al. 2016, tables 2-4; Xiong et al. 2020, sec. 3 and fig. 2"
    settings = ("family", "scheme", "depth", "warmup", "seed", "width", "epochs", "lr", "data")
    results = ("train_error", "test_error", "train_loss", "diverged")
    minutes = "5 minutes on two shared cores"
    specs = False
    published = tuple(
        Published(
            what=f"{name} ResNet-{depth}, test error",
            value=error,
            where={"scheme": name, "depth": depth, "warmup": WARM, "dataset": "cifar10", "width": 16},
            column="test_error",
            source=f"He et al. 2016, {table}",
        )
        for name, depth, error, table in (
            ("post-activation", 110, 0.0661, "table 2"),
            ("pre-activation", 110, 0.0637, "table 2"),
            ("post-activation", 164, 0.0593, "table 2"),
            ("pre-activation", 164, 0.0546, "table 2"),
            ("pre-activation", 1001, 0.0492, "table 4"),
        )
    )

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        convolutional, attentive, width, epochs, passes = GRIDS[budget]
        cells = []
        for family, names, depths in (("resnet", RESNETS, convolutional), ("vit", TRANSFORMERS, attentive)):
            for depth in sorted(choices.depths or depths, reverse=True):
                for seed in choices.seeds or (0, 1, 2):
                    for warmup in (0.0, WARM):
                        for scheme in names:
                            if choices.schemes and scheme not in choices.schemes:
                                continue
                            settings = {"scheme": scheme, "depth": depth, "warmup": warmup, "seed": seed}
                            how = (
                                {"width": width, "epochs": epochs, "lr": 0.1}
                                if family == "resnet"
                                else {"width": 4 * width, "epochs": passes, "lr": 2e-3}
                            )
                            cells.append(self.cell(family=family, **settings, **how, data=choices.data))
        return cells

    def dial(self, cell: Cell) -> tuple[str, int] | None:
        return ("resnet", cell["depth"]) if cell["family"] == "resnet" else None

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        data = data_of(cell.get("data"))
        torch.manual_seed(cell["seed"])
        common = {"depth": cell["depth"], "channels": data.channels, "classes": len(data.classes)}
        small = data.size < 32
        if cell["family"] == "resnet":
            width, scheme = cell["width"], RESNETS[cell["scheme"]]
            name = "resnet-cifar" if (cell["depth"] - 2) % 6 == 0 else "resnet"
            model = build(name, scheme=scheme, width=width, stem_width=width, **common)
            how = {"optimizer": "sgd", "weight_decay": 1e-4}
        else:
            model = build(
                "vit",
                dim=cell["width"],
                heads=4,
                ratio=2.0,
                patch=2 if small else 4,
                image=data.size,
                norm=TRANSFORMERS[cell["scheme"]],
                pooling="mean",
                **common,
            )
            xavier_(model)
            how = {"optimizer": "adamw", "weight_decay": 0.01}
        settings = FitSettings(
            epochs=cell["epochs"],
            lr=cell["lr"],
            warmup=cell["warmup"],
            seed=cell["seed"],
            batch_size=(64 if cell["family"] == "resnet" else 32) if small else 128,
            **how,  # type: ignore[arg-type]
        )
        return fit(model, data, settings, device)

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [
            needs_warmup(rows),
            needs_none(rows),
            deeper_helps(rows),
        ]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        figures = []
        for family, title in (("vit", "ViT, AdamW"), ("resnet", "ResNet, SGD")):
            own = [{**row, "variant": variant(row)} for row in rows if row["family"] == family]
            for value, what in (("train_error", "training error"), ("test_error", "test error")):
                figures.append(
                    Figure(
                        name=f"{family}-{value.replace('_', '-')}",
                        title=f"{title}: {what}",
                        x_label="weight layers" if family == "resnet" else "transformer blocks",
                        y_label=what,
                        log_x=True,
                        series=series_over(own, "depth", value, "variant"),
                        percent=True,
                    )
                )
        return figures


def variant(row: Row) -> str:
    """Name of a row's series in a figure."""
    return f"{row['scheme']}, {'warm-up' if row['warmup'] else 'no warm-up'}"


def warmup_errors(errors: dict, names: Sequence[str], depth: int) -> str:
    """Format the errors of some variants at a depth, with and without warm-up."""
    parts = [
        f"{name} {'with' if warmup else 'without'} warm-up {errors[name, depth, warmup].text(percent)}"
        for name in names
        for warmup in (0.0, WARM)
        if (name, depth, warmup) in errors
    ]
    return f"{depth} blocks: " + ", ".join(parts)


def needs_warmup(rows: Sequence[Row]) -> Verdict:
    """Judge whether post-norm is worse without warm-up, beyond the range of the seeds."""
    claim = "A post-norm transformer trains much worse without a warm-up at the same peak learning rate."
    errors = group_values(rows, ["scheme", "depth", "warmup"], "train_error")
    depths = sorted({depth for name, depth, _ in errors if name == "post-norm"})
    both = [depth for depth in depths if {("post-norm", depth, 0.0), ("post-norm", depth, WARM)} <= set(errors)]
    if not both:
        return Verdict(claim, "open", "not measured")
    worse = [d for d in both if errors["post-norm", d, 0.0].low > errors["post-norm", d, WARM].high]
    text = "Training error, " + "; ".join(warmup_errors(errors, ["post-norm"], depth) for depth in both) + "."
    if len(worse) == len(both):
        return Verdict(claim, "holds", text)
    if worse:
        return Verdict(claim, "holds only when", f"the network has {', '.join(map(str, worse))} blocks. {text}")
    return Verdict(claim, "does not hold", text)


def needs_none(rows: Sequence[Row]) -> Verdict:
    """Judge whether pre-norm without warm-up is at most a point worse, beyond the range of the seeds."""
    claim = "A pre-norm transformer needs no warm-up: it trains equally well without one."
    errors = group_values(rows, ["scheme", "depth", "warmup"], "train_error")
    depths = sorted({depth for name, depth, _ in errors if name == "pre-norm"})
    both = [depth for depth in depths if {("pre-norm", depth, 0.0), ("pre-norm", depth, WARM)} <= set(errors)]
    if not both:
        return Verdict(claim, "open", "not measured")
    worse = [d for d in both if errors["pre-norm", d, 0.0].low > errors["pre-norm", d, WARM].high + 0.01]
    text = "Training error, " + "; ".join(warmup_errors(errors, ["pre-norm"], depth) for depth in both) + "."
    if not worse:
        return Verdict(claim, "holds", text)
    limit = trained_error(rows)
    if limit is None:
        return Verdict(claim, "open", UNKNOWN_CHANCE)
    if all(errors["pre-norm", depth, 0.0].high < limit for depth in both):
        return Verdict(claim, "holds only when", f"it need only train, not reach the same error. {text}")
    return Verdict(claim, "does not hold", text)


def deeper_helps(rows: Sequence[Row]) -> Verdict:
    """Compare the gain from pre-activation at the smallest and the largest depth."""
    claim = "Pre-activation improves a ResNet more, the deeper it is."
    errors = group_values([row for row in rows if row["warmup"]], ["scheme", "depth"], "test_error")
    post, pre = RESNETS
    depths = sorted(depth for name, depth in errors if name == post and (pre, depth) in errors)
    if len(depths) < 2:
        return Verdict(claim, "open", "not measured at two depths")
    gains = {depth: errors[post, depth].mean - errors[pre, depth].mean for depth in depths}
    text = "; ".join(
        f"{depth} layers: {post} {errors[post, depth].text(percent)}, {pre} {errors[pre, depth].text(percent)}"
        for depth in depths
    )
    last = depths[-1]
    text = f"Test error with warm-up, {text}."
    if errors[post, last].low <= errors[pre, last].high and errors[pre, last].low <= errors[post, last].high:
        return Verdict(claim, "open", f"{text} The seeds overlap; the paper's gain is 0.24 points at 110 layers.")
    holds = gains[last] > max(0.0, gains[depths[0]])
    return Verdict(claim, "holds" if holds else "does not hold", text)


STUDIES.add("norm-placement", NormPlacement())
