"""Saturating maps in place of normalisation: each number by itself, no statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipway.nn.role import Role

__all__ = ["DynamicErf", "DynamicTanh"]


class DynamicTanh(nn.Module):
    """y = γ ⊙ tanh(α x) + β, with one learned α, and γ and β per channel (DyT, Zhu et al. 2025).

    Small signals pass linearly, with gain α γ; large ones saturate at γ. Nothing depends on other channels, tokens or
    images.

    Args:
        channels: C.
        init: α at the start, > 0.
        spatial: axes after the channel axis: 2 for (N, C, H, W), 0 for (N, T, C).

    Decay and learning rate: none of the three is decayed, as the authors' optimizer groups have it; full rate.

    >>> DynamicTanh(3, init=0.5, spatial=0)(torch.full((1, 3), 100.0))
    tensor([[1., 1., 1.]], grad_fn=...)
    """

    role = Role("norm")

    def __init__(self, channels: int, *, init: float = 0.5, spatial: int = 0) -> None:
        super().__init__()
        self.init, self.shape = init, (channels, *(1,) * spatial)
        self.alpha = nn.Parameter(torch.full((), float(init)))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        """α to `init`, γ to 1, β to 0."""
        nn.init.constant_(self.alpha, self.init)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.view(self.shape) * torch.tanh(self.alpha * x) + self.bias.view(self.shape)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, init={self.init:g}"


class DynamicErf(DynamicTanh):
    """y = γ ⊙ erf(α x + s) + β, with learned α and s, and γ and β per channel (Chen et al. 2025, Derf).

    Args: as `DynamicTanh`; s starts at 0.

    >>> DynamicErf(3, init=0.5, spatial=0)(torch.zeros(1, 3))
    tensor([[0., 0., 0.]], grad_fn=...)
    """

    def __init__(self, channels: int, *, init: float = 0.5, spatial: int = 0) -> None:
        super().__init__(channels, init=init, spatial=spatial)
        self.shift = nn.Parameter(torch.zeros(()))

    def reset_parameters(self) -> None:
        """α to `init`, s to 0, γ to 1, β to 0."""
        super().reset_parameters()
        nn.init.zeros_(self.shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.view(self.shape) * torch.erf(self.alpha * x + self.shift) + self.bias.view(self.shape)
