"""The manifest of a checkpoint: every file with its size and SHA-256, and the hash of the manifest itself.

Safetensors has no checksum, so a flipped bit would go unnoticed. `MANIFEST.json` lists every file of the folder with
its size and SHA-256, and its last line is the SHA-256 of the lines above it. That proves integrity, not origin: whoever
can write to the folder can write a matching manifest.
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

from skipway.checkpoint.files import decode_json, describe_os_error, hash_regular, read_regular
from skipway.errors import CheckpointError, printable

__all__ = ["MANIFEST", "Entry", "Manifest", "verify"]

MANIFEST = "MANIFEST.json"
# incremented when the format changes incompatibly
VERSION = 2
MOST_BYTES = 16 << 20
FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,200}")
HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """Expected size in bytes and SHA-256 (hexadecimal) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The step of a checkpoint and the expected content of each of its files.

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
        """Encode as the bytes of `MANIFEST.json`."""
        files = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in sorted(self.files.items())}
        body = json.dumps({"version": VERSION, "step": self.step, "files": files}, indent=2)
        above = body.removesuffix("\n}").encode("ascii") + b",\n"
        return above + hash_line(above)

    @classmethod
    def parse(cls, content: bytes, path: Path) -> Manifest:
        """Parse the bytes of `MANIFEST.json`; `path` is for error messages.

        Raises:
            CheckpointError: a byte has changed, or the file is not a manifest of this version.
        """
        where = printable(path)
        above, _, _ = content.rpartition(b"\n")
        above, _, _ = above.rpartition(b"\n")
        above += b"\n"
        if content != above + hash_line(above):
            raise CheckpointError(f"{where} is damaged: its last line is not the hash of the lines above it")
        values = decode_json(content, path)
        if not isinstance(values, dict) or values.get("version") != VERSION:
            version = values.get("version") if isinstance(values, dict) else None
            raise CheckpointError(f"{where} has version {version!r}; this library reads version {VERSION}")
        step, files = values.get("step"), values.get("files")
        if not is_count(step) or not isinstance(files, dict):
            raise CheckpointError(f"{where} is not a manifest: it lacks a step or a list of files")
        return cls(step, {name: parse_entry(name, value, where) for name, value in files.items()})


def hash_line(above: bytes) -> bytes:
    """The last line of a manifest: the hash of the lines above it."""
    return b'"sha256": "' + hashlib.sha256(above).hexdigest().encode("ascii") + b'"}\n'


def is_count(value: object) -> TypeGuard[int]:
    """Whether a JSON value is a non-negative integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def parse_entry(name: str, value: object, where: str) -> Entry:
    """Check and parse one file of a manifest: its name, size and hash."""
    if not FILE_NAME.fullmatch(name):
        raise CheckpointError(
            f"{where} names the file {printable(name)!r}; the rule is lower-case letters, digits and _ . -"
        )
    if not isinstance(value, dict) or set(value) != {"size", "sha256"}:
        raise CheckpointError(f"{where} lacks the size or the hash of {name}")
    size, sha256 = value["size"], value["sha256"]
    if not is_count(size) or not isinstance(sha256, str) or not HASH.fullmatch(sha256):
        raise CheckpointError(f"{where} has an invalid size or hash for {name}")
    return Entry(size, sha256)


def verify(folder: Path, step: int) -> Manifest:
    """Verify every file of a checkpoint folder against its manifest, and return the manifest.

    Raises:
        CheckpointError: a file is missing, unexpected, changed, or a link, or the folder belongs to another step. The
            message names the file.
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
            raise CheckpointError(f"{where}/{MANIFEST} belongs to step {manifest.step}, not to step {step}")
        expected = {MANIFEST, *manifest.files}
        for name in sorted(expected - names):
            raise CheckpointError(f"{where} lacks {name}")
        for name in sorted(names - expected):
            raise CheckpointError(f"{where} holds {printable(name)}, which {MANIFEST} does not name")
        # sizes first: cheap, and it bounds how much is read
        for name, entry in manifest.files.items():
            size = os.lstat(folder / name).st_size
            if size != entry.size:
                raise CheckpointError(f"{where}/{name} has {size:,} bytes where {entry.size:,} were written")
        for name, entry in manifest.files.items():
            if hash_regular(folder / name) != (entry.size, entry.sha256):
                raise CheckpointError(f"{where}/{name} has changed since it was written: its SHA-256 differs")
    except OSError as error:
        raise CheckpointError(
            f"{printable(error.filename or folder)} cannot be read: {describe_os_error(error)}"
        ) from error
    return manifest
