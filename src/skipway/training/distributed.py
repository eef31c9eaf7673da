"""Distributed training: join the processes of torchrun, wrap the network, reduce over ranks.

A single process is one rank, for which every function here is a no-op.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.nn import Residual

__all__ = ["Ranks", "join_ranks"]

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among the processes of a run.

    Args:
        rank: 0 <= rank < world; rank 0 writes and reports.
        world: number of processes.
        local: rank on this machine, the index of its GPU.

    >>> Ranks().first, Ranks().all_reduce(torch.tensor([2.0])).item()
    (True, 2.0)
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place; returns the sum on every rank."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the floating-point tensors of every rank with those of rank 0, in place."""
        for tensor in tensors if self.world > 1 else ():
            if tensor.is_floating_point():
                dense = tensor.detach().contiguous()  # Gloo would write past a strided one, and NCCL refuses it
                dist.broadcast(dense, 0)
                if dense.data_ptr() != tensor.data_ptr():
                    tensor.detach().copy_(dense)

    def any(self, here: bool) -> bool:
        """Whether the condition holds on any rank; reduced on the CPU, so that no GPU synchronises."""
        return here if self.world == 1 else bool(self.all_reduce(torch.tensor(float(here))) > 0)

    def meet(self, *, finished: bool = False, stop: bool = False) -> tuple[bool, bool]:
        """Whether any rank has finished, and whether any stops: how ranks wait for one that works alone."""
        if self.world == 1:
            return finished, stop
        values = self.all_reduce(torch.tensor([float(finished), float(stop)]))
        return bool(values[0] > 0), bool(values[1] > 0)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def wrap(self, model: nn.Module, device: torch.device, *, shard: bool) -> nn.Module:
        """Wrap the network for training on all ranks: DDP, or with `shard` FSDP2 block by block, in place.

        DDP averages the gradients of equal shares of a batch, which is the gradient of the whole batch unless a module
        computes batch statistics. BatchNorm becomes SyncBatchNorm on a GPU and stays local on a CPU, where torch has
        no SyncBatchNorm.
        """
        if self.world == 1:  # nothing to share
            return model
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if not shard:
            return nn.parallel.DistributedDataParallel(
                model, device_ids=[device.index] if device.index is not None else None
            )
        return shard_connections(model, device, self.world)


def shard_connections(model: nn.Module, device: torch.device, world: int) -> nn.Module:
    """Shard a network over so many processes by FSDP2, connection by connection, in place.

    Raises:
        SkipwayError: a parameter is a scalar, whose first axis cannot be shared out; the model is as before.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if scalars := [name for name, parameter in model.named_parameters() if parameter.ndim == 0]:
        raise SkipwayError(
            f"sharding='full': FSDP2 shares out the first axis of each parameter, and scalars have none: {scalars[0]} "
            f"and {len(scalars) - 1} more. Use sharding='none', or a scheme without scalars (layerscale for skipinit)"
        )
    mesh = init_device_mesh(device.type, (world,))
    for module in list(model.modules()):
        if isinstance(module, Residual):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


LEFT: list[Any] = []
"""Process groups that were left. Whoever drops the last reference to one waits for Gloo's threads with the
interpreter's lock, for which they may wait themselves to destroy what the last backward pass has left (torch 2.13).
"""


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Context of the process group that torchrun started; a single rank without torchrun.

    torchrun sets RANK, WORLD_SIZE and LOCAL_RANK. The backend is Gloo for CPUs and NCCL for GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    ranks = Ranks(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")))
    if dist.is_initialized():  # by the caller, who also destroys it
        yield ranks
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(ranks.local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    yield ranks
    # not after an error: other ranks may be waiting elsewhere; torchrun ends them when this process exits
    dist.barrier()
    LEFT.append(dist.group.WORLD)
    dist.destroy_process_group()
