"""The residual connection: the only place in the library where a skip and a branch are joined."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skipway.nn.shortcut import Carry, reads_prepared
from skipway.nn.site import Site
from skipway.nn.streams import Streams

__all__ = ["Residual"]


class Residual(nn.Module):
    """y = post(shortcut(x, h) + drop(scale(branch(h)))), where h = pre(x).

    Every slot is a module; an absent one is `nn.Identity`, an absent shortcut carries x, an absent join adds.

    Args:
        branch: F, a module with a `path()` (see `Branch`) where schemes are to initialise it.
        pre: what the stream passes before the branch: norm, activation, a bias.
        shortcut: takes (x, h); see `skipway.nn.shortcut`.
        scale: what multiplies the branch.
        drop: stochastic depth.
        join: takes (skip, f) in place of the addition; see `skipway.nn.join`.
        post: what follows the addition.
        streams: how several streams are read, mixed and written; None for one stream. See `forward_streams`.
        site: where the connection stands.
        scheme: what dressed it, kept so that `initialise_` can find it again.

    >>> import torch
    >>> Residual(nn.Linear(4, 4))(torch.ones(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        branch: nn.Module,
        *,
        pre: nn.Module | None = None,
        shortcut: nn.Module | None = None,
        scale: nn.Module | None = None,
        drop: nn.Module | None = None,
        join: nn.Module | None = None,
        post: nn.Module | None = None,
        streams: Streams | None = None,
        site: Site | None = None,
        scheme: object | None = None,
    ) -> None:
        super().__init__()
        self.pre = nn.Identity() if pre is None else pre
        self.branch = branch
        self.scale = nn.Identity() if scale is None else scale
        self.drop = nn.Identity() if drop is None else drop
        self.shortcut = Carry() if shortcut is None else shortcut
        self.join = join
        self.post = nn.Identity() if post is None else post
        self.streams = streams
        if streams is not None:
            streams.admit(branch, self.shortcut, self.post)
        self.site = site
        self.scheme = scheme

    def forward(self, x: Tensor) -> Any:
        if self.streams is not None:
            return self.forward_streams(x)
        h = self.pre(x)
        skip, f = self.shortcut(x, h), self.drop(self.scale(self.branch(h)))
        return self.post(skip + f if self.join is None else self.join(skip, f))

    def forward_streams(self, s: Any) -> Any:
        """s' = post(shortcut(A s) + β drop(scale(branch(h)))), where h = pre(α s): α reads n streams into one, A mixes
        them, β writes into all. A shortcut that reads h takes each stream prepared, in one batch with h; of earlier
        outputs, one stream is carried, which is what is read.
        """
        assert self.streams is not None
        x, carried, write = self.streams(s)
        if carried is x or not reads_prepared(self.shortcut):
            h = self.pre(x)
            skip = self.shortcut(carried, h)
        else:
            h, each = self.pre(torch.cat((x, carried))).split((len(x), len(carried)))
            skip = self.shortcut(carried, each)
        f, write = self.streams.call(self.branch, h, write)
        return self.streams.keep(write, skip, self.post(self.streams.join(skip, write, self.drop(self.scale(f)))))
