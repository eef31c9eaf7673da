"""Joins that see both the skip and the branch, in place of the addition."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from skipway.nn.initial import Initial, Zeros
from skipway.nn.maps import Linear
from skipway.nn.role import Role
from skipway.nn.stream_algebra import as_float32

__all__ = ["GRUGate", "HighwayGate", "LowRankMap", "OrthogonalSum", "WeightedSum"]


class OrthogonalSum(nn.Module):
    """y = x + f - x ⟨x, f⟩ / (|x|² + ε): only what is orthogonal to x is added, so |y|² = |x|² + |f⊥|² up to ε.

    Args:
        spatial: axes after the channel axis: 2 for (N, C, H, W), 0 for (N, T, C).
        over: "feature" takes the product over the channels of each token or pixel, "sample" over the whole sample.
        eps: ε.

    Shapes: (N, …), (N, …) → (N, …).

    >>> import torch
    >>> OrthogonalSum(spatial=0)(torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0]])).round(decimals=4)
    tensor([[6.2000, 1.6000]])
    """

    def __init__(self, *, spatial: int, over: Literal["feature", "sample"] = "feature", eps: float = 1e-6) -> None:
        super().__init__()
        self.channel, self.over, self.eps = -1 - spatial, over, eps

    def forward(self, skip: Tensor, f: Tensor) -> Tensor:
        x, g = as_float32(skip), as_float32(f)
        axes = (self.channel,) if self.over == "feature" else tuple(range(1, x.ndim))
        share = (x * g).sum(axes, keepdim=True) / (x.square().sum(axes, keepdim=True) + self.eps)
        return skip + (g - share * x).to(f.dtype)

    def extra_repr(self) -> str:
        return f"over={self.over!r}"


class LowRankMap(nn.Module):
    """B A x for each token or pixel, with A of r × dim and B = 0 at the start.

    Args:
        dim: channels.
        rank: r.
        spatial: axes after the channel axis: 2 for (N, C, H, W), 0 for (N, T, C).
        initial: the start of A.

    Decay and learning rate: A and B are weights: decayed, full rate.

    Shapes: (N, …) → (N, …).

    >>> from skipway.nn import XavierNormal
    >>> LowRankMap(8, 2, spatial=0, initial=XavierNormal())(torch.ones(1, 3, 8)).any()
    tensor(False)
    """

    def __init__(self, dim: int, rank: int, *, spatial: int, initial: Initial) -> None:
        super().__init__()
        self.channel = -1 - spatial
        self.down = Linear(dim, rank, bias=False, initial=initial)  # A
        self.up = Linear(rank, dim, bias=False, initial=Zeros())  # B

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x.movedim(self.channel, -1))).movedim(-1, self.channel)


class WeightedSum(nn.Module):
    """y = α f + β (x + map(x)), where (α, β) = t · softmax of two learned numbers, which are equal at the start.

    Args:
        total: t = α + β; None for α = β = 1 without parameters.
        map: of the skip; None for y = α f + β x.

    Decay and learning rate: the two numbers are not decayed; full rate.

    >>> WeightedSum(1.0)(torch.tensor([2.0]), torch.tensor([4.0]))
    tensor([3.], grad_fn=...)
    """

    role = Role("gain")

    def __init__(self, total: float | None, map: nn.Module | None = None) -> None:
        super().__init__()
        self.total, self.map = total, map
        self.logits = None if total is None else nn.Parameter(torch.zeros(2))

    def reset_parameters(self) -> None:
        """α = β."""
        if self.logits is not None:
            nn.init.zeros_(self.logits)

    def forward(self, skip: Tensor, f: Tensor) -> Tensor:
        if self.logits is None or self.total is None:
            return skip + (f if self.map is None else f + self.map(skip))
        alpha, beta = self.total * torch.softmax(self.logits, 0)
        f = alpha * f if self.map is None else alpha * f + beta * self.map(skip)
        return beta * skip + f

    def extra_repr(self) -> str:
        return f"total={self.total}"


class Gate(nn.Module):
    """Abstract base of joins whose gate has a bias for each channel.

    Args:
        dim: channels.
        bias: b at the start.
        spatial: axes after the channel axis: 2 for (N, C, H, W), 0 for (N, T, C).

    Decay and learning rate: maps are decayed, b is not; full rate.

    Shapes: (N, …), (N, …) → (N, …).
    """

    role = Role("bias")

    def __init__(self, dim: int, *, bias: float, spatial: int) -> None:
        super().__init__()
        self.channel, self.init = -1 - spatial, bias
        self.bias = nn.Parameter(torch.full((dim,), float(bias)))

    def reset_parameters(self) -> None:
        """b back to its start."""
        nn.init.constant_(self.bias, self.init)

    def extra_repr(self) -> str:
        return f"bias={self.init:g}"


class HighwayGate(Gate):
    """y = T ⊙ f + (1 - T) ⊙ x, T = σ(W x + b): one gate for each channel of each token or pixel.

    At the start W = 0, so T = σ(b) everywhere. Arguments, shapes and roles are those of `Gate`.

    >>> HighwayGate(1, bias=0.0, spatial=0)(torch.tensor([[2.0]]), torch.tensor([[4.0]]))
    tensor([[3.]], grad_fn=...)
    """

    def __init__(self, dim: int, *, bias: float, spatial: int) -> None:
        super().__init__(dim, bias=bias, spatial=spatial)
        self.map = Linear(dim, dim, bias=False, initial=Zeros())

    def forward(self, skip: Tensor, f: Tensor) -> Tensor:
        gate = torch.sigmoid(self.map(skip.movedim(self.channel, -1)) + self.bias).movedim(-1, self.channel)
        return skip + gate * (f - skip)


class GRUGate(Gate):
    """y = (1 - z) ⊙ x + z ⊙ tanh(W_g f + U_g (r ⊙ x)), r = σ(W_r f + U_r x), z = σ(W_z f + U_z x + b): a gated
    recurrent unit, whose state is the skip and whose input is the branch.

    At the start the maps of r and z are 0, so r = ½ and z = σ(b) everywhere; W_g | U_g starts as a `torch.nn.Linear`.
    Arguments, shapes and roles are those of `Gate`.

    >>> GRUGate(1, bias=-30.0, spatial=0)(torch.tensor([[2.0]]), torch.tensor([[4.0]])).round()
    tensor([[2.]], grad_fn=...)
    """

    def __init__(self, dim: int, *, bias: float, spatial: int) -> None:
        super().__init__(dim, bias=bias, spatial=spatial)
        self.gates = Linear(2 * dim, 2 * dim, bias=False, initial=Zeros())  # rows of r, then z; columns of f, then x
        self.candidate = Linear(2 * dim, dim, bias=False)  # W_g | U_g

    def forward(self, skip: Tensor, f: Tensor) -> Tensor:
        x, f = skip.movedim(self.channel, -1), f.movedim(self.channel, -1)
        reset, update = self.gates(torch.cat((f, x), dim=-1)).chunk(2, dim=-1)
        candidate = torch.tanh(self.candidate(torch.cat((f, torch.sigmoid(reset) * x), dim=-1)))
        return skip + (torch.sigmoid(update + self.bias) * (candidate - x)).movedim(-1, self.channel)
