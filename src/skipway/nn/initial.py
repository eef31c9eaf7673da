"""Distributions that the weights of linear maps start from: small frozen objects, kept by the map they fill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

__all__ = [
    "ColumnOrthogonal",
    "FanInNormal",
    "FanInUniform",
    "HeNormal",
    "Initial",
    "TruncatedNormal",
    "XavierNormal",
    "Zeros",
]


class Initial(Protocol):
    """Fills a weight of shape (out, in, ...) in place."""

    def __call__(self, weight: Tensor) -> object: ...


@dataclass(frozen=True)
class HeNormal:
    """W ~ N(0, 2 / fan): keeps the second moment through map and ReLU (He et al. 2015, "Delving Deep", eq. 10, 14).

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> weight = torch.empty(64, 64, 3, 3)
    >>> bool((HeNormal()(weight).var() * 9 * 64 / 2 - 1).abs() < 0.05)
    True
    """

    fan: Literal["fan_in", "fan_out"] = "fan_out"

    def __call__(self, weight: Tensor) -> Tensor:
        return nn.init.kaiming_normal_(weight, mode=self.fan, nonlinearity="relu")


@dataclass(frozen=True)
class FanInNormal:
    """W ~ N(0, 1 / fan_in): keeps the second moment through the map."""

    def __call__(self, weight: Tensor) -> Tensor:
        return nn.init.normal_(weight, std=(weight.shape[1] * weight[0, 0].numel()) ** -0.5)


@dataclass(frozen=True)
class FanInUniform:
    """W ~ U(-1/√fan_in, 1/√fan_in): what `torch.nn.Linear` does, and so the classifier of the classic ResNets."""

    def __call__(self, weight: Tensor) -> Tensor:
        bound = (weight.shape[1] * weight[0, 0].numel()) ** -0.5
        return nn.init.uniform_(weight, -bound, bound)


@dataclass(frozen=True)
class XavierNormal:
    """W ~ N(0, 2 / (fan_in + fan_out)) (Glorot & Bengio 2010, eq. 12)."""

    def __call__(self, weight: Tensor) -> Tensor:
        return nn.init.xavier_normal_(weight)


@dataclass(frozen=True)
class ColumnOrthogonal:
    """W[j, i] = 1 / √(r d) where i mod r = j, else 0, for W of r × d: orthogonal rows (LAuReL's A, sec. 3.3).

    >>> import torch
    >>> ColumnOrthogonal()(torch.empty(2, 2)) * 2
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __call__(self, weight: Tensor) -> Tensor:
        rank, dim = weight.shape
        with torch.no_grad():
            own = torch.arange(dim, device=weight.device) % rank == torch.arange(rank, device=weight.device)[:, None]
            return weight.copy_(own * (rank * dim) ** -0.5)


@dataclass(frozen=True)
class TruncatedNormal:
    """W ~ N(0, std²) cut at ± 2 (absolute), the transformers' start (ViT, ConvNeXt, Swin: std 0.02)."""

    std: float = 0.02

    def __call__(self, weight: Tensor) -> Tensor:
        return nn.init.trunc_normal_(weight, std=self.std)


@dataclass(frozen=True)
class Zeros:
    """W = 0: a map without effect at the start."""

    def __call__(self, weight: Tensor) -> Tensor:
        return nn.init.zeros_(weight)
