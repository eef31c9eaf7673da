"""Tensors from files, without ever running code from one."""

from __future__ import annotations

import json
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from skipway.errors import CheckpointError, printable

__all__ = ["read_weights"]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
MOST_HEADER = 100_000_000
"""Largest header that safetensors itself accepts."""
LAYOUT = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Weight files of a folder in Hugging Face's layout; the first that exists is read."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pth`, `.pt`, `.bin` file (read with `weights_only=True`).

    A folder in Hugging Face's layout is read as well, in one file or in shards.

    Raises:
        CheckpointError: no such file, a suffix that is not known, a damaged file, one that wants to run code, one that
            holds no state dict, or a folder without weights.
    """
    path = Path(path)
    return read_folder(path) if path.is_dir() else read_file(path)


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file (a name on the Hugging Face hub begins with hf:)")
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path}: the suffix says nothing of the format; known are {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        try:
            check_names(path)
            return load_file(path)
        except Exception as error:  # a foreign reader on a foreign file: its kinds of failure are not listed anywhere
            raise CheckpointError(f"{path} is damaged or no safetensors file: {printable(str(error))}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a foreign pickle's protocol number; what it holds is judged below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and would run code when read, which Skipway never does; convert it to "
            "safetensors where you trust it"
        ) from error
    except Exception as error:  # as above
        raise CheckpointError(f"{path} is damaged or no PyTorch checkpoint: {printable(str(error))}") from error
    return as_state_dict(content, path)


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


def as_state_dict(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what a checkpoint held: itself, or the one entry that is known to hold it."""
    if isinstance(content, dict):
        for key in ("state_dict", "model", "model_state_dict"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {str(key).removeprefix("module."): value for key, value in content.items()}
    raise CheckpointError(f"{path} holds no state dict (names to tensors)")
