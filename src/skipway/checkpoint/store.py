"""Checkpoints that survive a crash, a full disk and a flipped bit: one folder each, with a manifest of hashes.

    checkpoints/step-00000120/   model.safetensors  optimizer.safetensors  state.json  MANIFEST.json
    checkpoints/step-00000240/   ...
    checkpoints/.tmp-…           a save in progress, or one that a crash interrupted

A save copies the tensors to host memory, writes and hashes every file in a temporary folder, flushes files and folder
to the disk, reads everything back, and only then renames the folder. Older checkpoints are removed last. So at any
moment there is one complete checkpoint, and one that is damaged later is detected and skipped.
"""

from __future__ import annotations

import errno
import math
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from skipway.checkpoint import files as storage
from skipway.checkpoint.files import write_hashed
from skipway.checkpoint.manifest import MANIFEST, Entry, Manifest, is_count, verify
from skipway.errors import CheckpointError, printable
from skipway.validation import is_whole

__all__ = ["Checkpoints", "Snapshot"]

Value = TypeVar("Value")
# by file name: bytes, or tensors that are still to be encoded
Contents = dict[str, bytes | dict[str, Tensor]]

FOLDER_NAME = re.compile(r"step-(\d{8,15})(?:-(\d{1,9}))?")
STEM = re.compile(r"[a-z][a-z0-9_]{0,60}")
STATE = "state.json"
WHOLE_FILE = re.compile(rf"({STEM.pattern})\.safetensors")
SHARD_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
# the safetensors header entry in which torch.distributed.checkpoint keeps the offset of each shard
DCP_OFFSETS = "DCP_SHARDING_INFO"
ASIDE = ".tmp-"
# an upper bound for headers, manifest and directory entries when free space is checked before a save
HEADER_BYTES = 64 << 10


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at one step.

    Args:
        step: steps since the start of training, at least 0; names the folder.
        tensors: stem → name → tensor, one file per stem: "model", "optimizer", "ema". Stems are lower-case letters,
            digits and _.
        state: everything else, as JSON values with string keys.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run. Only one process at a time may write to the folder, see `RunFolder.lock`.

    Args:
        folder: holds one folder per checkpoint; created by the first save.
        keep: number of valid checkpoints to keep, at least 1. With 2, there is a fallback if the newest is damaged.
        background: write in a thread while training continues. `save` returns after the copy to host memory; an error
            is raised by the next `save` or by `finish`.

    >>> import tempfile, torch
    >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()))
    >>> checkpoints.save(Snapshot(3, {"model": {"weight": torch.ones(2)}}, {"epoch": 0}))
    >>> snapshot, damaged = checkpoints.newest()
    >>> snapshot.step, snapshot.tensors["model"]["weight"].tolist(), dict(snapshot.state), damaged
    (3, [1.0, 1.0], {'epoch': 0}, [])
    """

    def __init__(self, folder: Path, *, keep: int = 2, background: bool = False) -> None:
        if not is_whole(keep, 1):
            raise CheckpointError(f"keep={keep!r}: the rule is an integer >= 1")
        self.folder = folder
        self.keep = keep
        self.background = background
        self._verified: set[str] = set()  # names of folders that this process has verified
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint; once verified, remove all but the newest `keep` and any of later steps.

        Checkpoints of later steps exist only after a run went back to an earlier one; they are obsolete then.
        A second save of the same step replaces the first, which is kept until the second is complete.

        Raises:
            CheckpointError: a full disk, missing permissions, a deleted folder, a dtype that cannot be stored. The
                previous checkpoints are kept and nothing partial remains; training may continue and save again. In
                the background it reports the failure of the previous save, and this one is started nevertheless.
        """
        self._wait()
        storage.fault_point("begin")
        contents = stage_snapshot(snapshot)
        storage.fault_point("staged")
        failure, self._failure = self._failure, None
        if self.background:
            self._writer = threading.Thread(
                target=self._write_in_background, args=(snapshot.step, contents), name="save"
            )
            self._writer.start()
        else:
            self._write(snapshot.step, contents)
        if failure is not None:
            raise failure

    def finish(self) -> None:
        """Wait for a save in the background, and raise its error if it failed."""
        self._wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def newest(self, *, before: int | None = None) -> tuple[Snapshot, list[str]]:
        """Read the newest valid checkpoint; also return one sentence per damaged one that was skipped.

        Args:
            before: only consider checkpoints of earlier steps.

        Raises:
            CheckpointError: there is no valid checkpoint.
        """
        return self.first_good(read_checkpoint, before)

    def first_good(self, read: Callable[[Path, int], Value], before: int | None) -> tuple[Value, list[str]]:
        """Apply `read` to checkpoint folders, newest first, until one does not raise CheckpointError."""
        self._wait()
        damaged: list[str] = []
        for step, folder in reversed(self._list()):
            if before is not None and step >= before:
                continue
            try:
                value = read(folder, step)
            except CheckpointError as error:
                damaged.append(f"{error}; skipped")
            else:
                self._verified.add(folder.name)
                return value, damaged
        if damaged:
            raise CheckpointError(
                f"{printable(self.folder)}: none of {len(damaged)} checkpoints can be used; start a new run. "
                + " ".join(damaged)
            )
        raise CheckpointError(f"{printable(self.folder)} holds no checkpoint to resume from; start a new run")

    def steps(self) -> list[int]:
        """The steps of all checkpoints, damaged ones included, in ascending order."""
        return sorted({step for step, _ in self._list()})

    def sweep(self) -> None:
        """Remove the temporary folders of saves that a crash interrupted.

        Raises:
            CheckpointError: a folder cannot be removed.
        """
        self._wait()
        try:
            for entry in self._entries():
                if entry.name.startswith(ASIDE):
                    remove_path(entry)
        except OSError as error:
            raise CheckpointError(
                f"{printable(self.folder)}: the remains of an interrupted save cannot be removed: "
                f"{storage.describe_os_error(error)}"
            ) from error

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write_in_background(self, step: int, contents: Contents) -> None:
        try:
            self._write(step, contents)
        except BaseException as error:
            self._failure = error

    def _write(self, step: int, contents: Contents) -> None:
        with self.writing(step, sum(map(count_bytes, contents.values()))) as aside:
            write_files(aside, step, contents)

    @contextmanager
    def writing(self, step: int, needed: int) -> Iterator[Path]:
        """A temporary folder for a checkpoint of about `needed` bytes, in which the manifest is to be written last.

        On leaving, the folder is verified and renamed, and older checkpoints are removed. On failure it is removed.

        Raises:
            CheckpointError: see `save`.
        """
        aside = self.folder / f"{ASIDE}{step:08d}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._entries()  # raises for a link
            check_space(self.folder, needed + HEADER_BYTES)
            aside.mkdir()
            storage.fault_point("folder made")
            yield aside
            verify(aside, step)
            storage.fault_point("verified")
            place = self._free_name(step)
            os.rename(aside, place)
            storage.fault_point("renamed")
            storage.fsync_path(self.folder)
            storage.fault_point("rename synced")
        except Exception as error:  # not after a crash or Ctrl-C: `sweep` cleans up then
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, OSError | CheckpointError):
                why = storage.describe_os_error(error) if isinstance(error, OSError) else str(error)
                raise CheckpointError(
                    f"{printable(self.folder)}: the checkpoint of step {step} was not written, the previous one is "
                    f"kept: {why}"
                ) from error
            raise
        self._verified.add(place.name)
        try:
            self._prune(place, step)
        except OSError as error:
            raise CheckpointError(
                f"{printable(self.folder)}: the checkpoint of step {step} was written, but an older one cannot be "
                f"removed: {storage.describe_os_error(error)}"
            ) from error
        storage.fault_point("end")

    def _free_name(self, step: int) -> Path:
        """An unused folder name for a step: with a number appended if the plain one is taken."""
        place, attempt = self.folder / f"step-{step:08d}", 1
        while os.path.lexists(place):
            attempt += 1
            place = self.folder / f"step-{step:08d}-{attempt}"
        return place

    def _prune(self, newest: Path, last: int) -> None:
        """Keep `newest`, which is of step `last`, and valid ones of earlier steps, `keep` in all; remove the rest."""
        found = self._list()
        storage.fault_point("prune begins")
        if (last, newest) not in found:
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(newest))
        kept = {last}
        for step, folder in reversed(found):
            if folder == newest:
                continue
            if step < last and step not in kept and len(kept) < self.keep and self._is_good(folder, step):
                kept.add(step)
                continue
            # renamed first: a partly deleted folder must not have a name that `newest` considers
            leaving = self.folder / f"{ASIDE}removed-{folder.name}-{secrets.token_hex(4)}"
            os.rename(folder, leaving)
            storage.fault_point("prune renamed")
            remove_path(leaving)
            storage.fault_point("pruned")

    def _is_good(self, folder: Path, step: int) -> bool:
        """Whether a checkpoint is valid; its files are read only once."""
        if folder.name not in self._verified:
            try:
                verify(folder, step)
            except CheckpointError:
                return False
            self._verified.add(folder.name)
        return True

    def _list(self) -> list[tuple[int, Path]]:
        """All folders with the name of a checkpoint and their steps, in ascending order."""
        try:
            names = [(FOLDER_NAME.fullmatch(entry.name), entry) for entry in self._entries()]
        except OSError as error:
            raise CheckpointError(
                f"{printable(self.folder)} cannot be read: {storage.describe_os_error(error)}"
            ) from error
        numbered = [(int(match[1]), int(match[2] or 1), entry) for match, entry in names if match]
        return [(step, entry) for step, _, entry in sorted(numbered)]

    def _entries(self) -> list[Path]:
        """The entries of the folder; none if it does not exist yet."""
        if self.folder.is_symlink():
            raise CheckpointError(f"{printable(self.folder)} is a link; links are not followed: pass the folder itself")
        try:
            return [self.folder / name for name in os.listdir(self.folder)]
        except FileNotFoundError:
            return []


def stage_snapshot(snapshot: Snapshot) -> Contents:
    """The content of each file, copied to host memory: further training no longer changes it."""
    where = f"the checkpoint of step {snapshot.step}"
    if not 0 <= snapshot.step < 10**15:
        raise CheckpointError(f"step={snapshot.step}: the rule is a non-negative integer of at most 15 digits")
    contents: Contents = {STATE: encode_state(snapshot.step, snapshot.state)}
    for stem, tensors in snapshot.tensors.items():
        if not STEM.fullmatch(stem):
            raise CheckpointError(
                f"{where}: {printable(stem)!r} cannot name a file; the rule is lower-case letters, 0-9, _"
            )
        contents[f"{stem}.safetensors"] = storage.copy_to_host(tensors, where)
    return contents


def count_bytes(content: bytes | dict[str, Tensor]) -> int:
    """Approximate size of a file in bytes."""
    return len(content) if isinstance(content, bytes) else sum(tensor.nbytes for tensor in content.values())


def encode_state(step: int, state: Mapping[str, Any]) -> bytes:
    """Encode `state.json`; decoding returns exactly `state`."""
    values = {"step": step, "state": dict(state)}
    try:
        check_keys(values)
        content = storage.encode_json(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the state of step {step} is not JSON: {error}") from error
    if len(content) > storage.MAX_JSON_BYTES:
        raise CheckpointError(
            f"the state of step {step} takes {len(content):,} bytes; the limit is {storage.MAX_JSON_BYTES:,}: store "
            "large values as tensors"
        )
    return content


def check_keys(value: object) -> None:
    """Raise TypeError for keys that are not strings, which JSON would silently convert."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is not a string")
            check_keys(part)
    elif isinstance(value, list | tuple):
        for part in value:
            check_keys(part)


def check_space(folder: Path, needed: int) -> None:
    """Raise CheckpointError if the disk has too little free space."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"it needs {needed:,} bytes and {free:,} are available: free some space")


def write_files(folder: Path, step: int, contents: Contents) -> None:
    """Write files and manifest into a new folder and flush all to the disk."""
    entries = {}
    for name, content in contents.items():  # one by one, so that only one encoded file is in memory
        text = content if isinstance(content, bytes) else storage.encode_tensors(content, name)
        entries[name] = Entry(len(text), write_hashed(folder / name, text))
    write_manifest(folder, step, entries)


def write_manifest(folder: Path, step: int, entries: Mapping[str, Entry]) -> None:
    """Write the manifest of files that are already on the disk."""
    storage.fault_point("files complete")
    write_hashed(folder / MANIFEST, Manifest(step, entries).encoded())
    storage.fault_point("manifest written")
    storage.fsync_path(folder)
    storage.fault_point("folder synced")


def read_checkpoint(folder: Path, step: int) -> Snapshot:
    """Verify and read a checkpoint folder; sharded tensors are assembled.

    Raises:
        CheckpointError: the folder is damaged, or not a checkpoint of this library.
    """
    manifest, state = verify_checkpoint(folder, step)
    return Snapshot(step, read_all_tensors(folder, manifest), state)


def read_all_tensors(folder: Path, manifest: Manifest) -> dict[str, dict[str, Tensor]]:
    """Read all tensors of a verified checkpoint folder."""
    tensors: dict[str, dict[str, Tensor]] = {
        match[1]: storage.read_safetensors(folder / name)[0]
        for name in manifest.files
        if (match := WHOLE_FILE.fullmatch(name))
    }
    pieces = [folder / name for name in manifest.files if SHARD_FILE.fullmatch(name)]
    for name, tensor in join_shards(pieces).items():
        stem, _, name = name.partition("/")
        tensors.setdefault(stem, {})[name] = tensor
    return tensors


def verify_checkpoint(folder: Path, step: int) -> tuple[Manifest, dict[str, Any]]:
    """Verify a checkpoint folder and return its manifest and state.

    Raises:
        CheckpointError: the folder is damaged, or not a checkpoint of this library.
    """
    manifest = verify(folder, step)
    for name in manifest.files:
        if name != STATE and not WHOLE_FILE.fullmatch(name) and not SHARD_FILE.fullmatch(name):
            raise CheckpointError(f"{printable(folder)} holds {name}, which is not part of a checkpoint")
    values = storage.read_json(folder / STATE)
    if not isinstance(values, dict) or values.get("step") != step or not isinstance(values.get("state"), dict):
        raise CheckpointError(f"{printable(folder / STATE)} is not the state of step {step}")
    return manifest, values["state"]


def join_shards(pieces: Iterable[Path]) -> dict[str, Tensor]:
    """Assemble tensors from shard files, whose headers hold the offset of each shard.

    Raises:
        CheckpointError: the shards do not cover the tensors.
    """
    found: dict[str, list[tuple[list[int], Tensor]]] = {}
    for path in pieces:
        tensors, header = storage.read_safetensors(path)
        places = storage.decode_json(header.get(DCP_OFFSETS, "{}").encode(), path)
        for name, tensor in tensors.items():
            place = places.get(name, {}) if isinstance(places, dict) else None
            first = place.get("saved_offsets", [0] * tensor.dim()) if isinstance(place, dict) else None
            if not isinstance(first, list) or len(first) != tensor.dim() or not all(map(is_count, first)):
                raise CheckpointError(f"{printable(path)} lacks a valid offset for its shard of {printable(name)!r}")
            found.setdefault(name, []).append((first, tensor))
    return {name: assemble_tensor(name, parts) for name, parts in found.items()}


def assemble_tensor(name: str, parts: list[tuple[list[int], Tensor]]) -> Tensor:
    """Assemble one tensor from its shards, which must cover it exactly once."""
    if len(parts) == 1 and not any(parts[0][0]):
        return parts[0][1]
    ends = [[first + length for first, length in zip(place, part.shape, strict=True)] for place, part in parts]
    shape = [max(axis) for axis in zip(*ends, strict=False)]
    kinds = {(part.dtype, part.dim()) for _, part in parts}
    if len(kinds) > 1 or math.prod(shape) != sum(part.numel() for _, part in parts):
        raise CheckpointError(f"the shards of {printable(name)!r} do not cover the tensor")
    whole = torch.empty(shape, dtype=parts[0][1].dtype)
    for (place, part), end in zip(parts, ends, strict=True):
        whole[tuple(slice(*edges) for edges in zip(place, end, strict=True))] = part
    return whole


def remove_path(path: Path) -> None:
    """Delete a folder, a file, or a link (not its target)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
