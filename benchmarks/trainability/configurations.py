"""The configurations: a random design of fixed seed over families, depths, schemes, norm placements, starts,
optimizers and learning rates. No configuration was chosen for its outcome."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

import skipway as sw
from benchmarks.trainability import nets, other_nets
from benchmarks.trainability.tasks import TASKS, Task

__all__ = ["FAMILIES", "Configuration", "Design", "configurations"]

SEED, STEPS = 20261129, 1500
SHALLOWEST, DEEPEST = 4, 56
DEEP_IS_RARE = 1.6
"""Depth is 4 · 14^(u^1.6) with u uniform: fewer deep networks than log-uniform, since cost grows with depth."""
RATES = {"sgd": (-2.75, 0.5), "adamw": (-4.25, -1.0), "muon": (-3.25, 0.0)}
"""log₁₀ of the learning rates, 0.0018 to 3.2 and 0.000056 to 0.1, around the usual 0.1 and 0.001; beside Muon, which
takes the maps of blocks, AdamW has a tenth of its rate."""
OWN_START = 0.6
"""Share of the configurations that keep the scale of their initialisation."""
WARM_UPS, SCHEDULES = (0, 0, 0, 50, 150), ("constant", "cosine")


@dataclass(frozen=True)
class Configuration:
    """A network, its start and its training.

    Args:
        family: a key of `FAMILIES`.
        depth: weight layers between stem and head, two to a residual connection.
        scheme: spec string of a Skipway scheme; for plain torch the variation: activation and start, or a scale.
        placement: of the norms, in the terms of the family.
        init_scale: factor on the weights of all linear maps and convolutions after the initialisation.
        optimizer: "sgd" (momentum 0.9, no decay), "adamw" (decay 0.01), or "muon" with "adamw".
        lr: learning rate after warm-up.
        warmup: steps over which it rises linearly from 0.
        schedule: "constant", or "cosine" down to 0 at the last step.
        seed: of weights and of the order of the samples.
    """

    family: str
    depth: int
    scheme: str
    placement: str
    init_scale: float
    optimizer: str
    lr: float
    warmup: int
    schedule: str
    seed: int

    @property
    def name(self) -> str:
        """Unique and readable: "resnet 56 fixup original x1 sgd 0.1 seed 3"."""
        return (
            f"{self.family} {self.depth} {self.scheme} {self.placement} x{self.init_scale:g} "
            f"{self.optimizer} {self.lr:g} {self.schedule} after {self.warmup} seed {self.seed}"
        )

    @property
    def task(self) -> Task:
        """What it learns."""
        return TASKS[FAMILIES[self.family].task]

    @property
    def kind(self) -> Literal["skipway", "others"]:
        """Library of the network."""
        return FAMILIES[self.family].kind

    @property
    def held_out(self) -> bool:
        """Whether it is in the half on which nothing may be tuned, by a bit of the name's SHA-256. None of the first
        280 is: features of the odds were designed on them.
        """
        return hashlib.sha256(self.name.encode()).digest()[0] % 2 == 1 and self.name not in looked_at()

    def build(self) -> nn.Module:
        """The network at its start, in training mode; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = FAMILIES[self.family].make(self.depth, self.scheme, self.placement)
        if self.init_scale != 1.0:
            scale_(model, self.init_scale)
        return model.train()

    def make_optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Over all parameters: groups by role for Skipway, `model.parameters()` for others; two of them with Muon."""
        decay = {"sgd": 0.0, "adamw": 0.01, "muon": 0.01}[self.optimizer]
        ours = self.kind == "skipway"
        if self.optimizer == "muon":
            maps = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
            held = {id(each) for each in maps}
            rest = [p for p in model.parameters() if id(p) not in held]
            return [torch.optim.Muon(maps, lr=self.lr), torch.optim.AdamW(rest, lr=self.lr / 10, weight_decay=decay)]
        parameters: Any = sw.param_groups(model, lr=self.lr, weight_decay=decay) if ours else model.parameters()
        if self.optimizer == "sgd":
            return [torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=decay, fused=True)]
        return [torch.optim.AdamW(parameters, lr=self.lr, weight_decay=decay, fused=True)]

    def rate_factor(self, step: int) -> float:
        """Learning rate of a step, 0 the first, over `lr`."""
        warm = min((step + 1) / self.warmup, 1.0) if self.warmup else 1.0
        return warm if self.schedule == "constant" else warm * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def scale_(model: nn.Module, factor: float) -> None:
    """Multiply the weights, not the biases, of all linear maps, convolutions and attentions."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or type(module).__name__ == "Conv1D":
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
        task: a key of `TASKS`.
        optimizers: dealt evenly.
    """

    make: Callable[[int, str, str], nn.Module]
    schemes: tuple[str | tuple[str, ...], ...]
    placements: tuple[str, ...]
    count: int
    step: int
    least: int = SHALLOWEST
    most: int = DEEPEST
    kind: Literal["skipway", "others"] = "others"
    task: str = "digits"
    optimizers: tuple[str, ...] = ("sgd", "adamw")


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


def decoder(name: str, norms: tuple[str, ...], count: int) -> Design:
    """Decoders of ours; depth is in blocks, of four weight layers each."""
    return Design(
        lambda blocks, start, norm: other_nets.own_decoder(name, blocks, start, norm),
        ("own", "own", "1/√L", "table"),
        norms,
        count,
        1,
        least=2,
        most=12,
        kind="skipway",
        task="text",
        optimizers=("sgd", "adamw", "adamw", "muon"),
    )


def table_net(depth: int, scheme: str, placement: str) -> nn.Module:
    """A network for numbers; "relu scale 30" divides its output by 30."""
    act, _, scale = scheme.partition(" scale ")
    return other_nets.TableNet(depth, act, placement, float(scale or 1))


TRANSFORMER_NORMS = ("pre", "post", "respost")
FAMILIES: dict[str, Design] = {
    "resnet": Design(resnet, OURS, ("original", "preactivation"), 34, 2, kind="skipway"),
    "vit": Design(vit, OURS, TRANSFORMER_NORMS, 26, 4, kind="skipway"),
    "swin": Design(swin, OURS, TRANSFORMER_NORMS, 20, 4, kind="skipway"),
    "cait": Design(cait, OURS, ("pre",), 14, 4, least=8, kind="skipway"),
    "convnext": Design(convnext, OURS, ("inside",), 20, 2, kind="skipway"),
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
    ),
    "skipless transformer": Design(
        lambda depth, scheme, placement: nets.SkiplessTransformer(depth, placement, variation(scheme)[1]),
        ("gelu", "gelu-xavier"),
        ("pre", "none"),
        16,
        4,
    ),
    "convnext-like": Design(
        lambda depth, scheme, placement: nets.ConvNeXtLike(depth, branch_scale(scheme, depth)),
        ("gamma=0", "gamma=1e-6", "gamma=0.1"),
        ("inside",),
        18,
        2,
    ),
    "mixer": Design(
        lambda depth, scheme, placement: nets.Mixer(depth, placement),
        ("gelu",),
        ("pre", "post"),
        18,
        4,
    ),
    "gpt": decoder("gpt", ("pre", "post", "respost", "sandwich"), 26),
    "llama": decoder("llama", ("pre", "post", "respost", "sandwich"), 22),
    "qwen": decoder("qwen", ("pre", "sandwich"), 14),
    "torch decoder": Design(
        lambda blocks, scheme, placement: other_nets.start_decoder(
            other_nets.TorchDecoder(blocks, placement), blocks, scheme
        ),
        ("own", "own", "1/√L"),
        ("pre", "post"),
        22,
        1,
        least=2,
        most=12,
        task="text",
    ),
    "transformers": Design(
        lambda blocks, scheme, placement: other_nets.Transformers(scheme, blocks),
        ("gpt2", "llama", "gpt_neox", "opt"),
        ("own",),
        36,
        1,
        least=2,
        most=8,
        task="text",
    ),
    "timm": Design(
        lambda depth, scheme, placement: other_nets.timm_model(scheme),
        (
            "test_resnet",
            "test_vit",
            "test_vit2",
            "test_convnext",
            "test_convnext2",
            "test_convnext3",
            "test_efficientnet",
            "test_efficientnet_gn",
            "test_mambaout",
            "test_byobnet",
            "test_nfnet",
            "test_coatnet",
        ),
        ("own",),
        60,
        1,
        task="cifar",
    ),
    "table": Design(
        table_net,
        ("relu", "gelu", "tanh", "relu scale 0.03", "gelu scale 30"),
        ("plain", "residual", "residual-norm", "batch-norm"),
        84,
        2,
        task="numbers",
    ),
    "segmentation": Design(
        lambda depth, scheme, placement: other_nets.Segmenter(depth, scheme, placement),
        ("unet", "no-skips", "he"),
        ("bn", "none"),
        72,
        2,
        least=10,
        most=40,
        task="masks",
    ),
}


def configurations() -> list[Configuration]:
    """All configurations, in a fixed shuffled order, so that the first ones are a fair sample of all.

    Per family a Latin hypercube: depth and learning rate are drawn one to each of `count` equal slices, in
    independent random orders; schemes, placements, optimizers, warm-ups and schedules are dealt evenly; 60 % keep their
    own start, the others are scaled by 2^U(-1, 1). A quarter as many again are drawn from wider ranges, so that more of
    them fail: rates wider by 3/4 of a decade at either end, one start in three its own, others scaled by 4^U(-1, 1).
    """
    usual, wide = (
        [each for family, design in FAMILIES.items() for each in drawn(family, design, wide)] for wide in (False, True)
    )
    random.Random(SEED).shuffle(usual)
    random.Random(SEED + 1).shuffle(wide)
    return [*usual, *wide]


@cache
def looked_at() -> frozenset[str]:
    """Names of the configurations on which features of the odds were designed."""
    return frozenset(configuration.name for configuration in configurations()[:280])


def drawn(family: str, design: Design, wide: bool) -> Iterator[Configuration]:
    """The configurations of a family."""
    draw = random.Random(f"{SEED} {family}" + " wide" * wide)
    count = max(2, round(design.count / 4)) if wide else design.count
    slices = {what: draw.sample(range(count), count) for what in ("depth", "lr")}
    schemes, placements = deal(draw, design.schemes, count), deal(draw, design.placements, count)
    optimizers = deal(draw, design.optimizers, count)
    warmups, schedules = deal(draw, WARM_UPS, count), deal(draw, SCHEDULES, count)
    for number in range(count):
        place = {what: (slices[what][number] + draw.random()) / count for what in slices}
        depth = design.least * (design.most / design.least) ** (place["depth"] ** DEEP_IS_RARE)
        low, high = RATES[optimizers[number]]
        low, high = (low - 0.75, high + 0.75) if wide else (low, high)
        scheme = schemes[number]
        own, spread = (1 / 3, 4) if wide else (OWN_START, 2)
        yield Configuration(
            family=family,
            depth=design.step * round(depth / design.step),
            scheme=scheme if isinstance(scheme, str) else draw.choice(scheme),
            placement=placements[number],
            init_scale=1.0 if draw.random() < own else significant(spread ** draw.uniform(-1, 1)),
            optimizer=optimizers[number],
            lr=significant(10 ** (low + (high - low) * place["lr"])),
            warmup=warmups[number],
            schedule=schedules[number],
            seed=draw.randrange(1000),
        )


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
