"""Several streams in somebody's network: what is inserted into its blocks.

Between blocks n streams travel as in our own networks, stream by stream in the batch axis, (n·N, …), so that nothing is
remembered between blocks. What runs in a branch is given one stream of N samples: masks, positions, rotary embeddings
and caches stay as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.nn.streams import Streams
from skipway.surgery.block_call import BlockCall
from skipway.tracing.arguments import exchange_at, item_at

__all__ = ["StreamRead", "StreamWrite", "StreamedBlock"]


class StreamedBlock(nn.Module):
    """Runs a block of somebody's network on n streams.

    Args:
        call: how the block is called.
        first: opens the streams, in the first block of a row.
        last: closes them, in the last one.
        connection: how streams are read, mixed and written where the whole block is one branch, block(x) − x; None
            where its connections are dressed one by one.
    """

    def __init__(
        self,
        call: BlockCall,
        *,
        first: nn.Module | None = None,
        last: nn.Module | None = None,
        connection: Streams | None = None,
    ) -> None:
        super().__init__()
        self.call, self.first, self.connection, self.last = call, first, connection, last

    def run(self, block: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block puts out, with its stream or streams in it."""
        s = self.call.take(args, kwargs)
        if self.first is not None:
            s = self.first(s)
        x, carried, write = (s, s, s) if self.connection is None else self.connection(s)
        args, kwargs = self.call.given(args, kwargs, x.clone() if self.call.writes_stream else x)
        output = block(*args, **kwargs)
        y = item_at(output, self.call.output)
        if self.connection is not None:
            y = self.connection.join(carried, write, y - x)
        if self.last is not None:
            y = self.last(y)
        return exchange_at(output, self.call.output, y)


class Handover(threading.local):
    """What is handed from where a connection reads to where it writes, once in a call of a block.

    Each thread has its own. A copy of the model has another one, which is empty.
    """

    pending: tuple[Streams, Tensor, Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Handover, ()


class StreamRead(nn.Module):
    """Before the first module of a branch: one stream is read from n, (n·N, …) → (N, …)."""

    def __init__(self, connection: Streams) -> None:
        super().__init__()
        self.connection, self.handover = connection, Handover()

    def forward(self, s: Tensor) -> Tensor:
        x, carried, write = self.connection(s)
        self.handover.pending = self.connection, carried - s, write
        return x


class StreamWrite(nn.Module):
    """Behind the last module of a branch: F → (A − 1) s + β F, (N, …) → (n·N, …), to which the network adds s."""

    def __init__(self, read: StreamRead) -> None:
        super().__init__()
        self.handover = read.handover

    def forward(self, f: Tensor) -> Tensor:
        if self.handover.pending is None:
            raise SkipwayError(
                "the end of a branch with several streams ran without its beginning in the same call of its block: it "
                "was called by itself, or a part of the block is recomputed; checkpoint whole blocks"
            )
        streams, mixing, write = self.handover.pending
        self.handover.pending = None
        return streams.join(mixing, write, f)
