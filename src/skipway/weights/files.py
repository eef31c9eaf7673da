"""Tensors from files, without ever running code from one."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from skipway.errors import CheckpointError, printable
from skipway.weights.container import file_format, read_torch, select_state_dict

__all__ = ["read_weights"]

MOST_HEADER = 100_000_000
"""Largest header that safetensors itself accepts."""
LAYOUT = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Weight files of a folder in Hugging Face's layout; the first that exists is read."""


def read_weights(
    path: str | Path, entry: str | None = None, remark: Callable[[str], None] = warnings.warn
) -> dict[str, Tensor]:
    """The state dict of a file, known by its content whatever its suffix, or of a folder in Hugging Face's layout.

    Read are safetensors files and those of `torch.save`, the latter without ever running code from them. A checkpoint
    may hold the state dict in an entry, beside numbers, paths, dates and the like; of several state dicts the averaged
    weights are taken, and a remark says so.

    Args:
        path: of the file or folder.
        entry: which state dict of a checkpoint to take, "model" or "ema.module" for example.
        remark: called with a sentence about a choice that was made.

    Raises:
        CheckpointError: no such file, one that is damaged, of another kind or would run code, one without a state
            dict or without that entry, or a folder without weights.
    """
    path = Path(path)
    return read_folder(path) if path.is_dir() else read_file(path, entry, remark)


def read_file(path: Path, entry: str | None = None, remark: Callable[[str], None] = warnings.warn) -> dict[str, Tensor]:
    """The state dict of one file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file (a name on the Hugging Face hub begins with hf:)")
    if file_format(path) == "torch":
        state, choice = select_state_dict(read_torch(path), path, entry)
        if choice:
            remark(choice)
        return state
    if entry is not None:
        raise CheckpointError(f"entry={entry!r}: {path} is a safetensors file, which holds one state dict")
    try:
        check_names(path)
        return load_file(path)
    except Exception as error:  # a foreign reader on a foreign file: its kinds of failure are listed nowhere
        raise CheckpointError(f"{path} is damaged or no safetensors file: {printable(str(error))}") from error


def check_names(path: Path) -> None:
    """Refuse a safetensors file whose header has a name twice, of which safetensors takes one without a word.

    Raises:
        ValueError: it does, or its header is not JSON.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = file.read(min(length, MOST_HEADER))
    json.loads(header, object_pairs_hook=without_twins)


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless it names a key twice: readers differ in which of the two they take.

    >>> without_twins([("a", 1), ("a", 2)])
    Traceback (most recent call last):
    ValueError: the key 'a' is there twice
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return values


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder in Hugging Face's layout."""
    name = next((name for name in LAYOUT if (folder / name).is_file()), None)
    if name is None:
        raise CheckpointError(f"{folder} is a folder without weights: it holds none of {', '.join(LAYOUT)}")
    return read_shards(folder / name) if name.endswith(".json") else read_file(folder / name)


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of several files, as their index tells: name → file beside the index."""
    try:
        homes = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(homes.values()))
        stray = [name for name in files if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged or no index of shards: {printable(repr(error))}") from error
    if stray:
        names = ", ".join(map(printable, stray))
        raise CheckpointError(f"{index} names files outside its folder, which are not read: {names}")
    state = {key: tensor for name in files for key, tensor in read_file(index.parent / name).items()}
    lost = [key for key in homes if key not in state]
    if lost:
        raise CheckpointError(
            f"{index} lists {len(lost)} tensors that are not in its files, {printable(lost[0])!r} first"
        )
    return state
