"""Several streams read through gates per channel and written with one weight each; the skip is the identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipway.nn.initial import TruncatedNormal
from skipway.nn.maps import Linear
from skipway.nn.role import Role
from skipway.nn.stream_algebra import as_float32
from skipway.nn.streams import StreamExit, Streams, unfold

__all__ = ["GatedExit", "GatedRead", "GatedResidual"]


class GatedRead(nn.Module):
    """n streams of a token to one: x = meanⱼ(gⱼ ⊙ tⱼ), t = (1 + γ) ⊙ rms(s), g = σ(W_up silu(W_down t / n)).

    rms is that of each stream; t / n, W and g take all streams in a row.

    Shapes: (…, n, dim) → x (…, dim), t (…, n · dim).

    Args:
        count: n.
        dim: channels.
        rank: r, outputs of W_down.
    """

    role = Role("norm")
    epsilon = 1e-6

    def __init__(self, count: int, dim: int, rank: int) -> None:
        super().__init__()
        self.count = count
        self.gain = nn.Parameter(torch.zeros(count * dim))  # γ
        self.down = Linear(count * dim, rank, bias=False, initial=TruncatedNormal(0.02))
        self.up = Linear(rank, count * dim, bias=False, initial=TruncatedNormal(0.02))

    def reset_parameters(self) -> None:
        """γ = 0."""
        nn.init.zeros_(self.gain)

    @torch.no_grad()
    def start_neutral_(self, reads: int) -> None:
        """x = rms(s) of n equal streams s, which a norm behind it cannot tell from s but for its ε: gates are ½, and
        the gains 1 + γ are n + 1 for stream `reads` and 1 for the others, 2 on average.
        """
        self.up.weight.zero_()
        self.gain.zero_()
        self.gain.unflatten(0, (self.count, -1))[reads] = self.count

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        wide = as_float32(s)
        size = wide.square().mean(-1, keepdim=True) + self.epsilon
        t = ((wide * torch.rsqrt(size)).flatten(-2) * (1 + as_float32(self.gain))).to(s.dtype)
        gate = torch.sigmoid(self.up(F.silu(self.down(t) / self.count)))
        return (gate * t).unflatten(-1, (self.count, -1)).mean(-2), t


class GatedResidual(Streams):
    """sⱼ' = sⱼ + wⱼ F(x), where x is a `GatedRead` and w = 2 σ(W t / n) (transformers' `qwen4_exp`).

    Args:
        count: n.
        dim: channels.
        rank: see `GatedRead`.
        spatial: see `Streams`.

    Decay and learning rate: linear maps are decayed, the gain is not.
    """

    neutral_limit = (
        "streams are normalised where they are read, which leaves a network as it is, up to the ε of its norms, only "
        "if every branch begins with a norm and one follows on the last block"
    )

    def __init__(self, count: int, *, dim: int, rank: int, spatial: int) -> None:
        super().__init__(count, spatial)
        self.read = GatedRead(count, dim, rank)
        self.inject = Linear(count * dim, count, bias=False, initial=TruncatedNormal(0.02))

    @torch.no_grad()
    def start_neutral_(self, reads: int) -> None:
        """Neutral where the branch begins with a norm; see `GatedRead.start_neutral_`."""
        self.read.start_neutral_(reads)
        self.inject.weight.zero_()

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, t = self.read(unfold(s, self.count).movedim(self.channel, -1).movedim(0, -2))
        write = 2 * torch.sigmoid(self.inject(t) / self.count)
        write = write.movedim(-1, 0).unsqueeze(-1).movedim(-1, self.channel)
        return x.movedim(-1, self.channel), s, write


class GatedExit(StreamExit):
    """Close the streams by a `GatedRead`. Shapes: as `StreamExit`."""

    def __init__(self, count: int, *, dim: int, rank: int, spatial: int) -> None:
        super().__init__(count)
        self.channel = -1 - spatial
        self.read = GatedRead(count, dim, rank)

    def start_neutral_(self) -> None:
        """Neutral where a norm follows; see `GatedRead.start_neutral_`."""
        self.read.start_neutral_(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(unfold(x, self.count).movedim(self.channel, -1).movedim(0, -2))[0].movedim(-1, self.channel)
