"""How ranks share a batch."""

from __future__ import annotations

from skipway.errors import DataError

__all__ = ["check_ranks"]


def check_ranks(batch_size: int, rank: int, world: int, mixes: bool = False, thing: str = "image") -> None:
    """Check that a batch of `batch_size` images can be divided among `world` ranks.

    Raises:
        DataError: it cannot be divided evenly, or images that are mixed would be on different ranks.

    >>> check_ranks(10, 0, 4)
    Traceback (most recent call last):
    ...
    skipway.errors.DataError: batch_size=10: 4 ranks cannot share it evenly; take 8 or 12
    """
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size}: a batch holds at least one {thing}")
    if not 0 <= rank < world:
        raise DataError(f"rank={rank}: ranks are numbered from 0 to world - 1, and world={world}")
    unit = world * 2 if mixes and world > 1 else world
    if batch_size % unit:
        below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
        take = f"take {below} or {above}" if below else f"take {above}"
        pairs = " in pairs, which mixup and CutMix need" if unit > world else ""
        raise DataError(f"batch_size={batch_size}: {world} ranks cannot share it evenly{pairs}; {take}")
