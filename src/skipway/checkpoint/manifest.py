"""The list of a checkpoint's files with their hashes, which also holds its own: no changed byte goes unnoticed.

No file format of tensors notices a flipped bit by itself. `MANIFEST.json` names every file of the folder with its size
and SHA-256, and its last line is the SHA-256 of the lines above it. That proves integrity, not origin: whoever can
write to the folder can write a matching manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from skipway.checkpoint.files import decoded_json, hash_regular, read_regular, reason
from skipway.errors import CheckpointError, printable

__all__ = ["MANIFEST", "Entry", "Manifest", "verify"]

MANIFEST = "MANIFEST.json"
# raised when a folder of this version can no longer be read by the code
VERSION = 2
MOST_BYTES = 16 << 20
FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,200}")
HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """What one file has to be: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The step a checkpoint was taken at and what each of its files has to be.

    >>> manifest = Manifest(3, {"state.json": Entry(2, "0" * 64)})
    >>> Manifest.parse(manifest.encoded(), Path("MANIFEST.json")) == manifest
    True
    >>> Manifest.parse(manifest.encoded().replace(b"3", b"4"), Path("MANIFEST.json"))
    Traceback (most recent call last):
    skipway.errors.CheckpointError: MANIFEST.json is damaged: its last line is not the hash of the lines above it
    """

    step: int
    files: Mapping[str, Entry]

    def encoded(self) -> bytes:
        """The bytes of the file."""
        files = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in sorted(self.files.items())}
        body = json.dumps({"version": VERSION, "step": self.step, "files": files}, indent=2)
        above = body.removesuffix("\n}").encode("ascii") + b",\n"
        return above + last_line(above)

    @classmethod
    def parse(cls, content: bytes, path: Path) -> Manifest:
        """The manifest in the bytes of a file; `path` is for messages.

        Raises:
            CheckpointError: a byte has changed, or the file is not a manifest of this version.
        """
        where = printable(path)
        above, _, _ = content.rpartition(b"\n")
        above, _, _ = above.rpartition(b"\n")
        above += b"\n"
        if content != above + last_line(above):
            raise CheckpointError(f"{where} is damaged: its last line is not the hash of the lines above it")
        values = decoded_json(content, path)
        if not isinstance(values, dict) or values.get("version") != VERSION:
            version = values.get("version") if isinstance(values, dict) else None
            raise CheckpointError(f"{where} has version {version!r}; this library reads version {VERSION}")
        step, files = values.get("step"), values.get("files")
        if not is_count(step) or not isinstance(files, dict):
            raise CheckpointError(f"{where} is no manifest: it lacks a step or a list of files")
        return cls(step, {name: entry_of(name, value, where) for name, value in files.items()})


def last_line(above: bytes) -> bytes:
    """The line that closes a manifest: the hash of what is above it."""
    return b'"sha256": "' + hashlib.sha256(above).hexdigest().encode("ascii") + b'"}\n'


def is_count(value: object) -> TypeGuard[int]:
    """Whether a JSON value is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def entry_of(name: str, value: object, where: str) -> Entry:
    """One file of a manifest, after checks: a plain name, a size, a hash."""
    if not FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{where} names the file {printable(name)!r}; names are small letters, digits and _ . -")
    if not isinstance(value, dict) or set(value) != {"size", "sha256"}:
        raise CheckpointError(f"{where} lacks the size or the hash of {name}")
    size, sha256 = value["size"], value["sha256"]
    if not is_count(size) or not isinstance(sha256, str) or not HASH.fullmatch(sha256):
        raise CheckpointError(f"{where} has a size or hash of {name} that cannot be one")
    return Entry(size, sha256)


def verify(folder: Path, step: int) -> Manifest:
    """The manifest of a checkpoint folder, once every file in it is proved to be what it was.

    Raises:
        CheckpointError: a file is missing, too many, changed, or a link; or the folder is of another step. The message
            names the file.
    """
    where = printable(folder)
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            raise CheckpointError(f"{where} is a link or a file, not a folder; links are not followed")
        names = set(os.listdir(folder))
        if MANIFEST not in names:
            raise CheckpointError(f"{where} lacks {MANIFEST}")
        manifest = Manifest.parse(read_regular(folder / MANIFEST, most=MOST_BYTES), folder / MANIFEST)
        if manifest.step != step:
            raise CheckpointError(f"{where}/{MANIFEST} is of step {manifest.step}, not of step {step}")
        expected = {MANIFEST, *manifest.files}
        for name in sorted(expected - names):
            raise CheckpointError(f"{where} lacks {name}")
        for name in sorted(names - expected):
            raise CheckpointError(f"{where} holds {printable(name)}, which {MANIFEST} does not name")
        # sizes first: that is cheap, and bounds what is read
        for name, entry in manifest.files.items():
            size = os.lstat(folder / name).st_size
            if size != entry.size:
                raise CheckpointError(f"{where}/{name} has {size:,} bytes where {entry.size:,} were written")
        for name, entry in manifest.files.items():
            if hash_regular(folder / name) != (entry.size, entry.sha256):
                raise CheckpointError(f"{where}/{name} has changed since it was written: its SHA-256 is another")
    except OSError as error:
        raise CheckpointError(f"{printable(error.filename or folder)} cannot be read: {reason(error)}") from error
    return manifest
