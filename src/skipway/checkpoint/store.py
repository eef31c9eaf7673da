"""Checkpoints that survive a crash, a full disk and a flipped bit: each a folder with a manifest of hashes.

    checkpoints/step-00000120/   model.safetensors  optimizer.safetensors  state.json  MANIFEST.json
    checkpoints/step-00000240/   ...
    checkpoints/.tmp-…           of a save that is under way, or was when the process died

A save copies the tensors to host memory, writes every file aside with its hash taken on the way, forces files and
folder to the disk, reads everything back, and only then gives the folder its name. What is older goes last. So at any
moment the newest complete checkpoint is whole, and one that changes later is noticed and passed over.
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

__all__ = ["Checkpoints", "Snapshot"]

Value = TypeVar("Value")
# by file name: bytes as they are, or tensors that are not a file's bytes yet
Contents = dict[str, bytes | dict[str, Tensor]]

FOLDER_NAME = re.compile(r"step-(\d{8,15})(?:-(\d{1,9}))?")
STEM = re.compile(r"[a-z][a-z0-9_]{0,60}")
STATE = "state.json"
WHOLE_FILE = re.compile(rf"({STEM.pattern})\.safetensors")
SHARD_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
# where torch.distributed.checkpoint says in a header at which place of the whole each piece begins
PLACES = "DCP_SHARDING_INFO"
ASIDE = ".tmp-"
# room for headers, the manifest and the names, when the free space is checked before a save
SLACK = 64 << 10


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at one step.

    Args:
        step: steps since the start of training, at least 0; names the folder.
        tensors: one file each: stem → name → tensor, such as "model", "optimizer", "ema". Small letters, digits, _.
        state: everything else, as JSON: objects have text for keys, lists are not tuples.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run. One process at a time may write to the folder, see `RunFolder.lock`.

    Args:
        folder: holds one folder per checkpoint; made by the first save.
        keep: how many good ones stay, at least 1. With 2, one that is damaged later still has one before it.
        background: let a thread write while training goes on. Only the copy to host memory is waited for; what went
            wrong is raised by the next `save` or by `finish`.

    >>> import tempfile, torch
    >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()))
    >>> checkpoints.save(Snapshot(3, {"model": {"weight": torch.ones(2)}}, {"epoch": 0}))
    >>> snapshot, damaged = checkpoints.newest()
    >>> snapshot.step, snapshot.tensors["model"]["weight"].tolist(), dict(snapshot.state), damaged
    (3, [1.0, 1.0], {'epoch': 0}, [])
    """

    def __init__(self, folder: Path, *, keep: int = 2, background: bool = False) -> None:
        if keep < 1:
            raise CheckpointError(f"keep={keep}: the rule is a whole number of at least 1")
        self.folder = folder
        self.keep = keep
        self.background = background
        self._proved: set[str] = set()  # names of folders that this process has verified
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint; once it is proved, remove all but the newest `keep`, and those of later steps.

        Checkpoints of later steps are there only when a run went back to an earlier one, which ends the other course.
        A second save of the same step replaces the first, which stays until the second is whole.

        Raises:
            CheckpointError: a full disk, lacking rights, a folder that has gone, numbers that cannot be stored. The
                checkpoints that were there are kept and nothing half-written stays; training may go on and save
                again. In the background it is the failure of the save before; this one is under way all the same.
        """
        self._wait()
        storage.reached("begin")
        contents = staged(snapshot)
        storage.reached("staged")
        failure, self._failure = self._failure, None
        if self.background:
            self._writer = threading.Thread(target=self._write_behind, args=(snapshot.step, contents), name="save")
            self._writer.start()
        else:
            self._write(snapshot.step, contents)
        if failure is not None:
            raise failure

    def finish(self) -> None:
        """Wait for a save in the background; raises what went wrong with it."""
        self._wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def newest(self, *, before: int | None = None) -> tuple[Snapshot, list[str]]:
        """The newest checkpoint that verifies, and one sentence for each damaged one that was passed over.

        Args:
            before: only those of smaller steps, for a run that goes back.

        Raises:
            CheckpointError: there is none.
        """
        return self.first_good(read_checkpoint, before)

    def first_good(self, read: Callable[[Path, int], Value], before: int | None) -> tuple[Value, list[str]]:
        """What `read` makes of the newest checkpoint folder that it does not refuse; `newest` is made of this."""
        self._wait()
        damaged: list[str] = []
        for step, folder in reversed(self._found()):
            if before is not None and step >= before:
                continue
            try:
                value = read(folder, step)
            except CheckpointError as error:
                damaged.append(f"{error}; passed over")
            else:
                self._proved.add(folder.name)
                return value, damaged
        if damaged:
            raise CheckpointError(
                f"{printable(self.folder)}: none of {len(damaged)} checkpoints can be used; start the run again. "
                + " ".join(damaged)
            )
        raise CheckpointError(f"{printable(self.folder)} holds no checkpoint to continue from; start the run again")

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, damaged ones included, the earliest first."""
        return sorted({step for step, _ in self._found()})

    def sweep(self) -> None:
        """Remove what saves left behind that a crash cut short.

        Raises:
            CheckpointError: something cannot be removed.
        """
        self._wait()
        try:
            for entry in self._entries():
                if entry.name.startswith(ASIDE):
                    remove(entry)
        except OSError as error:
            raise CheckpointError(
                f"{printable(self.folder)}: what a crashed save left cannot be removed: {storage.reason(error)}"
            ) from error

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write_behind(self, step: int, contents: Contents) -> None:
        try:
            self._write(step, contents)
        except BaseException as error:
            self._failure = error

    def _write(self, step: int, contents: Contents) -> None:
        with self.writing(step, sum(map(weight, contents.values()))) as aside:
            write_files(aside, step, contents)

    @contextmanager
    def writing(self, step: int, needed: int) -> Iterator[Path]:
        """A folder to write a checkpoint of about `needed` bytes into, manifest last; `save` is made of this.

        At the end the folder is proved, gets its name, and what is older goes. If anything fails it is removed.

        Raises:
            CheckpointError: as `save`.
        """
        aside = self.folder / f"{ASIDE}{step:08d}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._entries()  # refuses a link
            check_space(self.folder, needed + SLACK)
            aside.mkdir()
            storage.reached("folder made")
            yield aside
            verify(aside, step)
            storage.reached("verified")
            place = self._free_name(step)
            os.rename(aside, place)
            storage.reached("renamed")
            storage.force_to_disk(self.folder)
            storage.reached("rename synced")
        except Exception as error:  # not of a crash or Ctrl-C: `sweep` cleans up after those
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, OSError | CheckpointError):
                why = storage.reason(error) if isinstance(error, OSError) else str(error)
                raise CheckpointError(
                    f"{printable(self.folder)}: the checkpoint of step {step} was not written, the one before is kept: "
                    f"{why}"
                ) from error
            raise
        self._proved.add(place.name)
        try:
            self._prune(place, step)
        except OSError as error:
            raise CheckpointError(
                f"{printable(self.folder)}: the checkpoint of step {step} is written, but an older one cannot be "
                f"removed: {storage.reason(error)}"
            ) from error
        storage.reached("end")

    def _free_name(self, step: int) -> Path:
        """The folder of a step, or with a number behind where that is taken."""
        place, attempt = self.folder / f"step-{step:08d}", 1
        while os.path.lexists(place):
            attempt += 1
            place = self.folder / f"step-{step:08d}-{attempt}"
        return place

    def _prune(self, newest: Path, last: int) -> None:
        """Keep `newest`, of step `last`, and the good ones before it, `keep` in all, each of another step."""
        found = self._found()
        storage.reached("prune begins")
        if (last, newest) not in found:
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(newest))
        kept = {last}
        for step, folder in reversed(found):
            if folder == newest:
                continue
            if step < last and step not in kept and len(kept) < self.keep and self._is_good(folder, step):
                kept.add(step)
                continue
            # aside first: a folder of which only a part is left has no name that `newest` would look at
            leaving = self.folder / f"{ASIDE}removed-{folder.name}-{secrets.token_hex(4)}"
            os.rename(folder, leaving)
            storage.reached("prune renamed")
            remove(leaving)
            storage.reached("pruned")

    def _is_good(self, folder: Path, step: int) -> bool:
        """Whether a checkpoint verifies; asked of the files only once."""
        if folder.name not in self._proved:
            try:
                verify(folder, step)
            except CheckpointError:
                return False
            self._proved.add(folder.name)
        return True

    def _found(self) -> list[tuple[int, Path]]:
        """Everything that has the name of a checkpoint, with its step, the earliest first."""
        try:
            names = [(FOLDER_NAME.fullmatch(entry.name), entry) for entry in self._entries()]
        except OSError as error:
            raise CheckpointError(f"{printable(self.folder)} cannot be read: {storage.reason(error)}") from error
        numbered = [(int(match[1]), int(match[2] or 1), entry) for match, entry in names if match]
        return [(step, entry) for step, _, entry in sorted(numbered)]

    def _entries(self) -> list[Path]:
        """What the folder holds; nothing where there is no folder yet."""
        if self.folder.is_symlink():
            raise CheckpointError(f"{printable(self.folder)} is a link; links are not followed: give the folder itself")
        try:
            return [self.folder / name for name in os.listdir(self.folder)]
        except FileNotFoundError:
            return []


def staged(snapshot: Snapshot) -> Contents:
    """What goes into each file, in host memory: what training does from now on no longer changes it."""
    where = f"the checkpoint of step {snapshot.step}"
    if not 0 <= snapshot.step < 10**15:
        raise CheckpointError(f"step={snapshot.step}: the rule is a whole number from 0 to 15 digits")
    contents: Contents = {STATE: encoded_state(snapshot.step, snapshot.state)}
    for stem, tensors in snapshot.tensors.items():
        if not STEM.fullmatch(stem):
            raise CheckpointError(f"{where}: {printable(stem)!r} cannot name a file; the rule is small letters, 0-9, _")
        contents[f"{stem}.safetensors"] = storage.staged(tensors, where)
    return contents


def weight(content: bytes | dict[str, Tensor]) -> int:
    """About how many bytes a file takes."""
    return len(content) if isinstance(content, bytes) else sum(tensor.nbytes for tensor in content.values())


def encoded_state(step: int, state: Mapping[str, Any]) -> bytes:
    """The bytes of `state.json`, which give back exactly `state`."""
    values = {"step": step, "state": dict(state)}
    try:
        check_keys(values)
        content = storage.encoded_json(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the state of step {step} is not JSON: {error}") from error
    if len(content) > storage.MOST_JSON:
        raise CheckpointError(f"the state of step {step} takes {len(content):,} bytes; large things go into tensors")
    return content


def check_keys(value: object) -> None:
    """Refuse keys other than text, which JSON would turn into text without a word."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is not text")
            check_keys(part)
    elif isinstance(value, list | tuple):
        for part in value:
            check_keys(part)


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"it takes {needed:,} bytes and {free:,} are free: free some space")


def write_files(folder: Path, step: int, contents: Contents) -> None:
    """Write files and manifest into a new folder and force all to the disk."""
    entries = {}
    for name, content in contents.items():  # one by one, so that the bytes of one file at a time take memory
        text = content if isinstance(content, bytes) else storage.encoded(content, name)
        entries[name] = Entry(len(text), write_hashed(folder / name, text))
    seal(folder, step, entries)


def seal(folder: Path, step: int, entries: Mapping[str, Entry]) -> None:
    """Write the manifest of files that are on the disk already."""
    storage.reached("files complete")
    write_hashed(folder / MANIFEST, Manifest(step, entries).encoded())
    storage.reached("manifest written")
    storage.force_to_disk(folder)
    storage.reached("folder synced")


def read_checkpoint(folder: Path, step: int) -> Snapshot:
    """The snapshot in a checkpoint folder; what processes wrote in pieces is put together.

    Raises:
        CheckpointError: it is damaged, or not a checkpoint of this library.
    """
    manifest, state = check(folder, step)
    return Snapshot(step, tensors_of(folder, manifest), state)


def tensors_of(folder: Path, manifest: Manifest) -> dict[str, dict[str, Tensor]]:
    """All tensors of a proved checkpoint folder."""
    tensors: dict[str, dict[str, Tensor]] = {
        match[1]: storage.read_safetensors(folder / name)[0]
        for name in manifest.files
        if (match := WHOLE_FILE.fullmatch(name))
    }
    pieces = [folder / name for name in manifest.files if SHARD_FILE.fullmatch(name)]
    for name, tensor in joined(pieces).items():
        stem, _, name = name.partition("/")
        tensors.setdefault(stem, {})[name] = tensor
    return tensors


def check(folder: Path, step: int) -> tuple[Manifest, dict[str, Any]]:
    """The manifest and the state of a checkpoint folder, once all of it is proved to be what was written.

    Raises:
        CheckpointError: it is damaged, or not a checkpoint of this library.
    """
    manifest = verify(folder, step)
    for name in manifest.files:
        if name != STATE and not WHOLE_FILE.fullmatch(name) and not SHARD_FILE.fullmatch(name):
            raise CheckpointError(f"{printable(folder)} holds {name}, which no checkpoint of this library has")
    values = storage.read_json(folder / STATE)
    if not isinstance(values, dict) or values.get("step") != step or not isinstance(values.get("state"), dict):
        raise CheckpointError(f"{printable(folder / STATE)} is not the state of step {step}")
    return manifest, values["state"]


def joined(pieces: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of files that hold a piece of each, with the place of its first element in their headers.

    Raises:
        CheckpointError: the pieces do not make up whole tensors.
    """
    found: dict[str, list[tuple[list[int], Tensor]]] = {}
    for path in pieces:
        tensors, header = storage.read_safetensors(path)
        places = storage.decoded_json(header.get(PLACES, "{}").encode(), path)
        for name, tensor in tensors.items():
            place = places.get(name, {}) if isinstance(places, dict) else None
            first = place.get("saved_offsets", [0] * tensor.dim()) if isinstance(place, dict) else None
            if not isinstance(first, list) or len(first) != tensor.dim() or not all(map(is_count, first)):
                raise CheckpointError(f"{printable(path)} does not say where its piece of {printable(name)!r} belongs")
            found.setdefault(name, []).append((first, tensor))
    return {name: put_together(name, parts) for name, parts in found.items()}


def put_together(name: str, parts: list[tuple[list[int], Tensor]]) -> Tensor:
    """One tensor of its pieces, which have to cover it once."""
    if len(parts) == 1 and not any(parts[0][0]):
        return parts[0][1]
    ends = [[first + length for first, length in zip(place, part.shape, strict=True)] for place, part in parts]
    shape = [max(axis) for axis in zip(*ends, strict=False)]
    kinds = {(part.dtype, part.dim()) for _, part in parts}
    if len(kinds) > 1 or math.prod(shape) != sum(part.numel() for _, part in parts):
        raise CheckpointError(f"the pieces of {printable(name)!r} do not make up a whole")
    whole = torch.empty(shape, dtype=parts[0][1].dtype)
    for (place, part), end in zip(parts, ends, strict=True):
        whole[tuple(slice(*edges) for edges in zip(place, end, strict=True))] = part
    return whole


def remove(path: Path) -> None:
    """Delete a folder or a file; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
