"""Atomic file writes: to a temporary file, flushed to the disk, then renamed into place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from skipway.errors import CheckpointError, SkipwayError, printable
from skipway.weights.files import check_names, without_twins
from skipway.weights.formats import file_format

__all__ = [
    "copy_to_host",
    "encode_tensors",
    "fault_point",
    "file_aside",
    "fsync_path",
    "read_json",
    "read_tensors",
    "refuse_other_files",
    "write_json",
    "write_tensors",
]

CHUNK = 1 << 20
# the largest JSON file of a run that is read, so that a hostile one cannot fill the memory
MAX_JSON_BYTES = 256 << 20

ADVICE = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is exceeded: free some space",
    errno.EFBIG: "the file exceeds the size limit (ulimit -f)",
    errno.EROFS: "the file system is read-only: choose another folder or mount it for writing",
    errno.EACCES: "permission denied: change the permissions or choose another folder",
    errno.EPERM: "operation not permitted: change the permissions or choose another folder",
    errno.ENOENT: "the folder no longer exists",
}


def refuse_other_files(folder: Path, own: Collection[str]) -> None:
    """Refuse an output folder that contains more than files of these names, and what git and Python keep there.

    Raises:
        SkipwayError: the folder contains other files, or a file has that name.
    """
    if folder.exists() and not folder.is_dir():
        raise SkipwayError(f"{printable(folder)} is a file; choose a new or empty folder")
    names = (each.name for each in folder.iterdir()) if folder.is_dir() else ()
    kept = (".git", "__pycache__")
    if other := next((name for name in names if name not in own and not name.startswith(kept)), None):
        raise SkipwayError(
            f"{printable(folder)} contains other files, such as {printable(other)}; choose a new or empty folder"
        )


def fault_point(point: str) -> None:
    """Mark a named point of a save. Does nothing; fault-injection tests replace it."""


def describe_os_error(error: OSError) -> str:
    """Explain why a file could not be read or written, and what to do.

    >>> describe_os_error(OSError(errno.ENOSPC, "No space left on device"))
    'the disk is full: free some space'
    """
    return ADVICE.get(error.errno or 0, error.strerror or str(error))


def write_json(path: Path, values: Any) -> None:
    """Write `values` to `path` as JSON, atomically."""
    content = encode_json(values)
    write_atomically(path, lambda aside: aside.write_bytes(content))


def encode_json(values: Any) -> bytes:
    """Encode `values` as the bytes of a JSON file.

    >>> encode_json({"step": 3})
    b'{\\n  "step": 3\\n}\\n'
    """
    return (json.dumps(values, indent=2, ensure_ascii=True) + "\n").encode("ascii")


def read_json(path: Path) -> Any:
    """Read a JSON file of this library. Nothing in it is ever imported or run.

    Raises:
        CheckpointError: the file is missing, a link, larger than 256 MiB, not JSON, or names a key twice.
    """
    try:
        return decode_json(read_regular(path, most=MAX_JSON_BYTES), path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{printable(path)} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{printable(path)} cannot be read: {describe_os_error(error)}") from error


def decode_json(content: bytes, path: Path) -> Any:
    """Decode the bytes of a JSON file; `path` is for the error message."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=without_twins)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{printable(path)} is damaged or not JSON: {printable(str(error))}") from error


def copy_to_host(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Copy tensors into contiguous host memory, one copy per name, so that tied tensors and any strides can be written.

    Raises:
        CheckpointError: a tensor is sparse, quantised, or on the meta device.
    """
    copies = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "a meta tensor" if tensor.is_meta else "quantised" if tensor.is_quantized else f"{tensor.layout}"
            raise CheckpointError(f"{where}: {printable(name)!r} is {kind}; only dense tensors can be stored")
        copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return copies


def encode_tensors(tensors: Mapping[str, Tensor], where: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """Encode tensors from `copy_to_host` as the bytes of a safetensors file.

    Raises:
        CheckpointError: a dtype that the format lacks.
    """
    try:
        content = safetensors.torch.save(dict(tensors), metadata={"format": "pt", **(metadata or {})})
    except KeyError as error:
        raise CheckpointError(
            f"{where}: safetensors cannot store {error.args[0]}; convert these tensors first"
        ) from error
    # safetensors writes metadata in an order that differs between processes; equal runs must give equal files
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return b"".join([content[:8], ordered.ljust(size), content[8 + size :]]) if len(ordered) <= size else content


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors to `path` as safetensors, atomically; each value of `metadata` goes into the header as JSON.

    Raises:
        CheckpointError: the disk is full or the folder is gone; the previous file is kept.
    """
    header = {name: json.dumps(value) for name, value in metadata.items()}
    content = encode_tensors(copy_to_host(tensors, printable(path)), printable(path), header)
    try:
        write_atomically(path, lambda aside: aside.write_bytes(content))
    except OSError as error:
        raise CheckpointError(
            f"{printable(path)} cannot be written, the previous file is kept: {describe_os_error(error)}"
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the metadata of a file that `write_tensors` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, or not written by `write_tensors`.
    """
    tensors, header = read_safetensors(path)
    header.pop("format", None)
    return tensors, {name: decode_json(text.encode(), path) for name, text in header.items()}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a safetensors file into memory of their own, and its header."""
    if not path.is_file():
        raise CheckpointError(f"{printable(path)} does not exist")
    try:
        check_names(path)
        with safe_open(path, framework="pt") as file:
            # cloned: the file may be removed or replaced while the tensors are in use
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
            return tensors, dict(file.metadata() or {})
    except Exception as error:  # safetensors documents no list of its exceptions
        refuse_foreign(path)
        text = printable(str(error))
        raise CheckpointError(f"{printable(path)} is damaged or not a safetensors file: {text}") from error


def refuse_foreign(path: Path) -> None:
    """Raise CheckpointError for a file of another format, and say what it is."""
    kind = file_format(path)
    if kind != "safetensors":
        wrote = {"torch": "torch.save", "numpy": "NumPy"}[kind]
        raise CheckpointError(
            f"{printable(path)} is a file of {wrote}; the rule is the safetensors file of a run (skipway.load reads "
            "weights alone)"
        )


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file beside `path`, flush it to the disk, and rename it to `path`.

    After a crash at any moment `path` is either the complete old file or the complete new one.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        aside.touch()
        rights = aside.stat().st_mode
        write(aside)
        # safetensors creates files that only their owner may read
        aside.chmod(rights)
        fsync_path(aside)
        os.replace(aside, path)
        fsync_path(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def file_aside(path: Path) -> Iterator[Path]:
    """Yield a path in a temporary folder beside `path`. What is written there is moved to its place at the end, and
    removed on any exception.

    Raises:
        SkipwayError: the disk is full, the folder cannot be written to; a file that was there before stays.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=".skipway-", dir=path.parent))
    except OSError as error:
        raise SkipwayError(f"{printable(path)} cannot be written: {describe_os_error(error)}") from error
    try:
        yield folder / path.name
        # the file itself last, after what it refers to
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise SkipwayError(f"{printable(path)} cannot be written: {describe_os_error(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_hashed(path: Path, content: bytes) -> str:
    """Write a new file, flush it to the disk, and return the SHA-256 of `content`."""
    digest = hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, 0o666), "wb", buffering=0) as file:
        fault_point("file opened")
        view, half = memoryview(content), len(content) // 2
        for begin in range(0, len(content), CHUNK):
            part = view[begin : begin + CHUNK]
            if begin <= half < begin + len(part):
                write_fully(file, part[: half - begin])
                fault_point("file half written")
                write_fully(file, part[half - begin :])
            else:
                write_fully(file, part)
            digest.update(part)
        fault_point("file written")
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that verification reads from the disk, not from the page cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    fault_point("file synced")
    return digest.hexdigest()


def write_fully(file: Any, part: memoryview) -> None:
    """Write all of `part` to an unbuffered file, whose `write` may be partial."""
    while part:
        part = part[file.write(part) :]


def open_regular(path: Path) -> int:
    """Open a file that is neither a link nor a device; returns the descriptor.

    Raises:
        OSError: it cannot be opened.
        CheckpointError: it is not a regular file.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise CheckpointError(f"{printable(path)} is not a regular file; links and devices are not followed")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, flags)


def read_regular(path: Path, *, most: int) -> bytes:
    """Read a file of at most `most` bytes that is neither a link nor a device."""
    with open(open_regular(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise CheckpointError(f"{printable(path)} is larger than the limit of {most:,} bytes")
    return content


def hash_regular(path: Path) -> tuple[int, str]:
    """Return size and SHA-256 of a file that is neither a link nor a device."""
    digest, size = hashlib.sha256(), 0
    with open(open_regular(path), "rb", buffering=0) as file:
        while part := file.read(CHUNK):
            digest.update(part)
            size += len(part)
    return size, digest.hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file to the disk, or a folder's entries where the system supports that."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
