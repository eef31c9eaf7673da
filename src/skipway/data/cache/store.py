"""What is kept in the user's cache folder: which files are sound, and decoded pixels. Nothing else is written.

Both are found by what they were made of: names, sizes, times of change, and the settings of decoding. So a file that
changes, a folder that moves or another input size means another entry, and an entry is never wrong, only absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from skipway.data.inspection import ImageInfo
from skipway.data.sources.readers import ImageStore

__all__ = ["PixelFile", "cache_folder", "cache_key", "load_image_infos", "save_image_infos"]

FORMAT = 1
MAGIC = b"skipway\x00pixels\x01\n"
# where the rows begin: behind the header, at a whole number of pages
PAGE = 4096
# room that is left on the disk
SPARE_BYTES = 1024**3


def cache_folder(choice: bool | Path | None) -> Path:
    """Skipway's cache folder: the one given, `$SKIPWAY_CACHE`, or the platform's place for such things.

    >>> str(cache_folder(Path("here")))
    'here'
    """
    if isinstance(choice, Path):
        return choice
    named = os.environ.get("SKIPWAY_CACHE")
    if named:
        return Path(named).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "skipway" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "skipway"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skipway"


def cache_key(store: ImageStore, files: Sequence[str], *settings: Any) -> str:
    """32 hexadecimal digits that depend on every file's name, size and time of change, and on the settings."""
    digest = hashlib.sha256(ascii((FORMAT, PIL.__version__, str(store.root.absolute()), settings)).encode())
    for file in files:
        digest.update(ascii((file, store.stamp(file))).encode())
    return digest.hexdigest()[:32]


def cache_path(folder: Path, store: ImageStore, kind: str) -> Path:
    """The file in the cache that belongs to a source."""
    name = hashlib.sha256(ascii(str(store.root.absolute())).encode()).hexdigest()[:16]
    return folder / f"{kind}-{name}"


def replace_file(path: Path, content: Iterable[bytes]) -> None:
    """Write a file aside, sync it and rename it, so that no reader ever sees half of it.

    Raises:
        OSError: the folder cannot be written to, or is full; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            for piece in content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        with suppress(OSError):
            aside.unlink()


def load_image_infos(folder: Path, store: ImageStore, files: Iterable[str]) -> dict[str, ImageInfo]:
    """What is known of those files that did not change since; empty if the cache is absent or damaged."""
    try:
        entries = json.loads(cache_path(folder, store, "index").with_suffix(".json").read_bytes())
        if entries["format"] != FORMAT:
            return {}
        known = entries["files"]
        found = {}
        for file in files:
            entry = known.get(ascii(file))
            if entry is not None and tuple(entry[0]) == store.stamp(file):
                info = ImageInfo(*entry[1])
                if [type(value) for value in info] == [str, str, int, int, bool, bool]:
                    found[file] = info
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return {}


def save_image_infos(folder: Path, store: ImageStore, infos: dict[str, ImageInfo]) -> None:
    """Keep what was found out.

    Raises:
        OSError: the cache cannot be written to.
    """
    files = {
        ascii(file): [stamp, list(info)] for file, info in infos.items() if (stamp := store.stamp(file)) != (-1, -1)
    }
    text = json.dumps({"format": FORMAT, "files": files}, separators=(",", ":"))
    replace_file(cache_path(folder, store, "index").with_suffix(".json"), [text.encode()])


class PixelFile:
    """Decoded images of one source: uint8 (H, W, C) each, one behind the other, read through a memory map.

    The file is a header (JSON with its SHA-256), a table of (offset, height, width) per image, and the pixels. It holds
    no code and no pickle.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key

    @classmethod
    def of(cls, folder: Path, store: ImageStore, kind: str, key: str) -> PixelFile:
        """The one of a source, settings in `kind` and content in `key`: a source that changed replaces its own."""
        base = cache_path(folder, store, "pixels")
        return cls(base.with_name(f"{base.name}-{kind}.bin"), key)

    def open(self, count: int, channels: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The table, int64 (count, 3), and the bytes; None if the file is absent, damaged or of another source."""
        try:
            with open(self.path, "rb") as file:
                magic, length = file.read(len(MAGIC)), file.read(8)
                size = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
                if magic != MAGIC or not 0 < size <= 2**20:
                    return None
                content, checksum = file.read(size), file.read(32)
                if hashlib.sha256(content).digest() != checksum:
                    return None
                header = json.loads(content)
                table_bytes = file.read(24 * count)
            expected = {"key": self.key, "count": count, "channels": channels}
            if any(header.get(name) != value for name, value in expected.items()):
                return None
            if hashlib.sha256(table_bytes).hexdigest() != header["table"]:
                return None
            if os.path.getsize(self.path) != header["bytes"]:
                return None
            table = np.frombuffer(table_bytes, np.int64).reshape(count, 3)
            # copy on write: torch takes writable memory only, and the file stays as it is
            return table, np.memmap(self.path, np.uint8, mode="c")
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            return None

    def write(self, sizes: np.ndarray, channels: int, rows: Iterable[np.ndarray]) -> str:
        """Write all images; `sizes` is int64 (N, 2) of heights and widths. Why that is not possible, or "".

        Raises:
            OSError: as `replace_file`.
        """
        count = len(sizes)
        lengths = sizes.prod(1) * channels
        start = -(-(len(MAGIC) + 8 + 2**12 + 32 + 24 * count) // PAGE) * PAGE
        offsets = start + np.concatenate([[0], np.cumsum(lengths)[:-1]]) if count else np.empty(0, np.int64)
        needed = start + int(lengths.sum())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path.parent).free
        if needed + SPARE_BYTES > free:
            return f"the decoded images need {needed / 1e9:.1f} GB and the cache's disk has {free / 1e9:.1f} GB free"
        table = np.concatenate([offsets[:, None], sizes], 1).astype("<i8").tobytes()
        header = json.dumps(
            {
                "key": self.key,
                "count": count,
                "channels": channels,
                "bytes": needed,
                "table": hashlib.sha256(table).hexdigest(),
            }
        ).encode()
        front = MAGIC + struct.pack("<Q", len(header)) + header + hashlib.sha256(header).digest() + table

        def pieces() -> Iterable[bytes]:
            yield front.ljust(start, b"\0")
            for row in rows:
                yield np.ascontiguousarray(row).tobytes()

        replace_file(self.path, pieces())
        return ""
