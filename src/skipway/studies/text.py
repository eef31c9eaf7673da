"""Studies that train variants of a small decoder on bytes of text and compare them seed by seed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from skipway.data.text import IGNORED, TextData, load_text
from skipway.models import build
from skipway.nn.warmup import set_step
from skipway.optim.groups import param_groups
from skipway.optim.optimizers import parse_optimizer
from skipway.optim.schedules import lr_factor, parse_schedule, set_lr
from skipway.report.chart import Figure
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.statistics import group_values, series_over
from skipway.studies.variants import NetworkVariant, VariantStudy, lowest_rate_rows, trained_rows

__all__ = ["TextGrid", "TextStudy", "fit_text", "text_of"]

BATCH = 8
TEST_WINDOWS = 512
"""Windows of the test text that the loss is measured on."""


@dataclass(frozen=True, kw_only=True)
class TextGrid:
    """Sizes of the trainings.

    Args:
        depths: in blocks.
        width: channels; heads have 16.
        context: bytes that the network sees.
        steps: of 8 windows each.
        rates: peak learning rates.
        seeds: of weights and windows.
    """

    depths: tuple[int, ...]
    rates: tuple[float, ...]
    width: int = 48
    context: int = 64
    steps: int = 250
    seeds: tuple[int, ...] = (0, 1, 2)


class TextStudy(VariantStudy):
    """Losses of variants of a decoder (AdamW) by depth and learning rate; abstract.

    The text is the standard library of Python, whose fingerprint is in every row, or one that the user gives; tokens
    are bytes. A variant is compared at the learning rate with its lowest mean training loss.
    """

    settings = ("kind", "family", "scheme", "depth", "lr", "seed", "width", "context", "steps", "warmup", "data")
    results = ("train_loss", "test_loss", "diverged")
    text_grids: ClassVar[Mapping[Budget, TextGrid]]
    warmup: ClassVar[float] = 0.05
    """Part of the steps in which the rate rises."""

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        grid = self.text_grids[budget]
        return [
            self.cell(
                kind="train",
                family="GPT", scheme=name, depth=depth, lr=rate, seed=seed, width=grid.width, context=grid.context,
                steps=grid.steps, warmup=self.warmup, data=choices.data,
            )
            for depth in sorted(choices.depths or grid.depths, reverse=True)
            for seed in choices.seeds or grid.seeds
            for name in choices.schemes or self.names("GPT")
            for rate in grid.rates
        ]  # fmt: skip

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        data = text_of(cell.get("data"), cell["context"])
        torch.manual_seed(cell["seed"])
        model = self.decoder(cell, data)
        steps, warmup = cell["steps"], cell["warmup"]
        fitted = fit_text(model, data, lr=cell["lr"], steps=steps, warmup=warmup, seed=cell["seed"], device=device)
        return {**fitted, **self.observe(model)}

    def fingerprint(self, source: str) -> str:
        return load_text(Path(source), validation=0.0).fingerprint

    def decoder(self, cell: Cell, data: TextData) -> nn.Module:
        """Build the network of a cell."""
        variant = self.variants.get(cell["scheme"]) or NetworkVariant(cell["scheme"])
        return build_decoder(variant, cell["depth"], cell["width"], data)

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        trained = trained_rows(rows)
        return [
            Figure(
                name=f"rates-{depth}",
                title=f"{depth} blocks: test loss by learning rate",
                x_label="learning rate",
                y_label="test loss, nats per byte",
                log_x=True,
                series=series_over([row for row in trained if row["depth"] == depth], "lr", "test_loss", "scheme"),
            )
            for depth in sorted({int(row["depth"] or 0) for row in trained})
        ]

    def summary(self, rows: Sequence[Row]) -> list[Row]:
        """One row per variant and depth: losses at its best learning rate."""
        best, keys = lowest_rate_rows(rows), ["depth", "scheme", "lr"]
        trained, tested = group_values(best, keys, "train_loss"), group_values(best, keys, "test_loss")
        return [
            {
                "network": f"{depth} blocks",
                "variant": scheme,
                "best learning rate": rate,
                "training loss": trained[depth, scheme, rate].text().partition(" (")[0],
                "test loss": loss.text().partition(" (")[0],
                "seeds": len(loss.values),
            }
            for (depth, scheme, rate), loss in tested.items()
        ]


@lru_cache(maxsize=2)
def text_of(source: str | None, context: int) -> TextData:
    """Load the standard library of Python for None, otherwise a text file or folder, as bytes."""
    return load_text(None if source is None else Path(source), context=context, validation=0.0)


def build_decoder(variant: NetworkVariant, depth: int, width: int, data: TextData) -> nn.Module:
    """Build a small decoder with learned positions and a tied head for the bytes of `data`, initialised."""
    shape: dict[str, Any] = {"dim": width, "heads": max(width // 16, 1), "context": data.context}
    shape |= {"vocab": data.tokenizer.size, "bias": "none", "scheme": variant.scheme, **variant.options}
    return build("gpt", depth=depth, **shape)


def fit_text(
    model: nn.Module, data: TextData, *, lr: float, steps: int, warmup: float, seed: int, device: str = "cpu"
) -> Row:
    """Train `model` in place by AdamW with a cosine rate and return its losses in nats per token.

    `train_loss` is the mean over the last tenth of the steps, `test_loss` that of the first windows of the test text
    with the last weights. A loss that is not finite ends the training and sets `diverged`.
    """
    target = torch.device(device)
    model.to(target).train()
    spec = parse_optimizer("adamw(beta2=0.95)")
    optimizer = spec.build(param_groups(model, lr=lr, weight_decay=0.1, eps=spec.eps, adaptive=spec.adaptive))
    shape, losses, began = parse_schedule("cosine"), [], time.perf_counter()
    per_epoch = data.steps(BATCH)
    for step in range(steps):
        set_lr(optimizer, lr_factor(step, steps, warmup, shape))
        ids, targets = data.train_batch(*divmod(step, per_epoch), BATCH, seed=seed)
        loss = F.cross_entropy(model(ids.to(target)).float().flatten(0, 1), targets.to(target).flatten())
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        set_step(model, step + 1, steps)
    last = losses[-max(1, steps // 10) :]
    return {
        "train_loss": sum(last) / len(last),
        "test_loss": text_loss(model, data, target),
        "diverged": not math.isfinite(losses[-1]),
        "seconds_per_step": round((time.perf_counter() - began) / len(losses), 5),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dataset": f"{data.name} {data.fingerprint}",
        "losses": " ".join(f"{loss:.4g}" for loss in losses[:: max(1, steps // 20)]),
    }


@torch.no_grad()
def text_loss(model: nn.Module, data: TextData, device: torch.device) -> float:
    """The mean loss of the first windows of the test text; `model` is left in training mode."""
    model.eval()
    total, count = 0.0, 0
    for number, (ids, targets) in enumerate(data.evaluation_batches("test", 64)):
        if number * 64 >= TEST_WINDOWS:
            break
        logits = model(ids.to(device)).float().flatten(0, 1)
        total += float(F.cross_entropy(logits, targets.to(device).flatten(), reduction="sum"))
        count += int((targets != IGNORED).sum())
    model.train()
    return total / count
