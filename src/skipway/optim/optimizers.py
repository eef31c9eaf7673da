"""Optimisers by name: what their own learning rate and decay are, and how they are made. No torch until one is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from skipway.errors import MissingExtraError, SkipwayError
from skipway.registry import Registry, parse_spec

if TYPE_CHECKING:
    import torch

__all__ = ["OPTIMIZERS", "AdamW", "Lamb", "Lion", "Muon", "OptimizerKind", "Sgd", "optimizer"]

Groups = Sequence[dict[str, Any]]


class OptimizerKind(Protocol):
    """What a recipe knows of an optimiser.

    `rate` is its peak learning rate for a batch of 128, `decay` its weight decay, `power` how the rate grows with the
    batch: in proportion (1, Goyal 2017) or with its square root (1/2, as You 2020 derives for adaptive methods).
    """

    rate: ClassVar[float]
    decay: ClassVar[float]
    power: ClassVar[float]

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        """The optimiser of groups with `params`, `lr`, `weight_decay` and `name`."""
        ...


OPTIMIZERS: Registry[Callable[..., OptimizerKind]] = Registry("optimiser")


def optimizer(text: str) -> OptimizerKind:
    """The optimiser that a spec string describes.

    >>> optimizer("sgd(momentum=0.95)")
    Sgd(momentum=0.95, nesterov=True)
    """
    return parse_spec(text, OPTIMIZERS.__getitem__)


def share(name: str, value: float) -> None:
    """A share in [0, 1)."""
    if not 0 <= value < 1:
        raise SkipwayError(f"{name}={value}: the rule is 0 <= {name} < 1")


def fused(groups: Groups) -> bool:
    """Whether torch's one-kernel update is there: then it can be told on the device to leave a step out."""
    return all(parameter.device.type == "cuda" for group in groups for parameter in group["params"])


@dataclass(frozen=True)
class Sgd:
    """SGD with momentum (Sutskever 2013): v <- m v + g + wd w, w <- w - lr (g + m v) with Nesterov's look ahead."""

    momentum: float = 0.9
    nesterov: bool = True

    rate: ClassVar[float] = 0.1
    decay: ClassVar[float] = 5e-4
    power: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        share("momentum", self.momentum)

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        from torch.optim import SGD

        nesterov = self.nesterov and self.momentum > 0
        return SGD(groups, momentum=self.momentum, nesterov=nesterov, fused=fused(groups) or None)


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov 2019). Decay as in Touvron 2021 (DeiT)."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    rate: ClassVar[float] = 1e-3
    decay: ClassVar[float] = 0.05
    power: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        share("beta1", self.beta1)
        share("beta2", self.beta2)

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(groups, betas=(self.beta1, self.beta2), eps=self.eps, fused=fused(groups) or None)


def extra() -> Any:
    """The library pytorch_optimizer."""
    try:
        return import_module("pytorch_optimizer")
    except ImportError as error:
        raise MissingExtraError("pytorch-optimizer", "optimizers", "Lion, LAMB and Muon") from error


@dataclass(frozen=True)
class Lion:
    """Lion (Chen 2023, algorithm 2): the sign of a mixed momentum; a tenth of AdamW's rate, ten times its decay.

    From the library pytorch_optimizer.
    """

    beta1: float = 0.9
    beta2: float = 0.99

    rate: ClassVar[float] = 1e-4
    decay: ClassVar[float] = 0.5
    power: ClassVar[float] = 1.0

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        return extra().Lion(list(groups), betas=(self.beta1, self.beta2))


@dataclass(frozen=True)
class Lamb:
    """LAMB (You 2020, algorithm 2): Adam's update scaled to each weight's norm, for very large batches.

    From the library pytorch_optimizer, with its clipping of the whole gradient off.
    """

    beta1: float = 0.9
    beta2: float = 0.999

    rate: ClassVar[float] = 5e-3
    decay: ClassVar[float] = 0.02
    power: ClassVar[float] = 0.5

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        return extra().Lamb(list(groups), betas=(self.beta1, self.beta2), max_grad_norm=0.0)


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan 2024): orthogonalised momentum for matrices and kernels, AdamW for everything else.

    A kernel (out, in, k, k) is taken as a matrix (out, in k k). The classifier, which is a matrix, and depthwise
    kernels, which are not, go to AdamW with its own rate. From the library pytorch_optimizer.

    Args:
        momentum: of the matrices.
        adamw: AdamW's rate over the matrices' rate.
    """

    momentum: float = 0.95
    adamw: float = 0.05

    rate: ClassVar[float] = 0.02
    decay: ClassVar[float] = 0.01
    power: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        share("momentum", self.momentum)

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        matrices = {
            id(each): each
            for group in groups
            for each in group["params"]
            if group["name"].startswith("weight") and (each.ndim == 2 or each.shape[1] > 1)
        }
        if matrices:
            matrices.popitem()  # the classifier
        ready = []
        for group in groups:
            own = [each for each in group["params"] if id(each) in matrices]
            rest = [each for each in group["params"] if id(each) not in matrices]
            if own:
                ready.append({**group, "params": own, "use_muon": True, "momentum": self.momentum})
            if rest:
                ready.append({**group, "params": rest, "use_muon": False, "lr": group["lr"] * self.adamw})
        return extra().Muon(ready, use_adjusted_lr=True)


for kind in (Sgd, AdamW, Lion, Lamb, Muon):
    OPTIMIZERS.add(kind.__name__.lower(), kind)
