"""The configurations: a random design of fixed seed over families, depths, schemes, norm placements, starts,
optimizers and learning rates. No configuration was chosen for its outcome."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

import skipway as sw
from benchmarks.trainability import nets

__all__ = ["FAMILIES", "Configuration", "Design", "configurations"]

SEED = 20261123
SHALLOWEST, DEEPEST = 4, 200
DEEP_IS_RARE = 1.6
"""Depth is 4 · 50^(u^1.6) with u uniform: fewer deep networks than log-uniform, since cost grows with depth."""
RATES = {"sgd": (-2.75, 0.5), "adamw": (-4.25, -1.0)}
"""log₁₀ of the learning rates, 0.0018 to 3.2 and 0.000056 to 0.1, around the usual 0.1 and 0.001."""
OWN_START = 0.6
"""Share of the configurations that keep the scale of their initialisation."""


@dataclass(frozen=True)
class Configuration:
    """A network, its start and its training.

    Args:
        family: a key of `FAMILIES`.
        depth: weight layers between stem and head, two to a residual connection.
        scheme: spec string of a Skipway scheme; for plain torch the variation: activation and start, or a scale.
        placement: of the norms, in the terms of the family.
        init_scale: factor on the weights of all linear maps and convolutions after the initialisation.
        optimizer: "sgd" (momentum 0.9, no decay) or "adamw" (decay 0.01).
        lr: constant learning rate.
        seed: of weights and of the order of the images.
    """

    family: str
    depth: int
    scheme: str
    placement: str
    init_scale: float
    optimizer: Literal["sgd", "adamw"]
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Unique and readable: "resnet 56 fixup original x1 sgd 0.1 seed 3"."""
        return (
            f"{self.family} {self.depth} {self.scheme} {self.placement} x{self.init_scale:g} "
            f"{self.optimizer} {self.lr:g} seed {self.seed}"
        )

    @property
    def kind(self) -> Literal["skipway", "plain torch"]:
        """Library of the network."""
        return FAMILIES[self.family].kind

    @property
    def held_out(self) -> bool:
        """Whether it is in the half on which nothing may be tuned, by a bit of the name's SHA-256."""
        return hashlib.sha256(self.name.encode()).digest()[0] % 2 == 1

    def build(self) -> nn.Module:
        """The network at its start, in training mode; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = FAMILIES[self.family].make(self.depth, self.scheme, self.placement)
        if self.init_scale != 1.0:
            scale_(model, self.init_scale)
        return model.train()

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over all parameters: groups by role for Skipway, `model.parameters()` for plain torch."""
        decay = {"sgd": 0.0, "adamw": 0.01}[self.optimizer]
        ours = self.kind == "skipway"
        parameters: Any = sw.param_groups(model, lr=self.lr, weight_decay=decay) if ours else model.parameters()
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=decay, fused=True)
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=decay, fused=True)


def scale_(model: nn.Module, factor: float) -> None:
    """Multiply the weights, not the biases, of all linear maps, convolutions and attentions."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                module.weight.mul_(factor)
            elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
                module.in_proj_weight.mul_(factor)


@dataclass(frozen=True)
class Design:
    """The distribution from which the configurations of a family are drawn.

    Args:
        make: (depth, scheme, placement) → network.
        schemes: drawn evenly; a tuple inside is drawn from evenly in turn.
        placements: drawn evenly.
        count: configurations.
        step: of which depths are multiples.
        least: smallest depth.
        most: largest depth; smaller where a step is expensive.
        kind: library of the network.
    """

    make: Callable[[int, str, str], nn.Module]
    schemes: tuple[str | tuple[str, ...], ...]
    placements: tuple[str, ...]
    count: int
    step: int
    least: int = SHALLOWEST
    most: int = DEEPEST
    kind: Literal["skipway", "plain torch"] = "plain torch"


OURS: tuple[str | tuple[str, ...], ...] = (
    "plain",
    "identity",
    "preactivation",
    "zeroinit",
    (
        "skipinit",
        "skipinit(init=0.0, norm='remove')",
        "skipinit(init='depth', norm='remove')",
        "skipinit(init=1.0, norm='remove')",
    ),
    ("rezero", "rezero(norm='remove')"),
    "fixup",
    ("layerscale", "layerscale(init='depth')"),
    ("normfree", "normfree(gain=1.0)"),
    "deepnorm",
    ("depthscaled", "depthscaled(how='init')"),
)
GREY = {"channels": 1, "classes": 10}


def resnet(depth: int, scheme: str, placement: str) -> nn.Module:
    """CIFAR's ResNet of basic blocks, 8, 16 and 32 channels."""
    blocks = tuple(nets.split_evenly(depth // 2))
    return sw.build("resnet", depth=8, blocks=blocks, width=8, stem_width=8, placement=placement, scheme=scheme, **GREY)


def vit(depth: int, scheme: str, placement: str) -> nn.Module:
    """ViT of 32 channels on 2×2 patches."""
    size = {"dim": 32, "heads": 2, "ratio": 2.0, "patch": 2, "image": 8, "pooling": "mean"}
    return sw.build("vit-tiny-16", blocks=depth // 4, norm=placement, scheme=scheme, **size, **GREY)


def swin(depth: int, scheme: str, placement: str) -> nn.Module:
    """Swin V1 of 16 and 32 channels, windows of 2×2 tokens."""
    blocks = tuple(nets.split_evenly(depth // 4, 2))
    size = {"dim": 16, "heads": 2, "ratio": 2.0, "patch": 2, "image": 8, "window": 2}
    return sw.build("swin-tiny", blocks=blocks, norm=placement, scheme=scheme, **size, **GREY)


def cait(depth: int, scheme: str, placement: str) -> nn.Module:
    """CaiT of 32 channels with one block of class attention."""
    size = {"dim": 32, "heads": 2, "ratio": 2.0, "patch": 2, "image": 8, "class_blocks": 1}
    return sw.build("cait-xxs24", blocks=depth // 4 - 1, scheme=scheme, **size, **GREY)


def convnext(depth: int, scheme: str, placement: str) -> nn.Module:
    """ConvNeXt of 16 and 32 channels on 2×2 patches, 3×3 depthwise."""
    blocks = tuple(nets.split_evenly(depth // 2, 2))
    return sw.build("convnext-tiny", blocks=blocks, width=16, patch=2, kernel=3, ratio=2, scheme=scheme, **GREY)


def variation(scheme: str) -> tuple[str, str]:
    """Activation and start of "relu-he", "tanh"."""
    act, _, start = scheme.partition("-")
    return act, start or "default"


def branch_scale(scheme: str, depth: int) -> float:
    """The number of "scale=0.1"; "scale=depth" is 1/√L."""
    value = scheme.partition("=")[2]
    return (depth // 2) ** -0.5 if value == "depth" else float(value)


TRANSFORMER_NORMS = ("pre", "post", "respost")
FAMILIES: dict[str, Design] = {
    "resnet": Design(resnet, OURS, ("original", "preactivation"), 55, 2, kind="skipway"),
    "vit": Design(vit, OURS, TRANSFORMER_NORMS, 44, 4, most=144, kind="skipway"),
    "swin": Design(swin, OURS, TRANSFORMER_NORMS, 33, 4, most=144, kind="skipway"),
    "cait": Design(cait, OURS, ("pre",), 22, 4, least=8, most=96, kind="skipway"),
    "convnext": Design(convnext, OURS, ("inside",), 33, 2, most=144, kind="skipway"),
    "mlp": Design(
        lambda depth, scheme, placement: nets.MLP(depth, *variation(scheme), placement),
        ("relu", "relu-he", "gelu", "gelu-he", "tanh", "tanh-xavier"),
        ("none", "post"),
        24,
        1,
    ),
    "residual mlp": Design(
        lambda depth, scheme, placement: nets.ResidualMLP(depth, scheme, placement),
        ("relu", "gelu", "tanh"),
        ("none", "pre", "post"),
        18,
        2,
    ),
    "vgg": Design(
        lambda depth, scheme, placement: nets.VGG(depth, *variation(scheme), batch_norm=False),
        ("relu", "relu-he", "tanh-xavier", "gelu-he"),
        ("none",),
        18,
        1,
    ),
    "vgg bn": Design(
        lambda depth, scheme, placement: nets.VGG(depth, *variation(scheme), batch_norm=True),
        ("relu", "relu-he", "gelu"),
        ("inside",),
        18,
        1,
    ),
    "residual conv": Design(
        lambda depth, scheme, placement: nets.ResidualConvNet(depth, branch_scale(scheme, depth)),
        ("scale=1", "scale=0.5", "scale=0.1", "scale=depth"),
        ("none",),
        20,
        2,
    ),
    "bn resnet": Design(
        lambda depth, scheme, placement: nets.NormResNet(depth, placement, scheme),
        ("default", "he"),
        ("pre", "post"),
        24,
        2,
    ),
    "encoder": Design(
        lambda depth, scheme, placement: nets.Encoder(depth, placement, scheme),
        ("relu", "gelu"),
        ("pre", "post"),
        24,
        4,
        most=144,
    ),
    "skipless transformer": Design(
        lambda depth, scheme, placement: nets.SkiplessTransformer(depth, placement, variation(scheme)[1]),
        ("gelu", "gelu-xavier"),
        ("pre", "none"),
        16,
        4,
        most=48,
    ),
    "convnext-like": Design(
        lambda depth, scheme, placement: nets.ConvNeXtLike(depth, branch_scale(scheme, depth)),
        ("gamma=0", "gamma=1e-6", "gamma=0.1"),
        ("inside",),
        18,
        2,
        most=144,
    ),
    "mixer": Design(
        lambda depth, scheme, placement: nets.Mixer(depth, placement),
        ("gelu",),
        ("pre", "post"),
        18,
        4,
    ),
}


def configurations() -> list[Configuration]:
    """All configurations, in a fixed shuffled order, so that the first ones are a fair sample of all.

    Per family a Latin hypercube: depth and learning rate are drawn one to each of `count` equal slices, in
    independent random orders; schemes, placements and optimizers are dealt evenly; 60 % keep their own start, the
    others are scaled by 2^U(-1, 1).
    """
    drawn = []
    for family, design in FAMILIES.items():
        draw = random.Random(f"{SEED} {family}")
        count = design.count
        slices = {what: draw.sample(range(count), count) for what in ("depth", "lr")}
        schemes, placements = deal(draw, design.schemes, count), deal(draw, design.placements, count)
        optimizers = deal(draw, ("sgd", "adamw"), count)
        for number in range(count):
            place = {what: (slices[what][number] + draw.random()) / count for what in slices}
            depth = design.least * (design.most / design.least) ** (place["depth"] ** DEEP_IS_RARE)
            low, high = RATES[optimizers[number]]
            scheme = schemes[number]
            drawn.append(
                Configuration(
                    family=family,
                    depth=design.step * round(depth / design.step),
                    scheme=scheme if isinstance(scheme, str) else draw.choice(scheme),
                    placement=placements[number],
                    init_scale=1.0 if draw.random() < OWN_START else significant(2 ** draw.uniform(-1, 1)),
                    optimizer=optimizers[number],
                    lr=significant(10 ** (low + (high - low) * place["lr"])),
                    seed=draw.randrange(1000),
                )
            )
    random.Random(SEED).shuffle(drawn)
    return drawn


def deal(draw: random.Random, values: tuple[Any, ...], count: int) -> list[Any]:
    """`count` values, every one of `values` equally often up to one, in random order."""
    dealt = [value for _ in range(math.ceil(count / len(values))) for value in draw.sample(values, len(values))]
    dealt = dealt[:count]
    draw.shuffle(dealt)
    return dealt


def significant(value: float) -> float:
    """Two digits are enough to be read.

    >>> significant(0.012345)
    0.012
    """
    return float(f"{value:.2g}")
