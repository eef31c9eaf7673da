"""Compressed files, known by their first bytes: gzip, bzip2, xz and Zstandard."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from importlib import import_module
from pathlib import PurePosixPath
from typing import NamedTuple

from skipway.data.text.charset import NotText
from skipway.errors import MissingExtraError

__all__ = ["decompress", "plain_name"]

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd")


class Compression(NamedTuple):
    """A format: its name, its first bytes, and what unpacks it."""

    name: str
    magic: bytes
    unpack: Callable[[bytes], bytes]


def unpack_zstandard(content: bytes) -> bytes:
    """Unpack Zstandard, with what is there: Python's own module (3.14), or Arrow.

    Raises:
        MissingExtraError: neither is there.
    """
    try:
        return import_module("compression.zstd").decompress(content)
    except ImportError:
        pass
    try:
        pyarrow = import_module("pyarrow")
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "a file compressed by Zstandard") from error
    return pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd").read()


COMPRESSIONS = (
    Compression("gzip", b"\x1f\x8b", gzip.decompress),
    Compression("bzip2", b"BZh", bz2.decompress),
    Compression("xz", b"\xfd7zXZ\0", lzma.decompress),
    Compression("Zstandard", b"\x28\xb5\x2f\xfd", unpack_zstandard),
)


def decompress(content: bytes) -> bytes:
    """The content of a compressed file; any other as it is.

    Raises:
        NotText: it is damaged.
        MissingExtraError: Zstandard needs a library that is not installed.

    >>> decompress(gzip.compress(b"text"))
    b'text'
    """
    for form in COMPRESSIONS:
        if content.startswith(form.magic):
            try:
                return form.unpack(content)
            except MissingExtraError:
                raise
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise NotText(f"a damaged {form.name} file") from error
    return content


def plain_name(name: str) -> str:
    """The name of a file without the suffix of its compression.

    >>> plain_name("part.jsonl.zst")
    'part.jsonl'
    """
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in COMPRESSED_SUFFIXES else name
