"""Ways past the branch. Each sees the raw stream x and the prepared h = pre(x): a carry uses x, a projection h."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Carry", "Cut", "Pad", "Projection", "ScaledShortcut", "Shortcut", "reads_prepared"]


class Shortcut(nn.Module):
    """Abstract base of shortcuts: maps (x, h) to the skip."""

    reads_prepared: bool = True
    """Whether the skip depends on h."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError


class Carry(Shortcut):
    """shortcut(x, h) = x: the identity."""

    reads_prepared = False

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return x


class Projection(Shortcut):
    """shortcut(x, h) = W h, where shapes change (He 2015, option B; He 2016 projects the activated input).

    Args:
        map: the module that projects, classically a strided 1 × 1 convolution and its norm.
    """

    def __init__(self, map: nn.Module) -> None:
        super().__init__()
        self.map = map

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.map(h)


class Pad(Shortcut):
    """shortcut(x, h) = x at every stride-th pixel, with zero channels appended (He 2015, option A). No parameters.

    Shapes: (N, C, H, W) → (N, C + channels, ⌈H / stride⌉, ⌈W / stride⌉).

    >>> Pad(16, stride=2)(torch.ones(1, 16, 8, 8), torch.ones(1)).shape
    torch.Size([1, 32, 4, 4])
    """

    reads_prepared = False

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, stride={self.stride}"


class Cut(Shortcut):
    """shortcut(x, h) = 0: no skip at all."""

    reads_prepared = False

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.zeros((), dtype=x.dtype, device=x.device)


class ScaledShortcut(Shortcut):
    """shortcut(x, h) = α · inner(x, h), with α a constant."""

    def __init__(self, factor: float, inner: nn.Module) -> None:
        super().__init__()
        self.factor, self.inner = factor, inner
        self.reads_prepared = reads_prepared(inner)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.factor * self.inner(x, h)

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


def reads_prepared(shortcut: nn.Module) -> bool:
    """Whether a skip depends on h, as that of a module of somebody's own may."""
    return bool(getattr(shortcut, "reads_prepared", True))
