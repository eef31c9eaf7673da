"""Several streams read through gates per channel and written with one weight each; the skip is the identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipway.nn.initial import TruncatedNormal
from skipway.nn.maps import Linear
from skipway.nn.role import Role
from skipway.nn.stream_algebra import as_float32, gated_mean, normed_product
from skipway.nn.streams import StreamExit, Streams, by_sample

__all__ = ["GatedExit", "GatedRead", "GatedResidual"]


class GatedRead(nn.Module):
    """n streams of a token to one: x = meanⱼ(gⱼ ⊙ tⱼ), t = (1 + γ) ⊙ rms(s), g = σ(W_up silu(W_down t / n)).

    rms is that of each stream; t / n, W and g take all streams in a row.

    Shapes: (n, R, dim) for R tokens or pixels → x (R, dim), and the rows of further maps, M t / n, (R, k).

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

    def forward(self, s: Tensor, *further: Tensor) -> tuple[Tensor, Tensor]:
        gain = 1 + as_float32(self.gain)
        maps = torch.cat((self.down.weight, *further)) * gain
        found = normed_product(s, maps.unflatten(1, s.shape[::2]).transpose(0, 1), self.epsilon, joint=False)
        found = found.sum(0) / self.count
        hidden = F.silu(found[:, : self.down.out_features]).to(s.dtype)
        up, gain = self.up.weight.unflatten(0, s.shape[::2]), gain.view(s.shape[::2])
        return gated_mean(s, hidden, up, gain, self.epsilon), found[:, self.down.out_features :]


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
        streams = by_sample(s, self.count, self.channel)
        x, injected = self.read(streams.flatten(1, 2), self.inject.weight)
        write = 2 * torch.sigmoid(injected).to(s.dtype)
        return self.as_stream(x, s), s, self.by_axis(write.view(*streams.shape[1:-1], -1), s)


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
        read = self.read(by_sample(x, self.count, self.channel).flatten(1, 2))[0]
        last = x.movedim(self.channel, -1)
        return read.view(-1, *last.shape[1:]).movedim(-1, self.channel)
