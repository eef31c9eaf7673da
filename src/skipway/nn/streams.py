"""Several streams in place of one: how a connection reads them, carries them on, and writes into them.

n streams travel as one tensor, stream by stream in the batch axis: (n·N, …) for N samples. So whatever treats samples
alike (stages, downsampling, norms after an addition) takes them as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.nn.gain import Gain
from skipway.nn.initial import Zeros
from skipway.nn.maps import Linear
from skipway.nn.role import Role
from skipway.nn.shortcut import Cut
from skipway.nn.stream_algebra import add_written, mix_streams, normed_product, without_autocast

__all__ = ["DynamicHyperConnection", "HyperConnection", "StreamEntry", "StreamExit", "Streams", "by_sample", "unfold"]


def unfold(s: Tensor, count: int) -> Tensor:
    """The streams apart: (n·N, …) → (n, N, …), a view.

    Raises:
        SkipwayError: n does not divide the batch axis.
    """
    if s.shape[0] % count:
        raise SkipwayError(
            f"a batch axis of {s.shape[0]}: this connection carries {count} streams, so the rule is a multiple of "
            f"{count}; skipway.nn.StreamEntry({count}) opens them"
        )
    return s.unflatten(0, (count, -1))


def by_sample(s: Tensor, count: int, channel: int) -> Tensor:
    """The streams apart with channels last, tokens or pixels in one axis: (n·N, …) → (n, N, P, C). A map whose channels
    are not last in memory is copied, so that what follows keeps them last.
    """
    return (
        unfold(s, count).movedim(channel, -1).contiguous().flatten(2, -2)
        if s.ndim > 2
        else unfold(s, count).unsqueeze(2)
    )


def average_to(write: Tensor, f: Tensor) -> Tensor:
    """Weights per pixel, (N, m, H, W), averaged to the size of f where a branch made the map smaller."""
    if write.shape[-2:] in ((1, 1), f.shape[-2:]):
        return write
    return F.adaptive_avg_pool2d(write, (f.shape[-2], f.shape[-1]))


class StreamEntry(nn.Module):
    """Open the streams: n copies of x. Shapes: (N, …) → (n·N, …).

    >>> StreamEntry(2)(torch.tensor([1.0, 2.0]))
    tensor([1., 2., 1., 2.])
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def start_neutral_(self) -> None:
        """Start so that a network with one stream computes what it did; see `Streams.start_neutral_`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.count)  # keeps a map whose channels are last in memory as it is

    def extra_repr(self) -> str:
        return f"{self.count}"


class StreamExit(StreamEntry):
    """Close the streams: their mean. Shapes: (n·N, …) → (N, …).

    >>> StreamExit(2)(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([2., 3.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.stream(x)

    def stream(self, s: Any) -> Tensor:
        """One stream for all of them, at any depth."""
        return unfold(s, self.count).mean(0)


class Streams(nn.Module):
    """Abstract base: s → (x, carried, write). A connection computes s'ⱼ = carriedⱼ + writeⱼ F(x).

    Shapes: s (n·N, …) → x (N, …), carried (n·N, …), write (n, N or 1, …), which broadcasts over F(x). What a state is
    and what is written, only a class and its `join` know; `History` has states that are tuples.

    Args:
        count: n.
        spatial: axes after the channel axis: 2 for (N, C, H, W), 0 for (N, T, C).
    """

    neutral_limit: str = ""
    """What the start of `start_neutral_` needs of the network around it, in words."""
    refusal: str = ""
    """Why a network that exists already cannot be given these streams; empty where it can."""

    def __init__(self, count: int, spatial: int) -> None:
        super().__init__()
        self.count, self.channel = count, -1 - spatial

    def start_neutral_(self, reads: int) -> None:
        """Start, in place, so that n equal streams s are read as s and carried on as s, and a branch is written with 1:
        a network with one stream that is given n computes what it did. Streams must not stay equal for ever, so stream
        `reads` is read more than others.

        Raises:
            SkipwayError: there is no such start.
        """
        raise SkipwayError(
            f"{type(self).__name__} has no start at which n equal streams are read and carried on as they are, so that "
            "a trained network would compute something else"
        )

    def admit(self, branch: nn.Module, shortcut: nn.Module, post: nn.Module) -> None:
        """Refuse slots beside which this one cannot stand.

        Raises:
            SkipwayError: naming the slot.
        """
        if isinstance(shortcut, Cut):
            raise SkipwayError(
                "Cut leaves nothing of the streams for the next connection to read; leave out that scheme"
            )

    def call(self, branch: nn.Module, h: Tensor, write: Any) -> tuple[Tensor, Any]:
        """The branch's output, and what is written with it."""
        return branch(h), write

    def keep(self, write: Any, skip: Tensor, y: Any) -> Any:
        """The state after the connection, whose shortcut made the skip, and join and post made y."""
        return y

    def join(self, carried: Tensor, write: Any, f: Tensor) -> Any:
        """carriedⱼ + writeⱼ f; where a branch made the map smaller, a weight per pixel is averaged as the map is."""
        if self.channel == -3:
            write = average_to(write.flatten(0, 1), f).unflatten(0, write.shape[:2])
        return add_written(carried, write, f, self.channel)

    def mixed(self, s: Tensor, streams: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What is read and what is carried on, shaped as s, of the streams (n, N, P, C); see `mix_streams`."""
        read, carried = mix_streams(streams, weights)
        return self.as_stream(read, s), self.as_stream(carried, s)

    def as_stream(self, rows: Tensor, s: Tensor) -> Tensor:
        """Rows of channels, shaped as s but for the number of samples."""
        return rows.reshape(-1, *s.movedim(self.channel, -1).shape[1:]).movedim(-1, self.channel)

    def by_axis(self, write: Tensor, s: Tensor) -> Tensor:
        """A weight for each token or pixel and stream, (N, P, n), as it broadcasts over the branch: (n, N, …)."""
        apart = write.movedim(-1, 0).unflatten(-1, s.movedim(self.channel, -1).shape[1:-1] or (1,))
        return apart.unsqueeze(-1).movedim(-1, self.channel) if s.ndim > 2 else apart

    def extra_repr(self) -> str:
        return f"{self.count}"


class HyperConnection(Streams):
    """Learned numbers read, mix and write n streams: x = A_mᵀ s, carried = A_rᵀ s, write = B (Zhu et al. 2025, eq. 2).

    At the start A_m reads one stream (eq. 14), A_r = 1, B = 1.

    Args:
        count: n.
        reads: index of the stream that is read at the start, 0 ≤ reads < n.
        spatial: see `Streams`.

    Decay and learning rate: not decayed (sec. 4): A_r is the skip, which decay would shrink at every connection.

    >>> HyperConnection(2, 1, spatial=0).static
    Parameter containing:
    tensor([[0., 1., 0., 1.],
            [1., 0., 1., 1.]], requires_grad=True)
    """

    role = Role("gain")

    def __init__(self, count: int, reads: int, *, spatial: int) -> None:
        super().__init__(count, spatial)
        self.reads = reads
        self.static = nn.Parameter(torch.empty(count, count + 2))  # A_m | A_r | Bᵀ
        HyperConnection.reset_parameters(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A_m = e_reads, A_r = 1, B = 1."""
        read = torch.zeros(self.count, 1)
        read[self.reads] = 1
        self.static.copy_(torch.cat((read, torch.eye(self.count), torch.ones(self.count, 1)), dim=1))

    def start_neutral_(self, reads: int) -> None:
        """The start of the paper, which is neutral."""
        self.reads = reads
        HyperConnection.reset_parameters(self)

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        streams = unfold(s, self.count)
        last = s.movedim(self.channel, -1)
        moved = not s.is_contiguous() and last.is_contiguous()
        flat = last.unflatten(0, (self.count, -1)) if moved else streams
        read, carried = mix_streams(flat.flatten(2).unsqueeze(-1), self.static[:, :-1])
        read, carried = read.view(flat.shape[1:]), carried.reshape(flat.flatten(0, 1).shape)
        if moved:
            read, carried = read.movedim(-1, self.channel), carried.movedim(-1, self.channel)
        return read, carried, self.static[:, -1].view(-1, *(1,) * s.ndim)


class DynamicHyperConnection(HyperConnection):
    """A hyper-connection whose weights depend on each token or pixel: A_m, A_r and B of `HyperConnection` plus
    s tanh(norm(sᵢ) W) of each stream i (Zhu et al. 2025, eq. 10-13).

    At the start W = 0, s = 0.01 for A_m and A_r together, and another for B.

    Args:
        count, reads, spatial: see `HyperConnection`.
        dim: channels.

    Decay and learning rate: W is decayed, all else is not (sec. 4).
    """

    def __init__(self, count: int, reads: int, *, spatial: int, dim: int) -> None:
        super().__init__(count, reads, spatial=spatial)
        self.norm = nn.LayerNorm(dim)
        self.map = Linear(dim, count + 2, bias=False, initial=Zeros())
        self.mix_scale, self.write_scale = Gain(1, init=0.01, spatial=0), Gain(1, init=0.01, spatial=0)

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        streams = by_sample(s, self.count, self.channel)
        weight = self.map.weight * self.norm.weight
        weight = weight - weight.mean(-1, keepdim=True)
        found = normed_product(streams.flatten(0, 2).unsqueeze(0), weight.unsqueeze(0), self.norm.eps, centred=True)
        found = torch.tanh(found + without_autocast(torch.matmul, self.map.weight, self.norm.bias))
        found = found.view(*streams.shape[:-1], -1).permute(1, 2, 0, 3)
        mix, write = found.split((self.count + 1, 1), dim=-1)
        read, carried = self.mixed(s, streams, self.static[:, :-1] + self.mix_scale(mix))
        write = (self.static[:, -1:] + self.write_scale(write)).squeeze(-1)
        return read, carried, self.by_axis(write, s)
