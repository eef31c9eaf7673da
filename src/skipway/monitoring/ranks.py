"""The processes of a distributed training, and which of them take part in a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skipway.monitoring.updates import local

__all__ = ["SamplingRanks", "find_ranks"]


@dataclass(frozen=True)
class SamplingRanks:
    """Where this process stands.

    Args:
        rank, world: its number, and how many there are.
        together: whether a forward pass needs all of them (sharded weights, SyncBatchNorm): then all take every sample,
            and agree on when; else the first one alone does, and no collective is called.
        copies: for each parameter 0, or the number of processes that hold the same part of it, where its gradient is
            sharded: 1, or with replicas of the shards (HSDP, tensor parallelism within data parallelism) their number.
        device: of what is exchanged.
    """

    rank: int = 0
    world: int = 1
    together: bool = False
    copies: tuple[int, ...] = ()
    device: torch.device | None = None

    @property
    def takes_part(self) -> bool:
        """Whether this process takes samples."""
        return self.together or self.rank == 0

    def agree(self, number: int) -> int:
        """The first process's number, where all take part."""
        if not self.together:
            return number
        shared = torch.tensor([number], device=self.device)
        dist.broadcast(shared, 0)
        return int(shared.item())

    def total_norms(self, norms: list[Tensor]) -> Tensor:
        """The norm over all parameters of each step, from the norms of the parameters."""
        squares = torch.stack(norms).square()
        if not any(self.copies):
            return squares.sum(-1).sqrt()
        copies = torch.tensor(self.copies, device=squares.device)
        parts = copies > 0
        shared = (squares[:, parts] / copies[parts]).sum(-1)
        dist.all_reduce(shared)
        return (shared + squares[:, ~parts].sum(-1)).sqrt()


def count_copies(parameter: nn.Parameter, world: int) -> int:
    """The number of processes, of all `world`, that hold the same part of a sharded parameter; 0 for one that is not
    sharded. A mesh may be that of one group of processes among several, of which each holds all parts.
    """
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return 0
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    return world // math.prod(mesh.size(axis) for axis, each in enumerate(placements) if not each.is_replicate())


def find_ranks(model: nn.Module, parameters: list[nn.Parameter]) -> SamplingRanks:
    """Where this process stands in the training of a model."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world == 1:
        return SamplingRanks()
    copies = tuple(count_copies(parameter, world) for parameter in parameters)
    together = any(copies) or any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    device = local(parameters[0].detach()).device if parameters else None
    return SamplingRanks(dist.get_rank(), world, together, copies, device)
