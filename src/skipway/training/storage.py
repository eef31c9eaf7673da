"""Files that are either complete or absent: written aside, forced to the disk, then renamed into place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from skipway.errors import CheckpointError

__all__ = ["read_tensors", "write_json", "write_tensors"]


def write_json(path: Path, values: Any) -> None:
    """Replace `path` by `values` as JSON."""
    text = json.dumps(values, indent=2, ensure_ascii=True) + "\n"
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Replace `path` by a safetensors file; `metadata` goes into its header, each value as JSON.

    Raises:
        CheckpointError: the disk is full or the folder is gone; the file that was there is kept.
    """
    # a copy each, so that tied tensors may be written and channels-last ones become contiguous
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    header = {"format": "pt", **{name: json.dumps(value) for name, value in metadata.items()}}
    try:
        write_aside(path, lambda aside: save_file(copies, aside, metadata=header))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written, what was there is kept: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file of `write_tensors`.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        header.pop("format", None)
        return tensors, {name: json.loads(text) for name, text in header.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint of this library: {error}") from error


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


def force_to_disk(path: Path) -> None:
    """fsync of a file, or of a folder's list of names where the system can do that."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
