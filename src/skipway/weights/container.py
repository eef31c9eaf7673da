"""Checkpoint containers: the format of a file by its content, and the state dicts that a checkpoint holds."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import pickle
import re
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from skipway.errors import CheckpointError, printable

__all__ = ["file_format", "find_state_dicts", "read_torch", "select_state_dict"]

Format = Literal["safetensors", "torch"]

FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself; fetch it with git lfs pull"),
    (b"<", "a page of HTML or XML, as a failed download leaves it; download the file again"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"GGUF", "a GGUF file of llama.cpp, which is not read; use the safetensors file of the same model"),
    (b"\x89HDF", "an HDF5 file of Keras, which is not read; convert it to safetensors"),
    (b"\x93NUMPY", "a NumPy array, not a state dict"),
)
"""First bytes of files that people mistake for weights, and what such a file is."""


def as_dict(*_: object) -> dict[Any, Any]:
    """An empty dict in place of a `defaultdict`, which torch's restricted unpickler cannot fill."""
    return {}


def as_list(*given: Any) -> list[Any]:
    """A list in place of a `deque`, for the same reason."""
    return list(*given[:1])


HARMLESS: tuple[Any, ...] = (
    *(argparse.Namespace, types.SimpleNamespace, collections.OrderedDict, collections.Counter),
    *((as_dict, "collections.defaultdict"), (as_list, "collections.deque")),
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
    *(pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath),
    *(dict, list, set, frozenset, tuple, int, float, complex, bool, str, bytes, slice, range),
    *(np.ndarray, np.dtype, np._core.multiarray.scalar, np._core.multiarray._reconstruct),  # type: ignore[attr-defined]
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdFDSUMmV"),
)
"""Types that people save beside the weights and whose construction runs no code of the file's choice."""

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema", "averaged_model", "teacher")
LIVE = ("state_dict", "model_state_dict", "model_state", "model", "params", "weights", "net", "network", "student")
DEPTH = 3
"""How deep entries are nested at most: {"ema": {"module": {…}}}."""


def file_format(path: Path) -> Format:
    """The format of a file of weights, read from its first bytes; its suffix does not matter.

    Raises:
        CheckpointError: an empty file, or one of another kind, which is named.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(264)
    # first, since the length of a header may begin with the byte of a pickle
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80" or head[257:262] == b"ustar":
        return "torch"
    for start, kind in FOREIGN:
        if head.lstrip().startswith(start):
            raise CheckpointError(f"{path} is {kind}")
    if path.suffix.lower() == ".safetensors" or head[8:9] == b"{":
        raise CheckpointError(f"{path} is a damaged safetensors file: its header does not fit its {size:,} bytes")
    raise CheckpointError(
        f"{path} is damaged or no file of weights ({size:,} bytes, beginning {head[:8]!r}): the rule is a safetensors "
        "file, or one that torch.save wrote"
    )


def read_torch(path: Path) -> object:
    """The content of a file that `torch.save` wrote: tensors, plain containers and `HARMLESS` objects, never code.

    Raises:
        CheckpointError: a damaged file, a TorchScript archive, or an object of another type, which is named.
    """
    try:
        # by a file object, since torch.load takes a path that ends in .safetensors for what it says
        with path.open("rb") as file, warnings.catch_warnings(), torch.serialization.safe_globals(list(HARMLESS)):
            warnings.simplefilter("ignore")  # about the protocol of a foreign pickle; its content is judged here
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        what = f"an object of {printable(named[1])}" if named else "more than tensors"
        raise CheckpointError(
            f"{path} holds {what} and would run code when read, which Skipway never does. If you trust the file, read "
            "it with torch.load(…, weights_only=False) and save its state dict as safetensors"
        ) from error
    except Exception as error:  # a foreign reader on a foreign file: its kinds of failure are listed nowhere
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript archive; save the state dict of the module that it was made from, "
                "torch.jit.load(…).state_dict()"
            ) from error
        raise CheckpointError(f"{path} is damaged or no PyTorch checkpoint: {printable(str(error))}") from error


def find_state_dicts(content: object) -> dict[str, dict[str, Tensor]]:
    """All state dicts in a checkpoint by the path of their entry, "" for the content itself.

    A state dict is a mapping from names to tensors in which nothing else stands, NumPy arrays taken as tensors and
    empty extra states left out. Optimizers' and schedulers' states are none.

    >>> found = find_state_dicts({"epoch": 3, "ema": {"module": {"fc.weight": torch.zeros(2)}}})
    >>> list(found)
    ['ema.module']
    """
    found: dict[str, dict[str, Tensor]] = {}

    def search(value: object, path: tuple[str, ...]) -> None:
        if not isinstance(value, Mapping) or len(path) > DEPTH or any("optim" in part for part in path):
            return
        tensors = {str(name): as_tensor(each) for name, each in value.items() if each is not None}
        if tensors and all(tensor is not None for tensor in tensors.values()):
            found[".".join(path)] = {name: tensor for name, tensor in tensors.items() if tensor is not None}
            return
        for name, each in value.items():
            search(each, (*path, str(name)))

    search(content, ())
    return found


def as_tensor(value: object) -> Tensor | None:
    """A tensor, or the tensor of a numeric NumPy array; None for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy())
    return None


def select_state_dict(content: object, path: Path, entry: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The state dict of a checkpoint, and a remark on the choice, empty if there was none.

    Averaged weights (an entry such as "model_ema") are preferred to the live ones, as timm does; `entry` names another.

    Raises:
        CheckpointError: no state dict, several of which none is known to be meant, or no such entry.
    """
    found = find_state_dicts(content)
    if not found:
        keys = ", ".join(printable(str(key)) for key in list(content)[:12]) if isinstance(content, Mapping) else ""
        held = f"its entries are {keys}" if keys else f"it holds a {type(content).__name__}"
        raise CheckpointError(f"{path} holds no state dict (names to tensors): {held}")
    names = list(found)
    if entry is not None:
        close = [name for name in names if name == entry or name.startswith(f"{entry}.")]
        if len(close) != 1:
            raise CheckpointError(f"entry={entry!r}: {path} holds the state dicts {', '.join(map(repr, names))}")
        return found[close[0]], ""
    ranked = [name for kind in (AVERAGED, LIVE) for known in kind for name in names if known in name.split(".")]
    chosen = (ranked or (names if len(names) == 1 else [""]))[0]
    if chosen not in found:
        listed = ", ".join(repr(name) for name in names)
        raise CheckpointError(f"{path} holds several state dicts, {listed}; name one of them: entry={names[0]!r}")
    others = [name for name in names if name != chosen]
    if not others:
        return found[chosen], ""
    kind = "averaged weights" if set(AVERAGED) & set(chosen.split(".")) else "weights"
    return found[chosen], (
        f"{path.name}: the {kind} {chosen!r} are taken; also there: {', '.join(map(repr, others))} (choose by entry=…)"
    )
