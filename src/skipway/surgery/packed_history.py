"""Earlier outputs carried through somebody's network: a history packed into the batch axis of one tensor.

A history is a tuple of tensors that grows. Between blocks of others travels one tensor, so it has room for all that the
row will hold, (K·N, …): what is not written yet is 0 and not read. Each connection copies it, which costs K streams of
memory; a scheme that sums outputs up in blocks keeps K small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skipway.nn.history import History, as_sources
from skipway.nn.streams import StreamEntry, StreamExit, Streams, unfold

__all__ = ["PackedHistory", "pack_histories"]


class PackedEntry(StreamEntry):
    """Open a history: x, and zeros in place of what is to come. Shapes: (N, …) → (K·N, …)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x.new_zeros(((self.count - 1) * len(x), *x.shape[1:]))))


class PackedExit(StreamExit):
    """Close a history. Shapes: (K·N, …) → (N, …).

    Args:
        count: K.
        held: tensors that the history holds at the end.
        last: what closes it.
    """

    def __init__(self, count: int, held: int, last: nn.Module) -> None:
        super().__init__(count)
        self.held, self.last = held, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(held_in(x, self.count, self.held))


class PackedHistory(Streams):
    """A connection that reads a history from a tensor that it is packed in, and adds what it changes there.

    Args:
        count: K.
        held: tensors that the history holds before the connection.
        history: reads, joins and keeps.
    """

    def __init__(self, count: int, held: int, history: History) -> None:
        super().__init__(count, -1 - history.channel)
        self.held, self.history = held, history

    def start_neutral_(self, reads: int) -> None:
        """As the history starts."""
        self.history.start_neutral_(reads)

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor, Any]:
        x, carried, rest = self.history(held_in(s, self.count, self.held))
        return x, s, (s, carried, rest)

    def join(self, carried: Tensor, write: Any, f: Tensor) -> Tensor:
        s, x, rest = write
        sources = as_sources(self.history.keep(rest, x, self.history.join(x, rest, f)))
        after = s.unflatten(0, (self.count, -1))
        changed = [source - before for source, before in zip(sources, after, strict=False)]
        changed += [torch.zeros_like(f)] * (self.count - len(changed))
        return carried + torch.cat(changed)


def held_in(s: Tensor, count: int, held: int) -> Any:
    """The history that is packed in a tensor."""
    sources = unfold(s, count)[:held].unbind()
    return sources[0] if held == 1 else sources


@torch.no_grad()
def pack_histories(
    histories: Sequence[History], last: nn.Module, dim: int
) -> tuple[PackedEntry, list[PackedHistory], PackedExit]:
    """Pack the histories of a row of connections with `dim` channels, and count by trying what each is given."""
    state: Any = torch.zeros(1, dim, *(1,) * (-1 - histories[0].channel))
    held = [1]
    for history in histories:
        x, carried, rest = history(state)
        state = history.keep(rest, carried, history.join(carried, rest, torch.zeros_like(x)))
        held.append(len(as_sources(state)))
    count = max(held)
    packed = [PackedHistory(count, number, each) for number, each in zip(held[:-1], histories, strict=True)]
    return PackedEntry(count), packed, PackedExit(count, held[-1], last)
