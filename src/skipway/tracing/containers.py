"""Tensors in whatever holds them: tuples, mappings of any class, dataclasses, and objects of a library's own."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["ATOMS", "CLOSED", "entries_of", "leaves_in", "map_tensors", "own_attributes", "tensors_in"]

ATOMS = (bool, int, float, complex, str, bytes, type(None))
"""Kinds of values that hold nothing else and cannot be written into."""
CLOSED = (nn.Module, type, FunctionType, MethodType, ModuleType, torch.Generator, torch.device, torch.dtype)
"""Objects whose attributes are no part of an example."""
LEAVES = (Tensor, *CLOSED)
PLAIN = (list, tuple, dict)
FILLED = (list, dict, OrderedDict, defaultdict)
"""Containers that can be filled after they were made, and so hold themselves."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in order: of containers that torch's pytree knows, of every other sequence and mapping,
    and of the attributes of objects, such as dataclasses, `UserDict`, caches and structures of a library's own.

    >>> from collections import UserDict
    >>> [tensor.shape[0] for tensor in tensors_in(({"a": torch.zeros(2)}, UserDict(b=torch.zeros(3))))]
    [2, 3]
    """
    yield from (each for each in leaves_in(value) if isinstance(each, Tensor))


def leaves_in(value: Any) -> Iterator[Any]:
    """The tensors in a value, and the objects whose attributes are no part of it, in order: each as often as it is
    held, but where containers hold one another in a circle, each of them is entered once.
    """
    if holds_atoms(value):
        return
    try:
        leaves = list(walk(value, {}))
    except CircleError:
        leaves = list(walk(value, {}, once=True))
    yield from leaves


class CircleError(Exception):
    """A container holds itself, directly or by what it holds."""


def holds_atoms(value: Any) -> bool:
    """True for an atom and for a plain container of atoms alone, as most attributes of modules are."""
    kind = type(value)
    if kind is dict:
        return all(type(part) in ATOMS for part in value.values())
    return kind in ATOMS or (kind in (tuple, list) and all(type(part) in ATOMS for part in value))


def walk(
    value: Any, seen: dict[int, Any], *, once: bool = False, around: frozenset[int] = frozenset()
) -> Iterator[Any]:
    """`leaves_in`; objects that were seen already are passed over, since they may hold each other.

    Args:
        value: what to look into.
        seen: the objects so far by their ids, which are theirs as long as they are kept.
        once: pass over containers, too, that were seen already.
        around: ids of the containers that hold the value.

    Raises:
        CircleError: a container holds itself, and `once` is False.
    """
    if isinstance(value, LEAVES):
        yield value
        return
    if type(value) in ATOMS or (once and id(value) in seen):
        return
    if id(value) in around:
        raise CircleError
    if (parts := held_in(value)) is not None:
        if once:
            seen[id(value)] = value
        around |= {id(value)}
        for part in parts:
            yield from walk(part, seen, once=once, around=around)
    elif id(value) not in seen:
        seen[id(value)] = value
        for _, part in parts_of(value):
            yield from walk(part, seen, once=once, around=around)


def held_in(value: Any) -> Iterable[Any] | None:
    """What a container that torch's pytree knows holds, one level down; None for other values."""
    if type(value) in PLAIN:
        return list(value.values()) if isinstance(value, dict) else value
    parts = one_level(value)[0]
    return None if len(parts) == 1 and parts[0] is value else parts


def one_level(value: Any) -> tuple[list[Any], Any]:
    """Torch's `tree_flatten`, which descends into all that is held, and does not return from a circle."""
    at_first = iter([False])
    return tree_flatten(value, is_leaf=lambda part: next(at_first, True))


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The value with `function` applied to each of its tensors; what holds no tensor stays the same object.

    Containers are copied and keep their class; the given ones are not changed.

    >>> from collections import UserDict
    >>> type(map_tensors(torch.neg, UserDict(a=torch.ones(1)))), map_tensors(torch.neg, (torch.ones(1), "text"))
    (<class 'collections.UserDict'>, (tensor([-1.]), 'text'))
    """
    return rebuild(function, value, {})


def rebuild(function: Callable[[Tensor], Any], value: Any, memo: dict[int, tuple[Any, Any]]) -> Any:
    """`map_tensors`, with the lists, mappings and objects that were rebuilt already, by their ids: as they were, since
    ids are theirs as long as they are kept, and rebuilt.
    """
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in FILLED:
        return rebuild_object(function, value, memo)
    parts, structure = one_level(value)
    if len(parts) == 1 and parts[0] is value:
        return rebuild_object(function, value, memo) if any(True for _ in tensors_in(value)) else value
    return tree_unflatten([rebuild(function, part, memo) for part in parts], structure)


def rebuild_object(function: Callable[[Tensor], Any], value: Any, memo: dict[int, tuple[Any, Any]]) -> Any:
    """A shallow copy of a container or object whose entries and attributes are rebuilt."""
    if id(value) in memo:
        return memo[id(value)][1]
    if isinstance(value, tuple):
        return tuple(rebuild(function, each, memo) for each in value)
    made = copy.copy(value)
    memo[id(value)] = value, made
    for name, held in list(parts_of(value)):
        changed = rebuild(function, held, memo)
        if isinstance(value, dict | list) and (isinstance(value, list) or name in value):
            made[name] = changed
        else:
            object.__setattr__(made, name, changed)
    return made


def parts_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """Entries of a dict or list and attributes of an object, with their names."""
    if isinstance(value, CLOSED):
        return
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    yield from own_attributes(value)


def own_attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object, with their names, read past a `__getattr__`, which may return or raise anything."""
    with suppress(AttributeError):
        yield from object.__getattribute__(value, "__dict__").items()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                with suppress(AttributeError):
                    yield name, object.__getattribute__(value, name)


def entries_of(value: Any) -> dict[str, Any] | None:
    """The entries of a mapping, or of an object with its `keys`, `values` and indexing; None for others.

    >>> from collections import UserDict
    >>> entries_of(UserDict(a=1)), entries_of([1])
    ({'a': 1}, None)
    """
    if isinstance(value, Tensor | nn.Module | type):
        return None
    kind = type(value)  # an object may have any attribute that it is asked for
    if not isinstance(value, Mapping) and not (callable(getattr(kind, "keys", None)) and hasattr(kind, "values")):
        return None
    return {name: value[name] for name in value.keys()}  # noqa: SIM118 (not every one iterates over its keys)
