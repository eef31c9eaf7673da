"""The stories: what was reported, the network rebuilt small, the cause, and what mends it."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.stories.networks import CompressingDecoder, DigitRegressor
from benchmarks.trainability import nets, tasks

__all__ = ["STORIES", "Attempt", "Story"]

BATCHES = 400
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A network with its data and the training that is planned for it.

    Args:
        model: at its start.
        batches: of training.
        loss: (output, targets) → the loss that it is trained on.
        settings: of `skipway.diagnose`.
        yardstick: (output, targets) → the loss that tells what was learnt; None: `loss`.
        disturb: changes the inputs of the measurement, not of the training.
    """

    model: nn.Module
    batches: list[Batch] = field(repr=False)
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    settings: dict[str, Any]
    yardstick: Callable[[Any, Any], Tensor] | None = None
    disturb: Callable[[Tensor], list[Tensor]] | None = None


@dataclass(frozen=True, kw_only=True)
class Story:
    """A published failure.

    Args:
        name: of it.
        thread: where it was reported.
        report: what was reported and what it turned out to be, in our words.
        cause: rule that has to name it.
        attempt: makes the rebuilt network, at its start.
        advice: the attempt after what the finding says in words; None: `Diagnosis.fix()` mends it.
    """

    name: str
    thread: str
    report: str
    cause: str
    attempt: Callable[[], Attempt]
    advice: Callable[[], Attempt] | None = None


@cache
def digits() -> list[Batch]:
    """Batches of 64 digits with their labels."""
    stream = tasks.shuffled(*tasks.digits(), seed=0, size=64)
    return [next(stream) for _ in range(BATCHES)]


@cache
def windows() -> list[Batch]:
    """Batches of 16 windows of 32 bytes of Python's argparse, each with the bytes that follow."""
    text = torch.tensor(list(inspect.getsource(argparse).encode()))
    starts = torch.randint(len(text) - 33, (BATCHES, 16), generator=torch.Generator().manual_seed(0))
    places = starts[..., None] + torch.arange(33)
    return [(text[each[:, :-1]], text[each[:, 1:]]) for each in places]


def deep_encoder() -> Attempt:
    """24 layers of torch's own encoder, post-norm as it comes, without warm-up."""
    settings = {"optimizer": "adamw", "lr": 1e-3}
    return Attempt(model=nets.Encoder(96, "post", "relu"), batches=digits(), settings=settings)


def bounded_classifier() -> Attempt:
    """A vision transformer whose classifier ends in a tanh."""
    model = nets.Encoder(16, "pre", "gelu")
    model.fc = nn.Sequential(model.fc, nn.Tanh())
    return Attempt(model=model, batches=digits(), settings={"optimizer": "adamw", "lr": 1e-3})


def heights(*, column: bool) -> list[Batch]:
    """Digits with the label as a number of mean 0 and deviation 1, as a vector or a column."""
    labels = torch.cat([y for _, y in digits()]).float()
    scaled = [(x, (y - labels.mean()) / labels.std()) for x, y in digits()]
    return [(x, y[:, None] if column else y) for x, y in scaled]


def squared(output: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of a sample's own target."""
    return F.mse_loss(output, targets.view_as(output))


def regressor(*, column: bool) -> Attempt:
    """A regression whose targets are a column beside outputs that are a vector; without `column` they are, too."""
    return Attempt(
        model=DigitRegressor(),
        batches=heights(column=column),
        loss=F.mse_loss,
        settings={"optimizer": "adamw", "lr": 1e-3},
        yardstick=squared,
    )


def unnormalized_resnet() -> Attempt:
    """A ResNet of 18 layers without BatchNorm at the rate of one with it."""
    return Attempt(model=nets.ResidualConvNet(18, 1.0, width=16), batches=digits(), settings={"lr": 0.1})


def next_bytes(output: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each next byte."""
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


def prefixes(ids: Tensor) -> list[Tensor]:
    """The windows with everything after a place drawn at random, once for each of eight places: what a network that
    generates has instead of the bytes to come.
    """
    noise = torch.randint(256, ids.shape, generator=torch.Generator().manual_seed(1))
    return [torch.where(torch.arange(ids.shape[1]) <= place, ids, noise) for place in range(8, 24, 2)]


def decoder(*, shifted: bool) -> Attempt:
    """A decoder that compresses its stream by two in the middle."""
    return Attempt(
        model=CompressingDecoder(shifted=shifted),
        batches=windows(),
        loss=next_bytes,
        settings={"optimizer": "adamw", "lr": 3e-3},
        disturb=prefixes,
    )


def slow_sgd() -> Attempt:
    """A residual MLP under SGD at a rate that is usual for Adam."""
    return Attempt(model=nets.ResidualMLP(8, "relu", "pre"), batches=digits(), settings={"lr": 5e-5})


STORIES = (
    Story(
        name="a deep transformer of torch's own layers",
        thread="https://github.com/pytorch/pytorch/issues/55270",
        report="torch.nn.TransformerEncoder of 12 layers and more did not train in a benchmark of language models: its "
        "layers are post-norm, which needs another start and a warm-up at that depth. torch gave them norm_first.",
        cause="post-norm",
        attempt=deep_encoder,
    ),
    Story(
        name="a tanh behind the classifier",
        thread="https://github.com/Project-MONAI/tutorials/issues/464",
        report="A vision transformer for brain scans kept its loss even on a single batch, where convolutional "
        "networks learned: the library's classifier ended in a hard-wired tanh, in front of the cross-entropy. It was "
        "made optional (https://github.com/Project-MONAI/MONAI/pull/4736).",
        cause="bounded-output",
        attempt=bounded_classifier,
    ),
    Story(
        name="a regression on targets of another shape",
        thread="https://github.com/deepset-ai/FARM/issues/229",
        report="Training a text regressor showed the warning that targets of size (32, 1) differ from an input of size "
        "(32,): the outputs were squeezed and the labels were not, so that every output was compared with all labels.",
        cause="broadcast-targets",
        attempt=lambda: regressor(column=True),
        advice=lambda: regressor(column=False),
    ),
    Story(
        name="a ResNet without BatchNorm",
        thread="https://github.com/huangleiBuaa/ONI/issues/1",
        report="A ResNet-18 without BatchNorm went to NaN within a few steps on CIFAR-10 with the settings of one with "
        "it. The advice was to scale the weights down until every layer keeps the variance.",
        cause="rate-too-high",
        attempt=unnormalized_resnet,
    ),
    Story(
        name="a GPT in the shape of a U-Net",
        thread="https://github.com/karpathy/nanoGPT/issues/81",
        report="A GPT that compresses its stream in the middle reached a loss near 1.0, far below the original, and "
        "wrote garbage. Months later its author found that compressing and expanding break the causality.",
        cause="missing-causal-mask",
        attempt=lambda: decoder(shifted=False),
        advice=lambda: decoder(shifted=True),
    ),
    Story(
        name="SGD at a rate for Adam",
        thread="https://github.com/OpenLMLab/LOMO/issues/50",
        report="A loss did not fall over ten thousand examples at a learning rate of 5e-5, usual for Adam: the "
        "optimizer takes plain gradient steps. The maintainer advised 1e-2 or 1e-3.",
        cause="rate-too-low",
        attempt=slow_sgd,
    ),
)
