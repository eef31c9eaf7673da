"""One process or many: torchrun's processes joined, the network wrapped, sums taken over all of them.

A single process is the case of one rank; every function here is then free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skipway.tracing.chain import chain

__all__ = ["Ranks", "joined"]

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Args:
        rank: its number, 0 <= rank < world; 0 writes and reports.
        world: how many there are.
        local: its number on this machine, which is its GPU's.

    >>> Ranks().first, Ranks().total(torch.tensor([2.0])).item()
    (True, 2.0)
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, in each of them."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, here: bool) -> bool:
        """Whether it is so in any process; asked on the CPU, so that no GPU waits."""
        return here if self.world == 1 else bool(self.total(torch.tensor(float(here))) > 0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def wrap(self, model: nn.Module, device: torch.device, *, shard: bool) -> nn.Module:
        """The network as all processes train it together: DDP, or with `shard` FSDP2 block by block, in place.

        DDP averages the gradients of equal shares of a batch, which is the gradient of the whole batch as long as no
        module takes statistics over a batch; BatchNorms become synchronised ones on a GPU and stay apart on a CPU,
        where torch has no synchronised one.
        """
        if self.world == 1:  # one process holds the whole network anyway
            return model
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if not shard:
            return nn.parallel.DistributedDataParallel(
                model, device_ids=[device.index] if device.index is not None else None
            )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.world,))
        for connection in chain(model):
            fully_shard(connection.residual, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes that torchrun started, as long as the context lasts; one rank where it did not.

    torchrun sets RANK, WORLD_SIZE and LOCAL_RANK. Gloo joins CPUs, NCCL GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    ranks = Ranks(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")))
    if dist.is_initialized():  # by the caller, who runs several trainings and ends it himself
        yield ranks
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(ranks.local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    yield ranks
    # not after an error: the others may wait for this process somewhere else; torchrun ends them when it exits
    dist.barrier()
    dist.destroy_process_group()
