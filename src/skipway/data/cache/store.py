"""The files in the cache folder: inspections of image files, and decoded pixels.

Entries are keyed by the names, sizes and modification times of the files and by the settings of decoding. A file that
changes, a folder that moves or another input size has another key, so an entry may be missing but is never wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import sys
import uuid
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from filelock import FileLock, Timeout

from skipway.checkpoint.lock import release_lock
from skipway.data.inspection import ImageInfo
from skipway.data.sources.readers import ImageStore
from skipway.errors import printable, spell

__all__ = ["PixelFile", "cache_folder", "cache_key", "cache_remark", "load_image_infos", "save_image_infos"]

FORMAT = 1
MAGIC = b"skipway\x00pixels\x01\n"
# the pixels begin after the header, aligned to pages
PAGE = 4096
# space to leave free on the disk
SPARE_BYTES = 1024**3


def cache_folder(choice: bool | Path | None) -> Path:
    """The cache folder: the one given, `$SKIPWAY_CACHE`, or Skipway's in the user cache folder of the platform.

    Raises:
        OSError: the home folder of the user is unknown, as in a container that runs under a number without a name.

    >>> str(cache_folder(Path("here")))
    'here'
    """
    if isinstance(choice, Path):
        return choice
    named = os.environ.get("SKIPWAY_CACHE")
    try:
        if named:
            return Path(named).expanduser()
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "skipway" / "cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "skipway"
        users = Path(os.environ.get("XDG_CACHE_HOME") or "")
        # by its specification a relative path there does not count
        return (users if users.is_absolute() else Path.home() / ".cache") / "skipway"
    except RuntimeError as error:  # what pathlib raises without a home
        raise OSError("the home folder is unknown; SKIPWAY_CACHE names a folder for the cache") from error


def cache_remark(what: str, folder: Path) -> str:
    """A sentence that says what is kept outside the run, where, and how to keep nothing.

    >>> cache_remark("tokens are", Path("here"))
    'tokens are kept in here for later runs; cache=False keeps nothing, and SKIPWAY_CACHE names another folder'
    """
    return (
        f"{what} kept in {printable(folder)} for later runs; {spell('cache', False)} keeps nothing, and SKIPWAY_CACHE "
        "names another folder"
    )


def cache_key(store: ImageStore, files: Sequence[str], *settings: Any) -> str:
    """Hash the names, sizes and modification times of the files and the settings to 32 hexadecimal digits."""
    digest = hashlib.sha256(ascii((FORMAT, PIL.__version__, str(store.root.absolute()), settings)).encode())
    for file in files:
        digest.update(ascii((file, store.stamp(file))).encode())
    return digest.hexdigest()[:32]


def cache_path(folder: Path, store: ImageStore, kind: str) -> Path:
    """The cache file of a source."""
    name = hashlib.sha256(ascii(str(store.root.absolute())).encode()).hexdigest()[:16]
    return folder / f"{kind}-{name}"


def replace_file(path: Path, content: Iterable[bytes]) -> None:
    """Write a file atomically: under another name, synced, then renamed.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; no temporary file is left.
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


def load_image_infos(
    folder: Path, store: ImageStore, files: Iterable[str], settings: Sequence[Any]
) -> dict[str, ImageInfo]:
    """Load the infos of files that have not changed; empty if the cache is missing, damaged or of other settings."""
    try:
        entries = json.loads(cache_path(folder, store, "index").with_suffix(".json").read_bytes())
        if entries["format"] != FORMAT or entries["settings"] != list(settings):
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


def save_image_infos(folder: Path, store: ImageStore, infos: dict[str, ImageInfo], settings: Sequence[Any]) -> None:
    """Save the infos of files, which depend on `settings`, JSON values.

    Raises:
        OSError: the cache cannot be written to.
    """
    files = {
        ascii(file): [stamp, list(info)] for file, info in infos.items() if (stamp := store.stamp(file)) != (-1, -1)
    }
    text = json.dumps({"format": FORMAT, "settings": list(settings), "files": files}, separators=(",", ":"))
    replace_file(cache_path(folder, store, "index").with_suffix(".json"), [text.encode()])


class PixelFile:
    """Decoded images of one source: uint8 (H, W, C) each, one after the other, read through a memory map.

    The file holds a JSON header with its SHA-256, a table of (offset, height, width) per image, and the pixels; no code
    and no pickle.

    Args:
        path: of the file.
        key: of what it holds, see `cache_key`.
        others: pattern of the names of the files that it takes the place of.
    """

    def __init__(self, path: Path, key: str, others: str = "") -> None:
        self.path = path
        self.key = key
        self.others = others
        self.lock: FileLock | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leave out the lock: it is that of the process which reads for as long as the run lasts."""
        return {**self.__dict__, "lock": None}

    @classmethod
    def of(cls, folder: Path, store: ImageStore, kind: str, key: str) -> PixelFile:
        """The file of a source for the settings in `kind`; it takes the place of those with another `key`."""
        base = cache_path(folder, store, "pixels")
        return cls(base.with_name(f"{base.name}-{kind}-{key}.bin"), key, f"{base.name}-{kind}*.bin")

    def hold(self) -> None:
        """Keep others from removing the file, for as long as this object and this process live."""
        if self.lock is not None:
            return
        # a name of its own: several runs hold the file at once
        lock = FileLock(self.path.with_suffix(f".{uuid.uuid4().hex[:8]}.lock"), timeout=0, thread_local=False)
        with suppress(OSError):  # a folder that cannot be written to
            lock.acquire()
            self.lock = lock
            weakref.finalize(self, let_go, lock, os.getpid())

    def remove_others(self) -> None:
        """Remove the files that this one takes the place of, but for those that a run holds."""
        for other in self.path.parent.glob(self.others) if self.others else ():
            if other != self.path and not is_held(other):
                with suppress(OSError):
                    other.unlink()

    def open(self, count: int, channels: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Map the table, int64 (count, 3), and the bytes; None if the file is missing, damaged or of another key."""
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
        """Write all images, with `sizes` int64 (N, 2) of heights and widths. Returns the reason if impossible, else "".

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
            return (
                f"the decoded images need {needed / 1e9:.1f} GB and the disk of the cache has {free / 1e9:.1f} GB free"
            )
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

        self.hold()  # from the first moment on
        replace_file(self.path, pieces())
        self.remove_others()
        return ""


def let_go(lock: FileLock, owner: int) -> None:
    """Release a lock and remove its file, unless this process is a fork of the owner."""
    if owner == os.getpid():
        release_lock(lock)


def is_held(path: Path) -> bool:
    """Whether a run holds a file of pixels; the locks of processes that were killed are removed."""
    for entry in path.parent.glob(f"{path.stem}.*.lock"):
        lock = FileLock(entry, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except (Timeout, OSError):
            return True
        release_lock(lock)
    return False
