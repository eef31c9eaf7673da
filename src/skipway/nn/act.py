"""Activations that keep the variance."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

__all__ = ["QuickGELU", "ScaledActivation", "variance_gain"]


class QuickGELU(nn.Module):
    """y = x σ(1.702 x), the sigmoid's approximation of GELU (Hendrycks & Gimpel 2016, sec. 2; OpenAI's CLIP).

    >>> bool((QuickGELU()(torch.ones(1)) - nn.functional.gelu(torch.ones(1))).abs() < 0.02)
    True
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ScaledActivation(nn.Module):
    """y = γ · act(x), with γ = Var[act(z)]^(-1/2) for z ~ N(0, 1) (Brock, De, Smith 2021, sec. 3.2).

    For ReLU γ = √(2 / (1 - 1/π)).

    >>> round(ScaledActivation(nn.ReLU()).factor, 6)
    1.712859
    """

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.factor = variance_gain(type(act))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * self.factor

    def extra_repr(self) -> str:
        return f"factor={self.factor:.4f}"


@lru_cache
def variance_gain(kind: type[nn.Module]) -> float:
    """γ = Var[act(z)]^(-1/2), z ~ N(0, 1), by the trapezoidal rule in float64 (the authors: Monte Carlo)."""
    z = torch.linspace(-12, 12, 240_001, dtype=torch.float64, device="cpu")
    density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    act = kind()(z.clone())
    mean = torch.trapezoid(act * density, z)
    return float(torch.trapezoid((act - mean).square() * density, z).rsqrt())
