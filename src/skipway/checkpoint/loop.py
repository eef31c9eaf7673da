"""`LoopCheckpoints`: exact resume for a training loop of one's own."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from skipway.checkpoint.state import clean_name, is_sharded
from skipway.checkpoint.store import Checkpoints, Snapshot
from skipway.errors import CheckpointError, counted, printable
from skipway.nn import warmup_state
from skipway.tracing import unwrap
from skipway.validation import is_whole
from skipway.weights.prefixes import EXTRA

__all__ = ["LoopCheckpoints"]

TAG = "__skipway__"
"""The only key of a JSON object that stands for a value that JSON lacks."""
METADATA = "__metadata__"
"""The entry of the metadata of the modules' state dicts: versions, by which they read older ones."""
RANDOM, CLASSES = "random", "classes"
"""The entries of the random number generators and of the parts' classes, beside those of the parts."""


class LoopCheckpoints:
    """Saves and restores everything that a training loop consists of, so that a resumed loop continues bit for bit.

    With the parts are saved the states of torch's generators (CPU and every GPU), Python's and NumPy's. A checkpoint is
    written atomically, with hashes; one that is damaged is skipped, with a warning. Nothing is pickled, and reading
    never runs code.

    What is not restored: the position in a DataLoader that shuffles on its own. Let the order follow from the step
    (`torch.randperm(n, generator=torch.Generator().manual_seed(epoch))`), or pass a loader that has a `state_dict`, as
    torchdata's StatefulDataLoader, as a part.

    Args:
        folder: of the checkpoints, of one loop.
        keep: number of checkpoints to keep, at least 1.
        parts: by name, what changes from step to step: the model, optimizer, scheduler, gradient scaler, averaged
            weights, a generator (of torch, `random.Random`, NumPy's): whatever has `state_dict` and `load_state_dict`,
            or a state of its own kind. Wrappers of `torch.compile` and DistributedDataParallel are looked through.

    Raises:
        CheckpointError: a part without a state.

    >>> import tempfile, torch
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> checkpoints = LoopCheckpoints(tempfile.mkdtemp(), model=model, optimizer=optimizer)
    >>> for step in range(checkpoints.resume(), 4):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 2)).square().mean().backward()
    ...     optimizer.step()
    ...     checkpoints.save(step + 1)
    >>> checkpoints.resume()
    4
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, **parts: Any) -> None:
        self.store = Checkpoints(Path(folder), keep=keep)
        self.reached: int | None = None
        self.parts = {name: unwrap(part) if isinstance(part, torch.nn.Module) else part for name, part in parts.items()}
        if not parts or {RANDOM, CLASSES, METADATA} & parts.keys():
            raise CheckpointError(
                f"parts={', '.join(parts) or 'none'}: the rule is at least one, none named {RANDOM!r} or {CLASSES!r}"
            )
        for name, part in self.parts.items():
            find_state(name, part)

    def save(self, step: int) -> None:
        """Save the state after `step` steps, which is what `resume` returns; warn where the clock of a residual warm-up
        has not moved by then.

        Raises:
            CheckpointError: a full disk and the like; the previous checkpoint is kept. A state with objects that are
                neither tensors nor plain values.
        """
        if not is_whole(step, 0):
            raise CheckpointError(f"step={step!r}: the rule is a whole number from 0 on")
        later = max(self.store.steps(), default=-1)
        if later >= step and (self.reached is None or step < self.reached):
            raise CheckpointError(
                f"step={step}: {printable(self.store.folder)} holds a checkpoint of step {later}, which would be "
                "replaced; begin with resume(), or give another folder"
            )
        for name, part in self.parts.items():
            warmup = warmup_state(part) if isinstance(part, torch.nn.Module) else None
            if warmup is not None and warmup.running and step > 0 and warmup.step == 0:
                warnings.warn(
                    f"{name}: the residual warm-up stands at {warmup} after {step} steps; call "
                    "skipway.set_step(model, step, total) after each optimizer step",
                    stacklevel=2,
                )
        tensors: dict[str, Tensor] = {}
        state = {name: encode(find_state(name, part)[0](), name, tensors) for name, part in self.parts.items()}
        state[RANDOM] = encode(random_state(), RANDOM, tensors)
        state[CLASSES] = self.classes
        state[METADATA] = {name: metadata_of(self.parts[name]) for name in self.parts.keys() - self.classes.keys()}
        self.store.save(Snapshot(int(step), {"parts": tensors}, state))
        self.reached = int(step)

    @property
    def classes(self) -> dict[str, str]:
        """The class of each part but the modules: another optimizer would take over a state that it reads otherwise."""
        return {name: type(part).__name__ for name, part in self.parts.items() if not isinstance(part, torch.nn.Module)}

    def resume(self) -> int:
        """Restore the newest checkpoint into the parts, in place, and return its number of steps; 0 if there is none.

        Raises:
            CheckpointError: no checkpoint is valid, or it does not fit the parts.
        """
        self.store.sweep()
        if not self.store.steps():
            return 0
        snapshot, damaged = self.store.newest()
        for sentence in damaged:
            warnings.warn(sentence, stacklevel=2)
        stored = {name for name in snapshot.state if name not in (RANDOM, CLASSES, METADATA)}
        if stored != set(self.parts):
            raise CheckpointError(
                f"{printable(self.store.folder)} holds {', '.join(sorted(stored))}, and the parts here are "
                f"{', '.join(sorted(self.parts))}; give the same, or another folder"
            )
        for name, kind in snapshot.state.get(CLASSES, {}).items():
            if kind != self.classes.get(name):
                raise CheckpointError(
                    f"{printable(self.store.folder)}: {name} was a {kind} and is a {type(self.parts[name]).__name__}; "
                    "build it as it was, or give another folder"
                )
        tensors = snapshot.tensors.get("parts", {})
        states = {name: decode(value, tensors) for name, value in snapshot.state.items()}
        for name, part in self.parts.items():
            check_names(self.store.folder, name, part, states[name])
            if isinstance(part, torch.nn.Module) and isinstance(states[name], Mapping):
                states[name] = OrderedDict(states[name])
                states[name]._metadata = states.get(METADATA, {}).get(name) or metadata_of(part)
        before = {name: copy.deepcopy(find_state(name, self.parts[name])[0]()) for name in self.classes}
        for name in (*self.classes, *(self.parts.keys() - self.classes.keys())):  # modules, which were checked, last
            part = self.parts[name]
            try:
                find_state(name, part)[1](states[name])
            except Exception as error:  # each part's own kind
                for other in before.keys() - {name}:
                    find_state(other, self.parts[other])[1](before[other])
                raise CheckpointError(
                    f"{printable(self.store.folder)}: the state of step {snapshot.step} does not fit {name}: {error}; "
                    "build it as it was, or give another folder"
                ) from error
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                f"{counted(dist.get_world_size(), 'process', 'processes')} resume with the random states of the one "
                "that saved, so that all draw the same numbers, and other ones than without the interruption; let "
                "what is drawn follow from rank and step: torch.manual_seed(seed + rank)",
                stacklevel=2,
            )
        set_random_state(states[RANDOM])
        self.reached = snapshot.step
        return snapshot.step


State = tuple[Callable[[], Any], Callable[[Any], Any]]


def find_state(name: str, part: Any) -> State:
    """How the state of a part is read, and how it is put back."""
    for read, write in (("state_dict", "load_state_dict"), ("get_state", "set_state"), ("getstate", "setstate")):
        if hasattr(part, read) and hasattr(part, write):
            return getattr(part, read), getattr(part, write)
    if hasattr(part, "bit_generator"):  # of NumPy
        return lambda: part.bit_generator.state, lambda state: setattr(part.bit_generator, "state", state)
    raise CheckpointError(
        f"{name}={type(part).__name__}: the rule is an object with state_dict() and load_state_dict(), or a random "
        "number generator"
    )


def check_names(folder: Path, name: str, part: Any, state: Any) -> None:
    """Raise where a module lacks parameters of a state, or has others: before anything is changed."""
    if not isinstance(part, torch.nn.Module) or not isinstance(state, Mapping):
        return
    own = part.state_dict()
    odd = set(own.keys() ^ state.keys()) | {
        key
        for key in own.keys() & state.keys()
        if key.rpartition(".")[2] != EXTRA
        and isinstance(own[key], Tensor)
        and isinstance(state[key], Tensor)
        and (own[key].shape, own[key].dtype) != (state[key].shape, state[key].dtype)
    }
    if odd:
        listed = ", ".join(sorted(map(clean_name, odd))[:5])
        raise CheckpointError(
            f"{printable(folder)}: the stored {name} is another network; {len(odd)} names, shapes or types differ, "
            f"{listed}; build it as it was, or give another folder"
        )


def metadata_of(module: torch.nn.Module) -> dict[str, Any]:
    """The versions of modules in the metadata of a module's state dict, by paths."""
    known = getattr(module.state_dict(), "_metadata", {})
    return {path: {"version": each["version"]} for path, each in known.items() if "version" in each}


def random_state() -> dict[str, Any]:
    """The states of all global random number generators."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the states of all global random number generators back; warn where there are fewer GPUs than there were."""
    torch.set_rng_state(state["torch"])
    if stored := state["cuda"]:
        here = torch.cuda.device_count()
        if here < len(stored):
            warnings.warn(
                f"the checkpoint holds the random states of {counted(len(stored), 'GPU')}, and {here} "
                f"{'is' if here == 1 else 'are'} here: what is drawn on the others differs; resume on as many GPUs to "
                "continue bit for bit",
                stacklevel=3,
            )
        torch.cuda.set_rng_state_all(stored[:here])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors and arrays are entered into `tensors` by their path.

    Raises:
        CheckpointError: an object of another kind, named with its path.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {TAG: ["float", repr(value)]}
    if isinstance(value, Tensor):
        if is_sharded(value):
            raise CheckpointError(f"{path} is sharded over processes; torch.distributed.checkpoint saves such tensors")
        return {TAG: ["tensor", enter(tensors, path, value)]}
    if isinstance(value, np.generic):
        return {TAG: ["number", encode(value.item(), path, tensors), str(value.dtype)]}
    if isinstance(value, np.ndarray):
        try:
            return {TAG: ["array", enter(tensors, path, torch.from_numpy(value.copy())), str(value.dtype)]}
        except TypeError as error:  # texts, records
            raise CheckpointError(f"{path}: an array of {value.dtype} cannot be stored; the rule is numbers") from error
    if isinstance(value, list | tuple):
        parts = [encode(each, f"{path}.{number}", tensors) for number, each in enumerate(value)]
        return parts if isinstance(value, list) else {TAG: ["tuple", parts]}
    if isinstance(value, Mapping):
        pairs = list(encoded_pairs(value, path, tensors))
        plain = all(isinstance(key, str) and key != TAG for key, _ in pairs)
        return dict(pairs) if plain else {TAG: ["pairs", [list(pair) for pair in pairs]]}
    raise CheckpointError(
        f"{path}: a {type(value).__name__} cannot be stored; the rule is tensors, arrays, numbers, texts, and lists, "
        "tuples and dicts of them"
    )


def enter(tensors: dict[str, Tensor], path: str, tensor: Tensor) -> str:
    """Enter a tensor under its path, or under another where two have it, since names may hold dots; return the name."""
    while path in tensors:
        path += "'"
    tensors[path] = tensor
    return path


def encoded_pairs(value: Mapping[Any, Any], path: str, tensors: dict[str, Tensor]) -> Iterator[tuple[Any, Any]]:
    """Keys and encoded values of a mapping.

    Raises:
        CheckpointError: a key that is neither a text nor a number.
    """
    for key, each in value.items():
        if not isinstance(key, str | int | float | bool):
            raise CheckpointError(f"{path}: the key {key!r} cannot be stored; the rule is texts and numbers")
        yield key, encode(each, f"{path}.{key}", tensors)


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` was given."""
    if isinstance(value, list):
        return [decode(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if set(value) != {TAG}:
        return {key: decode(each, tensors) for key, each in value.items()}
    kind, content, *more = value[TAG]
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy().astype(more[0], copy=False)
    if kind == "number":
        return np.dtype(more[0]).type(decode(content, tensors))
    if kind == "tuple":
        return tuple(decode(each, tensors) for each in content)
    if kind == "pairs":
        return {key: decode(each, tensors) for key, each in content}
    return float(content)
