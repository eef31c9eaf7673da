"""A ViT without skips: rank collapse, relative importance of its skips, and an initialisation that repairs it.

Claim:    without skips the tokens of a deep ViT become identical at initialisation, and it does not train; the skip
          around attention matters more than the skip around the MLP.
Source:   Dong et al. 2021, "Attention is not all you need"; Ji et al. 2025, "Always Skip Attention", ViT-Tiny; the
          repair follows Trockman & Kolter 2023, "Mimetic Initialization of Self-Attention Layers".
Command:  skipway study skipless-vit
Hardware: two shared cores of a virtual machine, one process each.
Time:     about 5 minutes (192 cells).
Result:   24 November 2026, digits, 6 epochs, 3 seeds: tokens collapse without skips; 12 blocks without skips fail
          (80.6 % test error, 6.3 % with skips), 2 blocks train. That the attention skip matters more does not hold here
          (41.0 % without it, 53.8 % without the MLP skip). An initialisation in which tokens attend to themselves
          repairs most of it (15.8 %).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skipway.inference.metrics import percent
from skipway.models import build
from skipway.report.chart import Figure, format_value
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.fit import UNKNOWN_CHANCE, FitSettings, data_of, fit, trained_error, xavier_
from skipway.studies.statistics import SeedValues, group_values, series_over, value_labels
from skipway.studies.study import STUDIES, Published, Study, Verdict

__all__ = ["SkiplessViT", "attend_to_self_"]

VARIANTS = {
    "both skips": "identity",
    "no MLP skip": "plain(kind='mlp')",
    "no attention skip": "plain(kind='attention')",
    "no skip": "plain",
    "no skip, tokens look at themselves": "plain",
}
REPAIRED = "no skip, tokens look at themselves"
label = value_labels({REPAIRED: "no skip, tokens attend to themselves"})
ATTENTION_ALONE = {"attention alone, skips": "identity", "attention alone, no skip": "plain"}
# depths trained, depths measured at initialisation, width, epochs
GRIDS: dict[Budget, tuple[tuple[int, ...], tuple[int, ...], int, int]] = {
    "cpu": ((2, 6, 12), (1, 2, 3, 4, 8, 12, 24), 32, 6),
    "gpu": ((4, 12, 24, 36), (1, 2, 3, 4, 6, 8, 12, 24, 48), 192, 60),
    "paper": ((12, 24, 36), (1, 2, 3, 4, 6, 8, 12, 24, 48), 192, 200),
}


class SkiplessViT(Study):
    """Distinctness of tokens at initialisation and errors after training, without skips."""

    name = "skipless-vit"
    title = "A ViT without skips: rank collapse and its repair"
    claim = (
        "Without skips the tokens of a ViT collapse to one at initialisation, faster than exponentially in depth; deep "
        "ViTs do not train, and the attention skip matters more than the MLP skip."
    )
    source = "Dong et al. 2021; Ji et al. 2025; Trockman & Kolter 2023"
    settings = ("kind", "scheme", "depth", "seed", "width", "epochs", "lr", "data")
    results = ("distinct", "train_error", "test_error")
    minutes = "5 minutes on two shared cores"
    specs = False
    published = tuple(
        Published(
            what=f"ViT-Tiny, {scheme}, test error (approximate)",
            value=error,
            where={"kind": "trained", "scheme": scheme, "depth": 12, "width": 192, "dataset": "cifar10"},
            column="test_error",
            source="Ji et al. 2025, from secondary notes",
        )
        for scheme, error in (("both skips", 0.08), ("no MLP skip", 0.10), ("no attention skip", 0.30))
    )

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        trained, start, width, epochs = GRIDS[budget]
        names = choices.schemes or tuple(VARIANTS)
        seeds = choices.seeds or (0, 1, 2)
        cells = [
            self.cell(
                kind="trained",
                scheme=name,
                depth=depth,
                seed=seed,
                width=width,
                epochs=epochs,
                lr=1e-3,
                data=choices.data,
            )
            for depth in sorted(choices.depths or trained, reverse=True)
            for seed in seeds
            for name in names
        ]
        for name in (*names, *(ATTENTION_ALONE if choices.schemes is None else ())):
            for depth in choices.depths or start:
                cells += [self.cell(kind="start", scheme=name, depth=depth, seed=seed, width=width) for seed in seeds]
        return cells

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        torch.manual_seed(cell["seed"])
        data = data_of(cell.get("data"))
        small = data.size < 32
        model = build(
            "vit",
            depth=cell["depth"],
            scheme={**VARIANTS, **ATTENTION_ALONE}[cell["scheme"]],
            dim=cell["width"],
            heads=3 if cell["width"] == 192 else 4,
            ratio=2.0 if small else 4.0,
            patch=2 if small else 4,
            image=data.size,
            channels=data.channels,
            classes=len(data.classes),
            pooling="mean",
        )
        xavier_(model)
        if cell["scheme"] == REPAIRED:
            attend_to_self_(model)
        if cell["kind"] == "start":
            if cell["scheme"] in ATTENTION_ALONE:
                for block in blocks_of(model):
                    block.mlp = nn.Identity()
            images = data.sample(16, seed=cell["seed"], device=torch.device("cpu")).inputs.double()
            return {"distinct": rank_one_distance(model.double(), images), "dataset": data.name}
        settings = FitSettings(
            epochs=cell["epochs"],
            lr=cell["lr"],
            optimizer="adamw",
            weight_decay=0.01,
            warmup=0.1,
            clip=1.0,
            seed=cell["seed"],
            batch_size=32 if small else 128,
        )
        return fit(model, data, settings, device)

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        start = group_values([row for row in rows if row["kind"] == "start"], ["scheme", "depth"], "distinct")
        trained = [row for row in rows if row["kind"] == "trained"]
        errors = group_values(trained, ["scheme", "depth"], "test_error")
        return [collapse(start), degradation(errors, trained_error(trained)), which_matters(errors), repair(errors)]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        start = [row for row in rows if row["kind"] == "start"]
        trained = [row for row in rows if row["kind"] == "trained"]
        return [
            Figure(
                name="test-error",
                title="Test error",
                x_label="transformer blocks",
                y_label="test error",
                log_x=True,
                series=series_over(trained, "depth", "test_error", "scheme", label),
                percent=True,
            ),
            Figure(
                name="train-error",
                title="Training error",
                x_label="transformer blocks",
                y_label="training error",
                log_x=True,
                series=series_over(trained, "depth", "train_error", "scheme", label),
                percent=True,
            ),
            Figure(
                name="rank-collapse",
                title="Distinctness of tokens at initialisation",
                x_label="transformer blocks",
                y_label="|X - mean token| / |X|",
                log_x=True,
                series=series_over(start, "depth", "distinct", "scheme", label),
                log_y=True,
                note="In double precision; 1e-16 is numerically 0.",
            ),
        ]


@torch.no_grad()
def rank_one_distance(model: nn.Module, images: Tensor) -> float:
    """Measure |X - 1 x̄ᵀ| / |X| of the tokens after the last block, averaged over images.

    0 means rank one (Dong et al. 2021). The model is not changed.
    """
    tokens = model.blocks(model.stem(images))  # type: ignore[operator]
    rest = tokens - tokens.mean(1, keepdim=True)
    return float((rest.flatten(1).norm(dim=1) / tokens.flatten(1).norm(dim=1)).mean())


@torch.no_grad()
def attend_to_self_(model: nn.Module, sharpness: float = 4.0) -> None:
    """Initialise the blocks of `model`, in place, so that attention is near the identity.

    W_q = W_k = √c I, so that every token attends mostly to itself; W_v orthogonal and W_o = W_vᵀ, so that the output
    projection undoes the values; both MLP weights orthogonal. This is the extreme case of mimetic initialisation
    (Trockman & Kolter 2023, eq. 3-5).

    Args:
        sharpness: c, the factor of the attention logits.
    """
    for block in blocks_of(model):
        attention, mlp = block.attention.branch, block.mlp.branch
        dim = attention.qkv.in_features
        queries, keys, values = attention.qkv.weight.chunk(3)
        for each in (queries, keys):
            each.copy_(sharpness**0.5 * torch.eye(dim))
        nn.init.orthogonal_(values)
        attention.proj.weight.copy_(values.T)
        # GELU passes about half of the second moment
        nn.init.orthogonal_(mlp.fc1.weight, gain=2**0.5)
        nn.init.orthogonal_(mlp.fc2.weight, gain=2**0.5)


def blocks_of(model: nn.Module) -> list[Any]:
    """Return the transformer blocks."""
    return list(model.get_submodule("blocks").children())


def collapse(start: dict[tuple, SeedValues]) -> Verdict:
    """Judge whether tokens collapse at initialisation without skips only."""
    claim = "At initialisation, tokens collapse to one with growing depth without skips and stay distinct with skips."
    chosen = {name: {d: s for (n, d), s in start.items() if n == name} for name in (*VARIANTS, *ATTENTION_ALONE)}
    pure, kept, none = (chosen[name] for name in ("attention alone, no skip", "both skips", "no skip"))
    common = set(kept) & set(none) & set(chosen[REPAIRED])
    if not (pure and common):
        return Verdict(claim, "open", "not measured")
    deep = max(common)
    first = [f"{format_value(pure[depth].mean)} after {depth}" for depth in sorted(pure) if depth <= 4]
    text = (
        f"Attention alone: {', '.join(first)} blocks. After {deep} blocks: no skip {format_value(none[deep].mean)}, "
        f"both skips {format_value(kept[deep].mean)}, "
        f"{label(REPAIRED)} {format_value(chosen[REPAIRED][deep].mean)}."
    )
    return Verdict(claim, "holds" if none[deep].high < 1e-6 and kept[deep].low > 1e-2 else "does not hold", text)


def degradation(errors: dict[tuple, SeedValues], limit: float | None) -> Verdict:
    """Judge whether ViTs without skips fail to train."""
    claim = "A deep ViT without skips does not train, while the same ViT with skips does."
    depths = sorted({depth for name, depth in errors if name == "no skip" and ("both skips", depth) in errors})
    if not depths:
        return Verdict(claim, "open", "not measured")
    if limit is None:
        return Verdict(claim, "open", UNKNOWN_CHANCE)
    text = "; ".join(
        f"{depth} blocks: no skip {errors['no skip', depth].text(percent)}, "
        f"both skips {errors['both skips', depth].text(percent)}"
        for depth in depths
    )
    failed = [d for d in depths if errors["no skip", d].low > limit and errors["both skips", d].high < limit]
    if failed and failed != depths:
        return Verdict(
            claim, "holds only when", f"the network has {', '.join(map(str, failed))} blocks. Test error, {text}."
        )
    return Verdict(claim, "holds" if failed else "does not hold", f"Test error, {text}.")


def which_matters(errors: dict[tuple, SeedValues]) -> Verdict:
    """Compare the errors without the attention skip and without the MLP skip."""
    claim = "The attention skip matters more than the MLP skip."
    mlp, attention = "no MLP skip", "no attention skip"
    depths = sorted({depth for name, depth in errors if name == mlp and (attention, depth) in errors})
    if not depths:
        return Verdict(claim, "open", "not measured")
    text = "; ".join(
        f"{depth} blocks: {mlp} {errors[mlp, depth].text(percent)}, "
        f"{attention} {errors[attention, depth].text(percent)}"
        for depth in depths
    )
    more = [depth for depth in depths if errors[attention, depth].low > errors[mlp, depth].high]
    if more and more != depths:
        return Verdict(
            claim, "holds only when", f"the network has {', '.join(map(str, more))} blocks. Test error, {text}."
        )
    return Verdict(claim, "holds" if more else "does not hold", f"Test error, {text}.")


def repair(errors: dict[tuple, SeedValues]) -> Verdict:
    """Compare ViTs without skips with and without the initialisation near the identity."""
    claim = "An initialisation in which every token attends to itself lets a ViT without skips train."
    depths = sorted({depth for name, depth in errors if name == REPAIRED and ("no skip", depth) in errors})
    if not depths:
        return Verdict(claim, "open", "not measured")
    text = "; ".join(
        f"{depth} blocks: {errors[REPAIRED, depth].text(percent)} with, "
        f"{errors['no skip', depth].text(percent)} without"
        for depth in depths
    )
    better = [depth for depth in depths if errors[REPAIRED, depth].high < errors["no skip", depth].low]
    if better and better != depths:
        return Verdict(
            claim, "holds only when", f"the network has {', '.join(map(str, better))} blocks. Test error, {text}."
        )
    return Verdict(claim, "holds" if better else "does not hold", f"Test error, {text}.")


STUDIES.add("skipless-vit", SkiplessViT())
