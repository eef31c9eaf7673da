"""Norms of image maps: layer normalisation over the channels of a pixel, and global response normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipway.nn.role import Role

__all__ = ["GlobalResponseNorm", "LayerNorm2d"]


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation of every pixel over its channels: y = g ⊙ (x - μ) / √(σ² + ε) + b.

    μ and σ² are taken over the C channels at one pixel of one image (Ba et al. 2016, eq. 3, as ConvNeXt uses it).
    The work is done channels-last and the result lies channels-last in memory: on such maps no copy is made, here and
    in the pixelwise maps that follow.

    Args:
        channels: C.
        eps: ε.

    Shapes: (N, C, H, W) → (N, C, H, W).

    >>> y = LayerNorm2d(8)(torch.randn(2, 8, 5, 5))
    >>> y.shape, bool((y.mean(1).abs() < 1e-5).all())
    (torch.Size([2, 8, 5, 5]), True)
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class GlobalResponseNorm(nn.Module):
    """Channels in competition: y = (1 + g ⊙ n) ⊙ x + b, with n_c = ‖x_c‖ / (mean_j ‖x_j‖ + ε), g = b = 0 at the start.

    ‖x_c‖ is the Euclidean norm of channel c over all pixels of an image. This is the paper's
    y = x + g ⊙ (x ⊙ n) + b with x factored out. n does not change when x is scaled, so the layer keeps the scale of
    its input, and schemes that do without normalisation keep it. The mean is that of algorithm 1 and of the authors'
    code; equation 2 has a sum.

    Decay and learning rate: g and b are not decayed (the authors' `optim_factory.py`); full rate.

    Args:
        channels: C.
        eps: ε.

    Shapes: (N, H, W, C) → (N, H, W, C), channels last.

    Source: Woo et al. 2023, "ConvNeXt V2", sec. 3.2, eq. 1-3 and algorithm 1.

    >>> x = torch.randn(2, 5, 5, 8)
    >>> bool((GlobalResponseNorm(8)(x) == x).all())
    True
    """

    role = Role("norm")

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        """Back to the identity: gain and bias 0."""
        nn.init.zeros_(self.gain)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        n = size / (size.mean(-1, keepdim=True) + self.eps)
        return (1 + self.gain * n) * x + self.bias

    def extra_repr(self) -> str:
        return f"{len(self.gain)}, eps={self.eps:g}"
