"""Tensors from files, without ever running code from one."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from skipway.errors import CheckpointError, counted, printable, spell
from skipway.weights.container import cut, read_torch, select_state_dict
from skipway.weights.formats import Format, describe_folder, file_format
from skipway.weights.hub import local_path

__all__ = ["read_weights"]

MOST_HEADER = 100_000_000
"""Largest header that safetensors itself accepts."""
LAYOUT = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("best.safetensors", "last.safetensors"),
)
"""Weight files of a folder in Hugging Face's layout, and of a run of Skipway; the first that exists is read."""


def read_weights(
    path: str | Path, entry: str | None = None, remark: Callable[[str], None] = warnings.warn
) -> dict[str, Tensor]:
    """The state dict of a file, known by its content whatever its suffix, or of a folder.

    Read are safetensors files, NumPy's `.npz` and what `torch.save` wrote, the latter without ever running code from
    it: objects of foreign types are left out. A checkpoint may hold the state dict in an entry, beside numbers, paths,
    dates and the like, or be a network that was pickled as a whole; of several state dicts the averaged weights are
    taken. A folder is one in Hugging Face's layout, a run of Skipway, or holds one file of weights.

    Args:
        path: of the file or folder, or a name on the Hugging Face hub, "hf:org/name".
        entry: which state dict of a checkpoint to take, "model" or "ema.module" for example, or which of several
            prefixes of names, "student".
        remark: called with a sentence about each choice that was made, and about what was left out.

    Raises:
        MissingExtraError: a name on the hub without huggingface_hub.
        CheckpointError: no such file, one that is damaged, of another kind or would run code, one without a state
            dict or without that entry, or a folder without weights.
    """
    path = local_path(path)
    if not path.is_dir():
        return read_file(path, entry, remark)
    file = find_file(path, remark)
    if file.suffix == ".json" and entry is not None:
        raise CheckpointError(f"{spell('entry', entry)}: {printable(path)} holds one state dict in several files")
    return read_shards(file, remark) if file.suffix == ".json" else read_file(file, entry, remark)


def read_file(path: Path, entry: str | None = None, remark: Callable[[str], None] = warnings.warn) -> dict[str, Tensor]:
    """The state dict of one file."""
    if not path.is_file():
        raise CheckpointError(
            f"{printable(path)}: there is no such file (a name on the Hugging Face hub begins with hf:)"
        )
    try:
        kind = file_format(path)
        if kind == "safetensors" and entry is None:
            return read_plain(path, kind)
        content, unread = read_torch(path) if kind == "torch" else (read_plain(path, kind), [])
    except OSError as error:
        raise CheckpointError(f"{printable(path)} cannot be read: {error.strerror or error}") from error
    state, remarks = select_state_dict(content, printable(path), entry)
    if unread:
        names = cut([printable(name) for name in unread])
        remarks.append(f"{printable(path)}: objects of foreign types were not read, since that could run code: {names}")
    for sentence in remarks:
        remark(sentence)
    return state


def read_plain(path: Path, kind: Format) -> dict[str, Any]:
    """The arrays of a safetensors file or of NumPy's archive by name.

    Raises:
        CheckpointError: a damaged file, or one that holds Python objects.
    """
    try:
        if kind == "safetensors":
            check_names(path)
            return dict(load_file(path))
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except OSError:
        raise
    except Exception as error:  # a foreign reader on a foreign file: its kinds of failure are listed nowhere
        raise CheckpointError(f"{printable(path)} is damaged or no {kind} file: {printable(str(error))}") from error


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


def find_file(folder: Path, remark: Callable[[str], None]) -> Path:
    """The file of weights in a folder, or the index of several that make one.

    Raises:
        CheckpointError: there is none, or there are several and none has a name that decides.
    """
    present = [folder / name for name in LAYOUT if (folder / name).is_file()]
    other = describe_folder(folder) if not present else None
    if other is not None:
        raise CheckpointError(f"{printable(folder)} is {other}")
    files = present or [each for each in sorted(folder.iterdir()) if each.is_file() and is_weights(each)]
    if not files:
        raise CheckpointError(
            f"{printable(folder)} is a folder without weights: it holds none of {', '.join(LAYOUT)}, nor another file "
            "of weights"
        )
    if len(files) > 1 and not present:
        listed = cut([printable(each.name) for each in files])
        raise CheckpointError(
            f"{printable(folder)} holds {len(files)} files of weights, {listed}; name one of them: "
            f"{printable(files[0])}"
        )
    if not present or files[0].name == "best.safetensors":
        remark(f"{printable(folder)}: the weights of {printable(files[0].name)} are taken")
    return files[0]


def is_weights(path: Path) -> bool:
    """Whether a file is a file of weights, by its content."""
    try:
        return bool(file_format(path))
    except (CheckpointError, OSError):
        return False


def read_shards(index: Path, remark: Callable[[str], None] = warnings.warn) -> dict[str, Tensor]:
    """The tensors of several files, as their index tells: name → file beside the index."""
    try:
        homes = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(homes.values()))
        stray = [name for name in files if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{printable(index)} is damaged or no index of shards: {printable(repr(error))}"
        ) from error
    if stray:
        names = ", ".join(map(printable, stray))
        raise CheckpointError(f"{printable(index)} names files outside its folder, which are not read: {names}")
    state = {key: tensor for name in files for key, tensor in read_file(index.parent / name, None, remark).items()}
    lost = [key for key in homes if key not in state]
    if lost:
        raise CheckpointError(
            f"{printable(index)} lists {counted(len(lost), 'tensor')} that its files lack, {printable(lost[0])!r} first"
        )
    return state
