"""Checkpoint containers: what `torch.save` wrote, read without running code, and the state dicts in it."""

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipway.errors import CheckpointError, counted, printable, spell

__all__ = ["StateDict", "find_state_dicts", "read_torch", "select_state_dict"]


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
SHOWN = 12
"""Names that a message lists."""


class Unread:
    """A stand-in for an object of a type that is not allowed: it keeps what the file stored, and runs nothing."""

    state: object = None

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The attributes that the file stored for the object."""
        return self.state if isinstance(self.state, Mapping) else {}


class UnreadDict:
    """The same for a subclass of dict, which torch's unpickler fills only where it is a plain one."""

    def __new__(cls, *args: object) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


class UnreadList:
    """The same for a subclass of list."""

    def __new__(cls, *args: object) -> list[Any]:  # type: ignore[misc]
        return []


def read_torch(path: Path) -> tuple[object, list[str]]:
    """The content of a file that `torch.save` wrote, without ever running code from it.

    Tensors, plain containers and `HARMLESS` objects are read. For an object of any other type stands an `Unread`.

    Returns:
        the content, and the names of the other types.

    Raises:
        CheckpointError: a damaged file, a TorchScript archive, or a function of the operating system.
    """
    unread: dict[str, type] = dict.fromkeys(unknown_types(path), Unread)
    while True:
        stand_ins = [(type(name, (kind,), {}), name) for name, kind in unread.items()]
        try:
            # by a file object, since torch.load takes a path that ends in .safetensors for what it says
            with (
                path.open("rb") as file,
                warnings.catch_warnings(),
                torch.serialization.safe_globals([*HARMLESS, *stand_ins]),
            ):
                warnings.simplefilter("ignore")  # about the protocol of a foreign pickle; its content is judged here
                return torch.load(file, map_location="cpu", weights_only=True), sorted(unread)
        except pickle.UnpicklingError as error:
            if not add_stand_in(unread, str(error)):
                named = re.search(r"GLOBAL (\S+)", str(error))
                what = f"an object of {printable(named[1])}" if named else "more than tensors"
                raise CheckpointError(
                    f"{printable(path)} holds {what} and would run code when read, which Skipway never does. If you "
                    "trust the file, read it with torch.load(…, weights_only=False) and save its state dict as "
                    "safetensors"
                ) from error
        except Exception as error:  # a foreign reader on a foreign file: its kinds of failure are listed nowhere
            if "TorchScript" in str(error):
                raise CheckpointError(
                    f"{printable(path)} is a TorchScript archive; save the state dict of the module that it was made "
                    "from, torch.jit.load(…).state_dict()"
                ) from error
            reason = printable(str(error)).partition("\\n")[0]
            raise CheckpointError(f"{printable(path)} is damaged or no PyTorch checkpoint: {reason}") from error


def unknown_types(path: Path) -> list[str]:
    """The types in a zipped checkpoint that are not allowed; none for an older or damaged one."""
    try:
        with torch.serialization.safe_globals(list(HARMLESS)):
            return torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # as above; reading the file tells what is wrong
        return []


def add_stand_in(unread: dict[str, type], reason: str) -> bool:
    """Let something inert stand for the type that the unpickler refused, and tell whether that is new."""
    named = re.search(r"GLOBAL (\S+) was not an allowed", reason)
    if named is not None:
        new = {name for name in (named[1], f"builtins.{named[1]}") if name not in unread}
        unread.update(dict.fromkeys(new, Unread))
        return bool(new)
    kinds = {"SETITEM": UnreadDict, "append to": UnreadList, "extend lists": UnreadList}
    kind = next((kind for words, kind in kinds.items() if words in reason), Unread)
    refused = [name for name, known in unread.items() if known is not kind and f".{name}'" in reason]
    unread.update(dict.fromkeys(refused, kind))
    return bool(refused)


@dataclass(frozen=True)
class StateDict:
    """The parameters of a network by name.

    Args:
        tensors: by name.
        others: the names of values that are left out, with their types: those among the tensors that are none, and
            tensors beside the entry.
    """

    tensors: dict[str, Tensor]
    others: tuple[str, ...] = ()


def find_state_dicts(content: object) -> dict[str, StateDict]:
    """All state dicts in a checkpoint by the path of their entry, "" for the content itself.

    A state dict is a mapping from names to tensors (or NumPy arrays) that holds no other state dict, or a network that
    was pickled as a whole. The states of optimizers and schedulers are none.

    >>> found = find_state_dicts({"epoch": 3, "ema": {"module": {"fc.weight": torch.zeros(2)}}})
    >>> list(found)
    ['ema.module']
    """
    found: dict[str, StateDict] = {}
    loose: list[str] = []

    def search(value: object, path: tuple[str, ...]) -> None:
        if isinstance(value, Unread) and "_parameters" in value.attributes:
            value = read_module(value, ())
        if isinstance(value, list | tuple) and not path:
            value = {str(number): each for number, each in enumerate(value) if isinstance(each, Mapping)}
        if not isinstance(value, Mapping) or len(path) > DEPTH or is_optimizer(value, path):
            return
        before = len(found)
        lists = {str(name): count for name, each in value.items() if (count := count_unnamed(each))}
        loose.extend(
            f"{printable('.'.join((*path, name)))} ({counted(count, 'tensor')} without names)"
            for name, count in lists.items()
        )
        for name, each in value.items():
            search(each, (*path, str(name)))
        tensors = {str(name): tensor for name, each in value.items() if (tensor := as_tensor(each)) is not None}
        if len(found) > before or not any(tensor.ndim for tensor in tensors.values()):
            loose.extend(f"{printable('.'.join((*path, name)))} (a tensor)" for name in tensors)
            return
        named = {*tensors, *lists}
        rest = {name: each for name, each in value.items() if str(name) not in named and each is not None}
        others = tuple(f"{printable(str(name))} ({type(each).__name__})" for name, each in rest.items())
        found[".".join(path)] = StateDict(tensors, others)

    search(content, ())
    return {path: replace(each, others=(*each.others, *loose)) for path, each in found.items()}


def count_unnamed(value: object) -> int:
    """Number of tensors in a list of nothing else; 0 for anything else."""
    if not isinstance(value, list | tuple) or not all(isinstance(each, Tensor) for each in value):
        return 0
    return len(value)


def is_optimizer(value: Mapping[Any, Any], path: tuple[str, ...]) -> bool:
    """Whether a mapping is an optimizer's state, or has no names but numbers, as the parts of one do."""
    return (
        not any(isinstance(name, str) for name in value)
        or "param_groups" in value
        or any("optim" in part for part in path)
    )


def read_module(module: Unread, owners: tuple[int, ...]) -> dict[str, Tensor]:
    """The state dict of a network that was pickled as a whole."""
    own = module.attributes
    passing = own.get("_non_persistent_buffers_set")
    tables = [own.get(name) for name in ("_parameters", "_buffers")]
    tensors = {
        str(name): tensor
        for table in tables
        for name, tensor in (table.items() if isinstance(table, Mapping) else ())
        if isinstance(tensor, Tensor) and name not in (passing if isinstance(passing, set) else ())
    }
    parts = own.get("_modules")
    for name, part in parts.items() if isinstance(parts, Mapping) else ():
        if isinstance(part, Unread) and id(part) not in owners:
            inner = read_module(part, (*owners, id(module)))
            tensors.update({f"{name}.{leaf}": tensor for leaf, tensor in inner.items()})
    return tensors


def as_tensor(value: object) -> Tensor | None:
    """A tensor, or the tensor of a numeric NumPy array; None for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        try:
            return torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
        except TypeError:  # a type of numbers that torch lacks, such as longdouble
            return None
    return None


def select_state_dict(content: object, where: str, entry: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of a checkpoint, and remarks on what was chosen and what was left out.

    Averaged weights (an entry such as "model_ema") are preferred to the live ones, as timm does; `entry` names another.

    Raises:
        CheckpointError: no state dict, several of which none is known to be meant, or no such entry.
    """
    found = find_state_dicts(content)
    names = list(found)
    if not found:
        raise CheckpointError(f"{where} holds no state dict (names to tensors): {describe_content(content)}")
    remarks = []
    if entry is not None:
        close = [name for name in names if name == entry or name.startswith(f"{entry}.")]
        if len(close) != 1:
            return select_prefix(found, where, entry)
        chosen = close[0]
    else:
        ranked = [name for kind in (AVERAGED, LIVE) for known in kind for name in names if known in name.split(".")]
        averaged = [name for name in names if is_averaged(name)]
        if len(averaged) == 1:
            ranked = averaged
        chosen = (ranked or (names if len(names) == 1 else [""]))[0]
        others = [name for name in names if name != chosen]
        if chosen not in found:
            raise CheckpointError(
                f"{where} holds several state dicts, {list_names(names)}; name one of them: {spell('entry', names[0])}"
            )
        if others:
            kind = "averaged weights" if is_averaged(chosen) else "weights"
            remarks.append(
                f"{where}: the {kind} {chosen!r} are taken; also there: {list_names(others)} "
                f"(choose by {spell('entry', others[0])})"
            )
    left_out = found[chosen].others
    if left_out:
        remarks.append(f"{where}: {counted(len(left_out), 'value')} beside the weights left out: {cut([*left_out])}")
    return found[chosen].tensors, remarks


def is_averaged(path: str) -> bool:
    """Whether the path of an entry says that its weights are averaged: a known name, or a word in one."""
    words = r"(?:^|[_.-])(?:ema|swa|averaged?|avg)(?:[_.-]|$)"
    return bool(set(AVERAGED) & set(path.split("."))) or re.search(words, path.lower()) is not None


def select_prefix(found: dict[str, StateDict], where: str, prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the one state dict that has names with a prefix, without it, and a remark on the rest.

    Raises:
        CheckpointError: none has such names, or several have.
    """
    start = f"{prefix}."
    having = [each for each in found.values() if any(name.startswith(start) for name in each.tensors)]
    if len(having) != 1:
        prefixes = {name.partition(".")[0] for each in found.values() for name in each.tensors}
        known = f"the state dicts {list_names(list(found))}" if set(found) != {""} else "one state dict"
        begin = list_names(sorted(prefixes))
        raise CheckpointError(f"{spell('entry', prefix)}: {where} holds {known}, with names that begin with {begin}")
    chosen = {name[len(start) :]: tensor for name, tensor in having[0].tensors.items() if name.startswith(start)}
    rest = [name for name in having[0].tensors if not name.startswith(start)]
    remark = (
        f"{where}: the {len(chosen)} names that begin with {start!r} are taken; {len(rest)} are left out: {cut(rest)}"
    )
    return chosen, [remark] if rest else []


def describe_content(content: object) -> str:
    """What a checkpoint without a state dict holds."""
    if isinstance(content, Mapping) and content:
        return f"its entries are {cut([f'{printable(str(key))}{name_type(value)}' for key, value in content.items()])}"
    return f"it holds a {printable(type(content).__name__)}{name_type(content)}"


def name_type(value: object) -> str:
    """The type of an object that was not read, in brackets."""
    kind = printable(type(value).__name__)
    return f" (an object of {kind}, which is not read: that could run code)" if isinstance(value, Unread) else ""


def list_names(names: list[str]) -> str:
    """Names in quotation marks, cut."""
    return cut([repr(name) for name in names])


def cut(rows: list[str]) -> str:
    """A list for a sentence, cut."""
    return ", ".join(rows[:SHOWN]) + (f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else "")
