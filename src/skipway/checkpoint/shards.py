"""Sharded checkpoints: every process writes and reads its own shard of a network that FSDP2 has sharded.

torch.distributed.checkpoint writes the shards as safetensors files with their offsets in the headers, so no pickle is
involved; rank 0 writes the manifest, verifies, renames and prunes as `Checkpoints` does. A checkpoint can be read by
any number of processes. Every rank must see the same folder; all functions here are collective.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint import load as load_pieces
from torch.distributed.checkpoint import save as save_pieces
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from skipway.checkpoint import files as storage
from skipway.checkpoint.manifest import Entry, Manifest
from skipway.checkpoint.state import is_sharded, parameters_of
from skipway.checkpoint.store import (
    SHARD_FILE,
    STATE,
    STEM,
    Checkpoints,
    Snapshot,
    encode_state,
    read_all_tensors,
    verify_checkpoint,
    write_manifest,
)
from skipway.errors import CheckpointError, printable

__all__ = ["load_sharded", "save_sharded"]

Value = TypeVar("Value")


def save_sharded(checkpoints: Checkpoints, snapshot: Snapshot) -> None:
    """Write a checkpoint of sharded tensors; collective, in the foreground.

    Args:
        checkpoints: the folder; the same on all ranks.
        snapshot: step and state are taken from rank 0; tensors as `model_state(model, gather=False)` returns them. A
            tensor that is not sharded is taken from one of the ranks.

    Raises:
        CheckpointError: on every rank, if any rank failed; the previous checkpoints are kept.
    """
    tensors = {}
    for stem, named in snapshot.tensors.items():
        if not STEM.fullmatch(stem):
            raise CheckpointError(f"{printable(stem)!r} cannot name tensors; the rule is lower-case letters, 0-9, _")
        tensors.update({f"{stem}/{name}": tensor for name, tensor in named.items()})
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def begin() -> str:
        return str(stack.enter_context(checkpoints.writing(snapshot.step, needed)))

    def finish() -> None:
        content = encode_state(snapshot.step, snapshot.state)
        entries = {STATE: Entry(len(content), storage.write_hashed(aside / STATE, content))}
        for path in sorted(aside.glob("shard-*.safetensors")):
            storage.fsync_path(path)
            entries[path.name] = Entry(*storage.hash_regular(path))
        write_manifest(aside, snapshot.step, entries)

    with ExitStack() as stack:
        aside = Path(run_collectively(begin))
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
        run_collectively(lambda: save_pieces(tensors, storage_writer=writer, no_dist=not is_distributed()), on_all=True)
        run_collectively(finish)
        run_collectively(stack.close)


def load_sharded(
    checkpoints: Checkpoints, model: nn.Module, *, before: int | None = None
) -> tuple[Snapshot, list[str]]:
    """Load the newest valid checkpoint as `Checkpoints.newest` does, every process its own shard; collective.

    The model is left unchanged; `load_model_state` and `load_optimizer_state` apply what was read.

    Args:
        checkpoints: the folder; the same on all ranks.
        model: decides the sharding: a tensor with the name and shape of a parameter is sharded like that parameter.
        before: only consider checkpoints of earlier steps.

    Raises:
        CheckpointError: on every rank, if there is no valid checkpoint or it cannot be read.
    """
    (place, step, manifest, state), damaged = run_collectively(lambda: checkpoints.first_good(verify_folder, before))

    def read() -> dict[str, dict[str, Tensor]]:
        sharded = any(SHARD_FILE.fullmatch(name) for name in manifest.files)
        return read_shards(place, model) if sharded else read_all_tensors(place, manifest)

    return Snapshot(step, run_collectively(read, on_all=True), state), damaged


def verify_folder(folder: Path, step: int) -> tuple[Path, int, Manifest, dict[str, Any]]:
    """Verify a checkpoint; what rank 0 sends to the other ranks."""
    manifest, state = verify_checkpoint(folder, step)
    return folder, step, manifest, state


def read_shards(folder: Path, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Read the shard of this process from a sharded checkpoint."""
    reader = HuggingFaceStorageReader(str(folder))
    parameters = parameters_of(model)
    shards: dict[str, Tensor] = {}
    for name, about in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(about, TensorStorageMetadata):
            raise CheckpointError(f"{printable(folder)}: {printable(name)!r} is not a tensor")
        _, _, own = name.partition("/")
        like = parameters.get(own, parameters.get(own.rpartition("/")[0]))
        if like is not None and is_sharded(like) and like.shape == about.size:
            shards[name] = torch.zeros_like(like, dtype=about.properties.dtype, requires_grad=False)
        else:
            shards[name] = torch.zeros(about.size, dtype=about.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about running in a single process
        load_pieces(shards, storage_reader=reader, no_dist=not is_distributed())
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in shards.items():
        stem, _, own = name.partition("/")
        tensors.setdefault(stem, {})[own] = tensor
    return tensors


def is_distributed() -> bool:
    """Whether more than one process takes part."""
    return dist.is_initialized() and dist.get_world_size() > 1


def run_collectively(action: Callable[[], Value], *, on_all: bool = False) -> Any:
    """Run `action` on rank 0 and return its result everywhere, or on all ranks and return each rank's own.

    If it fails on one rank, every rank raises.
    """
    result: Any = None
    failure: BaseException | None = None
    try:
        if on_all or not is_distributed() or dist.get_rank() == 0:
            result = action()
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        failure = error
    text = None if failure is None else str(failure)
    outcomes: list[Any] = [(text, result)]
    if is_distributed():
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (text, None if on_all else result))
    if isinstance(failure, CheckpointError):
        raise failure
    for rank, (text, _) in enumerate(outcomes):
        if text is not None:
            raise CheckpointError(f"rank {rank}: {printable(text)}") from failure
    return result if on_all else outcomes[0][1]
