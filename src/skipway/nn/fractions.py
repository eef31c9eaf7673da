"""One stream in fractions: how a connection reads, mixes and writes parts of the channels with weights of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.nn.gain import Gain
from skipway.nn.initial import Zeros
from skipway.nn.maps import Linear
from skipway.nn.role import Role
from skipway.nn.stream_algebra import combine, without_autocast
from skipway.nn.streams import Streams, average_to

__all__ = ["DynamicFracConnection", "FracConnection"]


class FracConnection(Streams):
    """Learned numbers read, mix and write the m fractions of a stream, H of m × d/m (Zhu et al. 2025, eq. 6-8):
    x = Yᵀ H, carried = Aᵀ H, and fraction i of the branch's output is written with Bᵢ.

    At the start Y = A = 1 and B = 1 (eq. 15): y = x + F(x).

    Args:
        fractions: m.
        spatial: see `Streams`.

    Decay and learning rate: not decayed (sec. 4.3): A is the skip, which decay would shrink at every connection.

    >>> FracConnection(2, spatial=0).static
    Parameter containing:
    tensor([[1., 0., 1., 0., 1.],
            [0., 1., 0., 1., 1.]], requires_grad=True)
    """

    role = Role("gain")

    def __init__(self, fractions: int, *, spatial: int) -> None:
        super().__init__(1, spatial)
        self.fractions = fractions
        self.static = nn.Parameter(torch.empty(fractions, 2 * fractions + 1))  # Y | A | Bᵀ
        FracConnection.reset_parameters(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Y = 1, A = 1, B = 1."""
        own = torch.eye(self.fractions)
        self.static.copy_(torch.cat((own, own, torch.ones(self.fractions, 1)), dim=1))

    def start_neutral_(self, reads: int) -> None:
        """The start of the paper, which is neutral."""
        FracConnection.reset_parameters(self)

    def split(self, s: Tensor) -> Tensor:
        """(N, …, d, …) → (m, N, …, d/m, …)."""
        if s.shape[self.channel] % self.fractions:
            raise SkipwayError(
                f"{s.shape[self.channel]} channels in {self.fractions} fractions: the rule is a multiple of "
                f"{self.fractions}"
            )
        return s.unflatten(self.channel, (self.fractions, -1)).movedim(self.channel - 1, 0)

    def merge(self, parts: Tensor) -> Tensor:
        """(m, N, …, d/m, …) → (N, …, d, …)."""
        return parts.movedim(0, self.channel - 1).flatten(self.channel - 1, self.channel)

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.split(s)
        mixed = without_autocast(combine, self.static[:, :-1], parts)
        write = self.static[:, -1].view(-1, *(1,) * (-1 - self.channel))
        return self.merge(mixed[: self.fractions]), self.merge(mixed[self.fractions :]), write

    def join(self, carried: Tensor, write: Tensor, f: Tensor) -> Tensor:
        """carried + B ⊙ f, where B holds a weight for each fraction of f's channels."""
        if write.ndim == f.ndim == 4 and self.channel == -3:
            write = average_to(write, f)
        if len(f) == 1 and f.requires_grad and not torch.compiler.is_compiling():
            # torch 2.13's BatchNorm is wrong backward with the strides that the gradient of one sample gets here
            f.register_hook(lambda g: None if g is None else g.clone(memory_format=torch.contiguous_format))
        write, f = write.to(carried.dtype), f.to(carried.dtype)
        parts = write.unsqueeze(self.channel) * f.unflatten(self.channel, (self.fractions, -1))
        return carried + parts.flatten(self.channel - 1, self.channel)

    def extra_repr(self) -> str:
        return f"fractions={self.fractions}"


class DynamicFracConnection(FracConnection):
    """Frac-connections whose weights depend on each token or pixel: Y, A and B of `FracConnection` plus
    s tanh(norm(Hᵢ) W) of each fraction i (Zhu et al. 2025, eq. 11-14).

    At the start W = 0, s = 0.01 for Y and A together, and another for B.

    Args:
        fractions, spatial: see `FracConnection`.
        dim: channels of all fractions together.

    Decay and learning rate: W is decayed, all else is not (sec. 4.3).
    """

    def __init__(self, fractions: int, *, spatial: int, dim: int) -> None:
        super().__init__(fractions, spatial=spatial)
        self.norm = nn.LayerNorm(dim // fractions)
        self.map = Linear(dim // fractions, 2 * fractions + 1, bias=False, initial=Zeros())
        self.mix_scale, self.write_scale = Gain(1, init=0.01, spatial=0), Gain(1, init=0.01, spatial=0)

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.split(s).movedim(self.channel, -1)
        mix, write = torch.tanh(without_autocast(self.mapped, parts)).split((2 * self.fractions, 1), dim=-1)
        static = self.static.view(self.fractions, *(1,) * (parts.ndim - 2), -1)
        weights = (static[..., :-1] + self.mix_scale(mix)).to(parts.dtype)
        mixed = without_autocast(combine_last, weights, parts).movedim(-1, self.channel)
        write = (static[..., -1:] + self.write_scale(write)).squeeze(-1).movedim(0, self.channel)
        return self.merge(mixed[: self.fractions]), self.merge(mixed[self.fractions :]), write

    def mapped(self, parts: Tensor) -> Tensor:
        """norm(Hᵢ) W of each fraction, in the type of the stream: (…, d/m) → (…, 2 m + 1)."""
        # not `normed_product`: with so few channels, the mean square less the squared mean may lose its digits
        gain, bias, weight = (each.to(parts.dtype) for each in (self.norm.weight, self.norm.bias, self.map.weight))
        return F.linear(F.layer_norm(parts, self.norm.normalized_shape, gain, bias, self.norm.eps), weight)


def combine_last(weights: Tensor, parts: Tensor) -> Tensor:
    """Σᵢ w[i, …, j] partsᵢ, channels last: (m, …, k), (m, …, c) → (k, …, c)."""
    return torch.einsum("i...j,i...c->j...c", weights, parts)
