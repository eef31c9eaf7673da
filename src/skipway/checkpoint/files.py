"""Files that are either complete or absent: written aside, forced to the disk, then renamed into place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from skipway.errors import CheckpointError, printable
from skipway.weights.files import check_names, without_twins

__all__ = ["encoded", "force_to_disk", "reached", "read_json", "read_tensors", "staged", "write_json", "write_tensors"]

CHUNK = 1 << 20
# what a JSON file of a run may weigh at most, so that a hostile one cannot fill the memory
MOST_JSON = 256 << 20

WAYS_OUT = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the quota is used up: free some space",
    errno.EFBIG: "the file is larger than is allowed here (ulimit -f)",
    errno.EROFS: "the file system can only be read: choose another folder or mount it for writing",
    errno.EACCES: "the rights are lacking: change them or choose another folder",
    errno.EPERM: "that is not permitted: change the rights or choose another folder",
    errno.ENOENT: "the folder has gone",
}


def reached(point: str) -> None:
    """Called at each named point of a save. Does nothing; tests of faults put something else in its place."""


def reason(error: OSError) -> str:
    """Why a file could not be written or read, and what to do.

    >>> reason(OSError(errno.ENOSPC, "No space left on device"))
    'the disk is full: free some space'
    """
    return WAYS_OUT.get(error.errno or 0, error.strerror or str(error))


def write_json(path: Path, values: Any) -> None:
    """Replace `path` by `values` as JSON."""
    content = encoded_json(values)
    write_aside(path, lambda aside: aside.write_bytes(content))


def encoded_json(values: Any) -> bytes:
    """`values` as the bytes of a JSON file.

    >>> encoded_json({"step": 3})
    b'{\\n  "step": 3\\n}\\n'
    """
    return (json.dumps(values, indent=2, ensure_ascii=True) + "\n").encode("ascii")


def read_json(path: Path) -> Any:
    """What a JSON file of ours holds. Nothing in it is ever imported or run.

    Raises:
        CheckpointError: the file is missing, a link, larger than 256 MiB, not JSON, or names a key twice.
    """
    try:
        return decoded_json(read_regular(path, most=MOST_JSON), path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{printable(path)} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{printable(path)} cannot be read: {reason(error)}") from error


def decoded_json(content: bytes, path: Path) -> Any:
    """The value in the bytes of a JSON file; `path` is for the message."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=without_twins)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{printable(path)} is damaged or not JSON: {printable(str(error))}") from error


def staged(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Contiguous copies in host memory, one for each name, so that tied tensors and every layout can be written.

    Raises:
        CheckpointError: a tensor is sparse, quantised, or without storage.
    """
    copies = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "a meta tensor" if tensor.is_meta else "quantised" if tensor.is_quantized else f"{tensor.layout}"
            raise CheckpointError(f"{where}: {printable(name)!r} is {kind}; only dense tensors can be stored")
        copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return copies


def encoded(tensors: Mapping[str, Tensor], where: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file with these tensors, which have to come from `staged`.

    Raises:
        CheckpointError: a type of number that the format lacks.
    """
    try:
        content = safetensors.torch.save(dict(tensors), metadata={"format": "pt", **(metadata or {})})
    except KeyError as error:
        raise CheckpointError(
            f"{where}: the file format has no {error.args[0]}; convert these tensors first"
        ) from error
    # the library writes metadata in an order that changes from process to process; equal runs shall have equal files
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return b"".join([content[:8], ordered.ljust(size), content[8 + size :]]) if len(ordered) <= size else content


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Replace `path` by a safetensors file; `metadata` goes into its header, each value as JSON.

    Raises:
        CheckpointError: the disk is full or the folder is gone; the file that was there is kept.
    """
    header = {name: json.dumps(value) for name, value in metadata.items()}
    content = encoded(staged(tensors, printable(path)), printable(path), header)
    try:
        write_aside(path, lambda aside: aside.write_bytes(content))
    except OSError as error:
        raise CheckpointError(
            f"{printable(path)} cannot be written, what was there is kept: {reason(error)}"
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file of `write_tensors`.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of ours.
    """
    tensors, header = read_safetensors(path)
    header.pop("format", None)
    return tensors, {name: decoded_json(text.encode(), path) for name, text in header.items()}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, in memory of their own, and its header's texts."""
    if not path.is_file():
        raise CheckpointError(f"{printable(path)} does not exist")
    try:
        check_names(path)
        with safe_open(path, framework="pt") as file:
            # copies: the file may be removed or replaced while they are in use
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
            return tensors, dict(file.metadata() or {})
    except Exception as error:  # a foreign reader on a foreign file: its kinds of failure are not listed anywhere
        text = printable(str(error))
        raise CheckpointError(f"{printable(path)} is damaged or not a safetensors file: {text}") from error


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, force it to the disk, and rename it to `path`.

    After a crash at any moment `path` is the old file or the new one, whole.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        aside.touch()
        rights = aside.stat().st_mode
        write(aside)
        # safetensors makes files that their owner alone may read
        aside.chmod(rights)
        force_to_disk(aside)
        os.replace(aside, path)
        force_to_disk(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_hashed(path: Path, content: bytes) -> str:
    """Write a file that is not there yet and force it to the disk; the SHA-256 of what was to be written."""
    digest = hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, 0o666), "wb", buffering=0) as file:
        reached("file opened")
        view, half = memoryview(content), len(content) // 2
        for begin in range(0, len(content), CHUNK):
            part = view[begin : begin + CHUNK]
            if begin <= half < begin + len(part):
                write_all(file, part[: half - begin])
                reached("file half written")
                write_all(file, part[half - begin :])
            else:
                write_all(file, part)
            digest.update(part)
        reached("file written")
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that what is read back comes from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reached("file synced")
    return digest.hexdigest()


def write_all(file: Any, part: memoryview) -> None:
    """Write all of `part` to an unbuffered file, which may take it in pieces."""
    while part:
        part = part[file.write(part) :]


def open_regular(path: Path) -> int:
    """A handle on a file that is neither a link nor a device.

    Raises:
        OSError: it cannot be opened.
        CheckpointError: it is something other than a file.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise CheckpointError(f"{printable(path)} is not a regular file; links and devices are not followed")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, flags)


def read_regular(path: Path, *, most: int) -> bytes:
    """The content of a file of at most `most` bytes that is neither a link nor a device."""
    with open(open_regular(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise CheckpointError(f"{printable(path)} is larger than {most:,} bytes, the most that is read")
    return content


def hash_regular(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file that is neither a link nor a device."""
    digest, size = hashlib.sha256(), 0
    with open(open_regular(path), "rb", buffering=0) as file:
        while part := file.read(CHUNK):
            digest.update(part)
            size += len(part)
    return size, digest.hexdigest()


def force_to_disk(path: Path) -> None:
    """fsync of a file, or of a folder's list of names where the system can do that."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
