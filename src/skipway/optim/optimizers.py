"""Optimizers by name, with their default learning rate and weight decay. Importable without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from skipway.errors import MissingExtraError
from skipway.registry import Registry, parse_spec
from skipway.validation import check_fraction

if TYPE_CHECKING:
    import torch

__all__ = ["LAMB", "OPTIMIZERS", "SGD", "AdamW", "Lion", "Muon", "OptimizerSpec", "parse_optimizer"]

Groups = Sequence[dict[str, Any]]


class OptimizerSpec(Protocol):
    """An optimizer with its hyperparameters, before it is built for a network.

    `base_lr` is the peak learning rate for a batch of 128, `weight_decay` the default weight decay. The learning rate
    scales with (batch / 128)^`lr_power`: 1 is linear (Goyal 2017), 1/2 the square root (You 2020, for adaptive
    methods). `eps` is its ε, None where there is none, and `adaptive` whether its steps do not depend on the size of
    the gradient: `param_groups` is given both.
    """

    base_lr: ClassVar[float]
    weight_decay: ClassVar[float]
    lr_power: ClassVar[float]
    adaptive: ClassVar[bool]

    @property
    def eps(self) -> float | None: ...

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        """Build the optimizer for groups that `param_groups` made."""
        ...


OPTIMIZERS: Registry[Callable[..., OptimizerSpec]] = Registry("optimizer")


def parse_optimizer(text: str) -> OptimizerSpec:
    """Parse a spec string into an optimizer.

    >>> parse_optimizer("sgd(momentum=0.95)")
    SGD(momentum=0.95, nesterov=True)
    """
    return parse_spec(text, OPTIMIZERS.__getitem__)


def all_on_cuda(groups: Groups) -> bool:
    """Whether all parameters are on CUDA, where the fused update can skip a step without a synchronisation."""
    return all(parameter.device.type == "cuda" for group in groups for parameter in group["params"])


@dataclass(frozen=True)
class SGD:
    """SGD with momentum (Sutskever 2013): v <- m v + g + wd w, w <- w - lr (g + m v) with Nesterov momentum."""

    momentum: float = 0.9
    nesterov: bool = True

    base_lr: ClassVar[float] = 0.1
    weight_decay: ClassVar[float] = 5e-4
    lr_power: ClassVar[float] = 1.0
    adaptive: ClassVar[bool] = False
    eps = None

    def __post_init__(self) -> None:
        check_fraction("momentum", self.momentum)

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        from torch.optim import SGD

        nesterov = self.nesterov and self.momentum > 0
        return SGD(groups, momentum=self.momentum, nesterov=nesterov, fused=all_on_cuda(groups) or None)


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov 2019). Default weight decay as in Touvron 2021 (DeiT)."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    base_lr: ClassVar[float] = 1e-3
    weight_decay: ClassVar[float] = 0.05
    lr_power: ClassVar[float] = 1.0
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fraction("beta1", self.beta1)
        check_fraction("beta2", self.beta2)

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(
            groups, betas=(self.beta1, self.beta2), eps=self.eps, fused=all_on_cuda(groups) or None
        )


def load_pytorch_optimizer() -> Any:
    """Import the library pytorch_optimizer."""
    try:
        return import_module("pytorch_optimizer")
    except ImportError as error:
        raise MissingExtraError("pytorch-optimizer", "optimizers", "Lion, LAMB and Muon") from error


@dataclass(frozen=True)
class Lion:
    """Lion (Chen 2023, algorithm 2): the sign of an interpolated momentum; a tenth of AdamW's learning rate, ten times
    its weight decay.

    From the library pytorch_optimizer.
    """

    beta1: float = 0.9
    beta2: float = 0.99

    base_lr: ClassVar[float] = 1e-4
    weight_decay: ClassVar[float] = 0.5
    lr_power: ClassVar[float] = 1.0
    adaptive: ClassVar[bool] = True
    eps = None

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        return load_pytorch_optimizer().Lion(list(groups), betas=(self.beta1, self.beta2))


@dataclass(frozen=True)
class LAMB:
    """LAMB (You 2020, algorithm 2): w <- w - lr min(|w|, 10) u / |u|, u = r + wd w, r Adam's update of each weight.

    It is for very large batches. r has no bias correction, as in version 3 of the paper; that changes the share of wd w
    in u alone. From the library pytorch_optimizer, whose defaults decay outside of u and divide lr by 1 - beta1^t.
    """

    beta1: float = 0.9
    beta2: float = 0.999

    base_lr: ClassVar[float] = 5e-3
    weight_decay: ClassVar[float] = 0.02
    lr_power: ClassVar[float] = 0.5
    adaptive: ClassVar[bool] = True
    eps = 1e-6

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        return load_pytorch_optimizer().Lamb(
            list(groups), betas=(self.beta1, self.beta2), eps=self.eps, weight_decouple=False, adam_debias=True
        )


@dataclass(frozen=True)
class Muon:
    """Muon with the step of Moonlight (Liu 2025, arXiv 2502.16982): orthogonalised momentum for matrices and
    convolution kernels, AdamW for everything else.

    m <- mu m + (1 - mu) g, w <- w - lr (0.2 sqrt(max(out, in)) O + wd w), where O = U V^T of the singular value
    decomposition U S V^T of (1 - mu) g + mu m, by five steps of a Newton-Schulz iteration. The factor gives updates
    of every shape the root mean square 0.2, near that of AdamW's. Jordan (2024), who introduced Muon, has
    sqrt(max(1, out / in)) in its place: of a matrix 256 x 2304 and at the same lr, this step is 9.6 times as long.

    A kernel (out, in, k, k) is treated as a matrix (out, in k k). The classifier and stacks of matrices (experts,
    kernels of grouped and depthwise convolutions), which `param_groups` leaves out of `matrices`, use AdamW with a
    learning rate of their own: as one matrix, the rows of one member would be made orthogonal to those of another, with
    whose inputs they have nothing to do. From the library pytorch_optimizer, which iterates in bfloat16; on CPUs
    without native bfloat16 products, where those take 30 times as long, it iterates in float32 (`skipway.optim.muon`).

    Args:
        momentum: momentum of the matrices.
        adamw: learning rate of AdamW as a fraction of lr.
    """

    momentum: float = 0.95
    adamw: float = 0.05

    base_lr: ClassVar[float] = 0.02
    weight_decay: ClassVar[float] = 0.01
    lr_power: ClassVar[float] = 0.5
    adaptive: ClassVar[bool] = True
    eps = 1e-10

    def __post_init__(self) -> None:
        check_fraction("momentum", self.momentum)

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        from skipway.optim.muon import muon_class

        ready = []
        for group in groups:
            rest = [place for place in range(len(group["params"])) if place not in group["matrices"]]
            if group["matrices"]:
                own = part_of_group(group, group["matrices"])
                ready.append({**own, "use_muon": True, "momentum": self.momentum})
            if rest:
                ready.append({**part_of_group(group, rest), "use_muon": False, "lr": group["lr"] * self.adamw})
        return muon_class(load_pytorch_optimizer().Muon)(ready, adamw_eps=self.eps, use_adjusted_lr=True)


def part_of_group(group: dict[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """Some parameters of a group, by their places, as a group of their own; its marks, if it has any, move along."""
    marks = {
        name: [number for number, place in enumerate(places) if place in group[name]]
        for name in ("matrices", "classifier")
        if name in group
    }
    return {**group, **marks, "params": [group["params"][place] for place in places]}


for kind in (SGD, AdamW, Lion, LAMB, Muon):
    OPTIMIZERS.add(kind.__name__.lower(), kind)
