"""Checkpoints that several processes write and read together, each its own piece, for networks too large for one.

torch.distributed.checkpoint writes the pieces as safetensors files with their places in the headers, so there is no
pickle anywhere; manifest, proof, rename and pruning are those of `Checkpoints`, done by rank 0. Any number of
processes can read what any other number wrote. All of them have to see the same folder and call together.
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
from skipway.checkpoint.state import is_spread, parameters_of
from skipway.checkpoint.store import (
    SHARD_FILE,
    STATE,
    STEM,
    Checkpoints,
    Snapshot,
    check,
    encoded_state,
    seal,
    tensors_of,
)
from skipway.errors import CheckpointError, printable

__all__ = ["load_sharded", "save_sharded"]

Value = TypeVar("Value")


def save_sharded(checkpoints: Checkpoints, snapshot: Snapshot) -> None:
    """Write a checkpoint of tensors that are spread over processes; collective, in the foreground.

    Args:
        checkpoints: where; all ranks have to give the same folder.
        snapshot: step and state of rank 0 count. Tensors as `model_state(model, gather=False)` gives them; one that is
            not spread is taken from one of the ranks.

    Raises:
        CheckpointError: on every rank, if anything failed on any; the checkpoints that were there are kept.
    """
    tensors = {}
    for stem, named in snapshot.tensors.items():
        if not STEM.fullmatch(stem):
            raise CheckpointError(f"{printable(stem)!r} cannot name tensors; the rule is small letters, 0-9, _")
        tensors.update({f"{stem}/{name}": tensor for name, tensor in named.items()})
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def begin() -> str:
        return str(stack.enter_context(checkpoints.writing(snapshot.step, needed)))

    def finish() -> None:
        content = encoded_state(snapshot.step, snapshot.state)
        entries = {STATE: Entry(len(content), storage.write_hashed(aside / STATE, content))}
        for path in sorted(aside.glob("shard-*.safetensors")):
            storage.force_to_disk(path)
            entries[path.name] = Entry(*storage.hash_regular(path))
        seal(aside, snapshot.step, entries)

    with ExitStack() as stack:
        aside = Path(together(begin))
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
        together(lambda: save_pieces(tensors, storage_writer=writer, no_dist=not several()), on_all=True)
        together(finish)
        together(stack.close)


def load_sharded(
    checkpoints: Checkpoints, model: nn.Module, *, before: int | None = None
) -> tuple[Snapshot, list[str]]:
    """The newest checkpoint that verifies, each process its own piece; as `Checkpoints.newest` and collective.

    Args:
        checkpoints: where; all ranks have to give the same folder.
        model: tells how to spread: what has the name and the shape of a parameter is spread as that one is. The
            weights are not changed, `load_model_state` and `load_optimizer_state` do that.
        before: only those of smaller steps.

    Raises:
        CheckpointError: on every rank, if there is none or it cannot be read.
    """
    (place, step, manifest, state), damaged = together(lambda: checkpoints.first_good(proved, before))

    def pieces() -> dict[str, dict[str, Tensor]]:
        shards = any(SHARD_FILE.fullmatch(name) for name in manifest.files)
        return read_pieces(place, model) if shards else tensors_of(place, manifest)

    return Snapshot(step, together(pieces, on_all=True), state), damaged


def proved(folder: Path, step: int) -> tuple[Path, int, Manifest, dict[str, Any]]:
    """What rank 0 tells the others of a checkpoint."""
    manifest, state = check(folder, step)
    return folder, step, manifest, state


def read_pieces(folder: Path, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """This process' part of the tensors that processes wrote in pieces."""
    reader = HuggingFaceStorageReader(str(folder))
    parameters = parameters_of(model)
    spread: dict[str, Tensor] = {}
    for name, about in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(about, TensorStorageMetadata):
            raise CheckpointError(f"{printable(folder)}: {printable(name)!r} is not a tensor")
        _, _, own = name.partition("/")
        like = parameters.get(own, parameters.get(own.rpartition("/")[0]))
        if like is not None and is_spread(like) and like.shape == about.size:
            spread[name] = torch.zeros_like(like, dtype=about.properties.dtype, requires_grad=False)
        else:
            spread[name] = torch.zeros(about.size, dtype=about.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        load_pieces(spread, storage_reader=reader, no_dist=not several())
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in spread.items():
        stem, _, own = name.partition("/")
        tensors.setdefault(stem, {})[own] = tensor
    return tensors


def several() -> bool:
    """Whether processes work together here."""
    return dist.is_initialized() and dist.get_world_size() > 1


def together(action: Callable[[], Value], *, on_all: bool = False) -> Any:
    """Let rank 0, or all ranks, do something; the result of rank 0, or of each its own. If one fails, all raise."""
    result: Any = None
    failure: BaseException | None = None
    try:
        if on_all or not several() or dist.get_rank() == 0:
            result = action()
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        failure = error
    text = None if failure is None else str(failure)
    told: list[Any] = [(text, result)]
    if several():
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, (text, None if on_all else result))
    if isinstance(failure, CheckpointError):
        raise failure
    for rank, (text, _) in enumerate(told):
        if text is not None:
            raise CheckpointError(f"rank {rank}: {printable(text)}") from failure
    return result if on_all else told[0][1]
