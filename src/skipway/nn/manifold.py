"""Hyper-connections whose mixing keeps the sum of the streams: doubly stochastic matrices."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from skipway.nn.initial import TruncatedNormal
from skipway.nn.maps import Linear
from skipway.nn.role import Role
from skipway.nn.stream_algebra import as_float32, normed_product, sinkhorn, without_autocast
from skipway.nn.streams import Streams, by_sample

__all__ = ["ManifoldHyperConnection"]


class ManifoldHyperConnection(Streams):
    """n streams read with weights σ, mixed by a doubly stochastic matrix and written with weights 2 σ, which are all
    computed from all streams of a token (Xie et al. 2025, "mHC", eq. 3 and 7-9).

    With v = rms(s₁ … sₙ), one vector of n·dim numbers, and a W v + b for each of the three: x = Σ σ(·)ⱼ sⱼ, carriedₖ =
    Σ Hⱼₖ sⱼ, writeₖ = 2 σ(·)ₖ. Weights are computed in float32 (the product of W in the type of the streams), whatever
    autocast says. H is `sinkhorn` of n × n logits, or a softmax over the n! permutation matrices ("mHC-lite",
    arXiv:2601.05732), which is doubly stochastic exactly, without iterations.

    At the start a = 0.01 and W ~ N(0, 0.02²). b is ours, since the paper does not say: reads of 1/n, writes of 1,
    `hold` on the diagonal of the logits, or on the permutation that is the identity.

    Args:
        count: n.
        dim: channels.
        spatial: see `Streams`.
        iterations: of Sinkhorn.
        hold: start of the diagonal over the other logits.
        form: "sinkhorn" or "birkhoff".

    Decay and learning rate: W is decayed, a and b are not.
    """

    role = Role("gain")
    permutations: Tensor
    epsilon = 1e-6

    def __init__(
        self,
        count: int,
        *,
        dim: int,
        spatial: int,
        iterations: int = 20,
        hold: float = 4.0,
        form: Literal["sinkhorn", "birkhoff"] = "sinkhorn",
    ) -> None:
        super().__init__(count, spatial)
        self.iterations, self.hold, self.form = iterations, hold, form
        mixing = count**2 if form == "sinkhorn" else math.factorial(count)
        self.sizes = (count, count, mixing)
        self.map = Linear(count * dim, sum(self.sizes), bias=False, initial=TruncatedNormal(0.02))
        self.base = nn.Parameter(torch.empty(sum(self.sizes)))
        self.scale = nn.Parameter(torch.empty(3))
        permutations = torch.empty(mixing if form == "birkhoff" else 0, count**2)
        self.register_buffer("permutations", permutations, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """a = 0.01; b so that a stream is read with 1/n, written with 1, and mostly kept."""
        self.scale.fill_(0.01)
        read, write, mix = self.base.split(self.sizes)
        read.fill_(-math.log(self.count - 1) if self.count > 1 else math.inf)
        write.zero_()
        mix.zero_()
        mix[:: self.count + 1 if self.form == "sinkhorn" else len(mix)] = self.hold
        if self.form == "birkhoff":
            rows = [torch.eye(self.count)[list(order)].flatten() for order in orders(self.count)]
            self.permutations.copy_(torch.stack(rows))

    @torch.no_grad()
    def start_neutral_(self, reads: int) -> None:
        """W = 0; stream `reads` is read with (n + 1) / 2n and each other one with 1 / 2n, which add up to 1. What is
        carried is s but for Sinkhorn's ε.
        """
        self.reset_parameters()
        self.map.weight.zero_()
        read = torch.full((self.count,), 1 / (2 * self.count))
        read[reads] += 0.5
        self.base[: self.count].copy_(torch.logit(read - self.epsilon))

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        streams = by_sample(s, self.count, self.channel)
        weight = self.map.weight.unflatten(1, (self.count, -1)).transpose(0, 1)
        found = normed_product(streams.flatten(1, 2), weight, self.epsilon, centred=False)
        read, write, mix = found.view(*streams.shape[1:-1], -1).split(self.sizes, dim=-1)
        b_read, b_write, b_mix = as_float32(self.base).split(self.sizes)
        scale = as_float32(self.scale)
        read = torch.sigmoid(read * scale[0] + b_read) + self.epsilon
        write = 2 * torch.sigmoid(write * scale[1] + b_write)
        weights = torch.cat((read.unsqueeze(-1), self.mixing(mix * scale[2] + b_mix)), dim=-1)
        read, carried = self.mixed(s, streams, weights)
        return read, carried, self.by_axis(write, s)

    def mixing(self, logits: Tensor) -> Tensor:
        """H, (…, n, n), from stream j to stream k."""
        if self.form == "sinkhorn":
            return sinkhorn(logits.unflatten(-1, (self.count, self.count)), self.iterations, self.epsilon)
        mix = without_autocast(torch.matmul, torch.softmax(logits, dim=-1), self.permutations.to(logits.dtype))
        return mix.unflatten(-1, (self.count, self.count))


def orders(count: int) -> list[tuple[int, ...]]:
    """All orders of n streams, that of the streams themselves first.

    >>> orders(2)
    [(0, 1), (1, 0)]
    """
    return list(itertools.permutations(range(count)))
