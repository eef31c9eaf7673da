"""The choices that a recipe leaves open for text: network, sequences, optimizer and length, for the case.

* **Network**: that of the weights to start from, where a config describes it, else nanoGPT's for a CPU or a GPU.
* **Optimizer**: AdamW with β₂ = 0.95, weight decay 0.1 and gradients clipped to norm 1, as GPT-3 (Brown 2020, app. B).
* **Rate**: inversely proportional to the width, 6e-4 at 768 channels: GPT-3's table 2.1 has 6e-4, 2.5e-4 and 2e-4 at
  768, 1536 and 2048. At most 1e-3, nanoGPT's for small ones: with 3e-3 the losses of gpt-nano jump after the warm-up.
* **Length**: steps, no more than `MOST_PASSES` over the text.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from skipway.data.text import TextData
from skipway.models import find_config
from skipway.recipe import DEFAULT_CONTEXT, Recipe
from skipway.training.defaults import FINE_TUNING_SHARE
from skipway.training.initial_decoder import adopt_decoder

__all__ = ["choose_length", "choose_sequences", "width_rate"]

CPU_MODEL, GPU_MODEL = "gpt-micro", "gpt-small"
CPU_BATCH, GPU_BATCH = 16, 64
CPU_STEPS, GPU_STEPS = 2000, 5000
GPU_CONTEXT = 1024
"""Longest sequence on a GPU where none is chosen."""
MOST_PASSES = 30
OPTIMIZER = "adamw(beta2=0.95)"
RATE, RATE_WIDTH, MOST_RATE = 6e-4, 768, 1e-3


def choose_sequences(recipe: Recipe, device: torch.device, world: int) -> Recipe:
    """The recipe with network, sequences and optimizer, before the text is read."""
    recipe = adopt_decoder(recipe)
    gpu = device.type == "cuda"
    model = recipe.model or (GPU_MODEL if gpu else CPU_MODEL)
    _, config = find_config(model, recipe.depth)
    shares = recipe.accumulate * world
    batch = math.ceil((GPU_BATCH if gpu else CPU_BATCH) / shares) * shares
    values: dict[str, Any] = {
        "model": model,
        "start": "random",
        "tokenizer": "bytes",
        "context": min(config.context, GPU_CONTEXT) if gpu else min(config.context, DEFAULT_CONTEXT),
        "batch_size": batch,
        "clip": "norm(1.0)",
    }
    if recipe.optimizer is None or recipe.optimizer.partition("(")[0] == "adamw":
        share = 1.0 if recipe.initial_weights is None else FINE_TUNING_SHARE
        rate = share * width_rate(recipe.width or config.dim)
        values |= {"optimizer": OPTIMIZER, "lr": float(f"{rate:.3g}"), "weight_decay": 0.1}
    taken = {name: value for name, value in values.items() if getattr(recipe, name) is None}
    return replace(recipe, **taken)


def choose_length(recipe: Recipe, data: TextData, device: torch.device) -> Recipe:
    """The recipe with a number of steps, where neither that nor epochs nor a time is chosen."""
    if recipe.steps or recipe.epochs or recipe.time is not None:
        return recipe
    most = MOST_PASSES * data.steps(recipe.batch_size or 1)
    return replace(recipe, steps=min(GPU_STEPS if device.type == "cuda" else CPU_STEPS, most))


def width_rate(width: int) -> float:
    """The peak learning rate of AdamW for a decoder of so many channels.

    >>> width_rate(768), width_rate(1536), width_rate(48)
    (0.0006, 0.0003, 0.001)
    """
    return min(MOST_RATE, RATE * RATE_WIDTH / width)
