"""A process group of one rank, for tests that wrap networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

__all__ = ["one_rank"]

KEPT: list[dist.ProcessGroup] = []
"""Groups outlive their tests. Where the last one to hold a group lets go, torch 2.13 waits for gloo's threads with the
interpreter's lock, for which these may wait to take down what a backward pass has left: neither goes on.
"""


@contextmanager
def one_rank() -> Iterator[None]:
    """Within the context this process is the only rank."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    assert dist.group.WORLD is not None
    KEPT.append(dist.group.WORLD)
    try:
        yield
    finally:
        dist.destroy_process_group()
