"""A ViT without skips: rank collapse, which skip matters more, and what repairs it.

Claim:    without skips the tokens of a deep ViT become one and the same at the start, and it does not train; the skip
          around the attention matters more than that around the MLP.
Source:   Dong et al. 2021, "Attention is not all you need"; Ji et al. 2025, "Always Skip Attention", ViT-Tiny; the
          repair after Trockman & Kolter 2023, "Mimetic Initialization of Self-Attention Layers".
Command:  skipway study skipless-vit
Hardware: two shared cores of a virtual machine, one process each.
Time:     about 5 minutes (192 cells).
Result:   24 November 2026, digits, 6 epochs, 3 seeds: tokens collapse without skips; 12 blocks without skips fail
          (80.6 % test error against 6.3 %), 2 do not. That the attention's skip matters more does not hold here (41.0
          % without it, 53.8 % without the MLP's). A start at which tokens look at themselves repairs most of it (15.8
          %).
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
from skipway.studies.fit import FitSettings, data_of, fit, xavier_
from skipway.studies.statistics import SeedValues, group_values, series_over
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
ATTENTION_ALONE = {"attention alone, skips": "identity", "attention alone, no skip": "plain"}
# trained depths, depths at the start, width, epochs
GRIDS: dict[Budget, tuple[tuple[int, ...], tuple[int, ...], int, int]] = {
    "cpu": ((2, 6, 12), (1, 2, 3, 4, 8, 12, 24), 32, 6),
    "gpu": ((4, 12, 24, 36), (1, 2, 3, 4, 6, 8, 12, 24, 48), 192, 60),
    "paper": ((12, 24, 36), (1, 2, 3, 4, 6, 8, 12, 24, 48), 192, 200),
}


class SkiplessViT(Study):
    """Skips left out."""

    name = "skipless-vit"
    title = "A ViT without skips: rank collapse and its repair"
    claim = (
        "Without skips a ViT's tokens collapse to one at the start, faster than exponentially in depth; deep ones do "
        "not train, and the attention's skip matters more than the MLP's."
    )
    source = "Dong et al. 2021; Ji et al. 2025; Trockman & Kolter 2023"
    settings = ("kind", "scheme", "depth", "seed", "width", "epochs", "lr", "data")
    results = ("distinct", "train_error", "test_error")
    minutes = "5 minutes on two shared cores"
    published = tuple(
        Published(
            what=f"ViT-Tiny, {scheme}, test error, about",
            value=error,
            where={"kind": "trained", "scheme": scheme, "depth": 12, "width": 192, "dataset": "cifar10"},
            column="test_error",
            source="Ji et al. 2025, as read in notes on it",
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
            return {"distinct": token_distinctness(model.double(), images), "dataset": data.name}
        plan = FitSettings(
            epochs=cell["epochs"],
            lr=cell["lr"],
            optimizer="adamw",
            weight_decay=0.01,
            warmup=0.1,
            clip=1.0,
            seed=cell["seed"],
            batch_size=32 if small else 128,
        )
        return fit(model, data, plan, device)

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        start = group_values([row for row in rows if row["kind"] == "start"], ["scheme", "depth"], "distinct")
        errors = group_values([row for row in rows if row["kind"] == "trained"], ["scheme", "depth"], "test_error")
        return [collapse(start), degradation(errors), which_matters(errors), repair(errors)]

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
                series=series_over(trained, "depth", "test_error", "scheme"),
                percent=True,
            ),
            Figure(
                name="train-error",
                title="Training error",
                x_label="transformer blocks",
                y_label="training error",
                log_x=True,
                series=series_over(trained, "depth", "train_error", "scheme"),
                percent=True,
            ),
            Figure(
                name="rank-collapse",
                title="How far apart the tokens are at the start",
                x_label="transformer blocks",
                y_label="|X - mean token| / |X|",
                log_x=True,
                series=series_over(start, "depth", "distinct", "scheme"),
                log_y=True,
                note="In double precision; 1e-16 is as good as 0.",
            ),
        ]


@torch.no_grad()
def token_distinctness(model: nn.Module, images: Tensor) -> float:
    """|X - 1 x̄ᵀ| / |X| of the tokens behind the last block, the mean over images: 0 is rank one (Dong et al. 2021)."""
    tokens = model.blocks(model.stem(images))  # type: ignore[operator]
    rest = tokens - tokens.mean(1, keepdim=True)
    return float((rest.flatten(1).norm(dim=1) / tokens.flatten(1).norm(dim=1)).mean())


@torch.no_grad()
def attend_to_self_(model: nn.Module, sharpness: float = 4.0) -> None:
    """Attention that starts near the identity, in place: queries and keys alike, so that a token resembles itself most,
    W_q = W_k = c I, and values that the output map gives back, W_v orthogonal and W_o its transpose; the MLP's two maps
    orthogonal. Towards what pre-trained ViTs look like (Trockman & Kolter 2023, eq. 3-5), taken to its end.
    """
    for block in blocks_of(model):
        attention, mlp = block.attention.branch, block.mlp.branch
        dim = attention.qkv.in_features
        queries, keys, values = attention.qkv.weight.chunk(3)
        for each in (queries, keys):
            each.copy_(sharpness**0.5 * torch.eye(dim))
        nn.init.orthogonal_(values)
        attention.proj.weight.copy_(values.T)
        # GELU lets about half of the signal's second moment through
        nn.init.orthogonal_(mlp.fc1.weight, gain=2**0.5)
        nn.init.orthogonal_(mlp.fc2.weight, gain=2**0.5)


def blocks_of(model: nn.Module) -> list[Any]:
    """The transformer blocks."""
    return list(model.get_submodule("blocks").children())


def collapse(start: dict[tuple, SeedValues]) -> Verdict:
    """At the start."""
    claim = "Without skips the tokens become one as depth grows, with skips they stay apart (at the start)."
    chosen = {name: {d: s for (n, d), s in start.items() if n == name} for name in (*VARIANTS, *ATTENTION_ALONE)}
    pure, kept, none = (chosen[name] for name in ("attention alone, no skip", "both skips", "no skip"))
    common = set(kept) & set(none) & set(chosen[REPAIRED])
    if not (pure and common):
        return Verdict(claim, "open", "not measured")
    deep = max(common)
    first = [f"{format_value(pure[depth].mean)} behind {depth}" for depth in sorted(pure) if depth <= 4]
    text = (
        f"Attention alone: {', '.join(first)} blocks. Behind {deep} blocks: no skip {format_value(none[deep].mean)}, "
        f"both skips {format_value(kept[deep].mean)}, {REPAIRED} {format_value(chosen[REPAIRED][deep].mean)}."
    )
    return Verdict(claim, "holds" if none[deep].high < 1e-6 and kept[deep].low > 1e-2 else "does not hold", text)


def degradation(errors: dict[tuple, SeedValues]) -> Verdict:
    """Without any skip."""
    claim = "A deep ViT without skips does not train where one with skips does."
    depths = sorted({depth for name, depth in errors if name == "no skip" and ("both skips", depth) in errors})
    if not depths:
        return Verdict(claim, "open", "not measured")
    text = "; ".join(
        f"{depth} blocks: no skip {errors['no skip', depth].text(percent)}, "
        f"both {errors['both skips', depth].text(percent)}"
        for depth in depths
    )
    failed = [d for d in depths if errors["no skip", d].low > 0.5 and errors["both skips", d].high < 0.5]
    if failed and failed != depths:
        return Verdict(claim, "holds only when", f"there are {', '.join(map(str, failed))} blocks. Test error: {text}.")
    return Verdict(claim, "holds" if failed else "does not hold", f"Test error, {text}.")


def which_matters(errors: dict[tuple, SeedValues]) -> Verdict:
    """Attention against MLP."""
    claim = "The attention's skip matters more than the MLP's."
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
        return Verdict(claim, "holds only when", f"there are {', '.join(map(str, more))} blocks. Test error: {text}.")
    return Verdict(claim, "holds" if more else "does not hold", f"Test error, {text}.")


def repair(errors: dict[tuple, SeedValues]) -> Verdict:
    """The start alone."""
    claim = "An initialisation in which every token attends to itself lets a ViT without skips train."
    depths = sorted({depth for name, depth in errors if name == REPAIRED and ("no skip", depth) in errors})
    if not depths:
        return Verdict(claim, "open", "not measured")
    text = "; ".join(
        f"{depth} blocks: {errors[REPAIRED, depth].text(percent)} against {errors['no skip', depth].text(percent)}"
        for depth in depths
    )
    better = [depth for depth in depths if errors[REPAIRED, depth].high < errors["no skip", depth].low]
    if better and better != depths:
        return Verdict(claim, "holds only when", f"there are {', '.join(map(str, better))} blocks. Test error: {text}.")
    return Verdict(claim, "holds" if better else "does not hold", f"Test error, {text}.")


STUDIES.add("skipless-vit", SkiplessViT())
