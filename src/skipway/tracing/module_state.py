"""What modules keep between calls, as attributes and in objects: copied, compared, and put back after a pass."""

from __future__ import annotations

import copy
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import is_not
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from skipway.tracing.containers import ATOMS, CLOSED, map_tensors, parts_of, tensors_in

__all__ = [
    *("attribute_restoration", "copy_module", "detach_attributes", "differing_state", "held_by", "is_changed"),
    "kept_tensors",
]

Model = TypeVar("Model", bound=nn.Module)
STANDARD = frozenset({*vars(nn.Module()), "training"})
"""The names in the `__dict__` of every module."""
HOLDERS = (Tensor, list, tuple, dict)
NUMBERS = (int, float)
"""Counters and lengths; flags among them are left, since one may say that hooks were installed, as in transformers."""
KINDS, MISSING = (*HOLDERS, *NUMBERS), object()
STATELESS = tuple(kind for kind in CLOSED if kind is not nn.Module)
"""Objects that keep nothing of a call."""


def copy_module(module: Model) -> Model:
    """A deep copy of any module, also of one that keeps tensors of a graph, which `copy.deepcopy` refuses: the weights
    that `torch.nn.utils.weight_norm` computes, activations of an earlier pass. They are detached in the copy.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    >>> layer.kept = layer(torch.zeros(1, 2))
    >>> copy_module(layer).kept.requires_grad
    False
    """
    held = [[*each._buffers.values(), *held_by(each).values()] for each in module.modules()]
    memo: dict[int, Any] = {id(each): each.detach().clone() for each in tensors_in(held) if not each.is_leaf}
    return copy.deepcopy(module, memo)


def kept_tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """The tensors among the plain attributes of modules, in containers too, and those with a graph among buffers."""
    for module in modules:
        yield from (buffer for buffer in module._buffers.values() if buffer is not None)
        for name, value in module.__dict__.items():
            if name not in STANDARD and isinstance(value, HOLDERS):
                yield from tensors_in(value)


def detach_attributes(modules: Iterable[nn.Module]) -> None:
    """Cut tensors that an earlier pass left in plain attributes off from its graph, which may have been freed."""
    for module in modules:
        for name, value in held_by(module).items():
            if isinstance(value, HOLDERS) and any(not tensor.is_leaf for tensor in tensors_in(value)):
                module.__dict__[name] = map_tensors(torch.detach, value)


def attribute_restoration(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """A step that puts back the attributes that a forward pass sets, replaces or fills: tensors, numbers."""
    before = [(module.__dict__, held_by(module)) for module in modules]
    held_lists = (each for _, held in before for value in held.values() for each in lists_in(value))
    lists = [(value, type(value)(value)) for value in held_lists]
    return partial(put_back_attributes, before, lists)


def lists_in(value: Any) -> Iterator[Any]:
    """The lists and mappings in an attribute, each once, though others share them.

    >>> inner = [1]
    >>> [len(each) for each in lists_in({"a": inner, "b": (inner,)})]
    [2, 1]
    """
    left, seen = [value], set[int]()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if type(each) in (list, dict):
            yield each
        if isinstance(each, list | tuple | dict):
            held = each.values() if isinstance(each, dict) else each
            left += [part for part in held if isinstance(part, list | tuple | dict)]


def put_back_attributes(before: Sequence[tuple[dict[str, Any], dict[str, Any]]], lists: Sequence[Any]) -> None:
    """Put back attributes, by the tables of their modules, and what lists and mappings held."""
    for own, held in before:
        for name in [each for each, value in own.items() if each not in STANDARD and isinstance(value, KINDS)]:
            if own[name] is held.get(name, MISSING):
                continue
            counted = isinstance(own[name], NUMBERS) and not isinstance(own[name], bool) and name in held
            if counted or next(tensors_in(own[name]), None) is not None:
                if name in held:
                    own[name] = held[name]
                else:
                    del own[name]
    for value, old in lists:
        if are_others(value, old) and (not value or next(tensors_in(value), None) is not None):
            filled = list(old) if isinstance(value, list) else dict(old)
            value.clear()
            value.extend(filled) if isinstance(value, list) else value.update(filled)


def are_others(value: Any, old: Any) -> bool:
    """Whether a list or mapping holds other objects than it did."""
    if len(value) != len(old):
        return True
    if isinstance(value, dict):
        return any(each is not old.get(key, MISSING) for key, each in value.items())
    return any(map(is_not, value, old))


def differing_state(before: nn.Module, after: nn.Module) -> list[str]:
    """The parameters, buffers and attributes in which two copies of a network differ, as `is_changed` compares them.

    >>> layer = nn.Linear(2, 2)
    >>> layer.calls = 0
    >>> copied = copy_module(layer)
    >>> copied.calls += 1
    >>> differing_state(layer, copied)
    ['calls']
    """
    others, found, seen = dict(after.named_modules()), list[str](), dict[tuple[int, int], Any]()
    for path, module in before.named_modules():
        old, new = entries_by_name(module), entries_by_name(others.get(path, module))
        for name in dict.fromkeys((*old, *new)):
            pair = old.get(name), new.get(name)
            if not all(isinstance(each, nn.Module) for each in pair) and is_changed(*pair, seen):
                found.append(f"{path}.{name}" if path else name)
    return found


def is_changed(old: Any, new: Any, seen: dict[tuple[int, int], Any] | None = None) -> bool:
    """Whether a value or what it holds, in containers, objects and modules, differs from that of a copy: tensors,
    numbers, flags and texts, and what has become or was None. NaN for NaN is no difference, and functions and classes
    have no state.

    Args:
        old: a value.
        new: a copy of it, or what has become of that.
        seen: pairs of objects that were compared already, by their ids, which are theirs as long as they are kept;
            these are added.

    >>> is_changed({"calls": [1, torch.zeros(2)]}, {"calls": [1, torch.ones(2)]})
    True
    """
    left, seen = [(old, new)], dict[tuple[int, int], Any]() if seen is None else seen
    while left:
        old, new = left.pop()
        if old is new or isinstance(old, STATELESS) or isinstance(new, STATELESS):
            continue
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            if are_different(old, new):
                return True
        elif type(old) is not type(new):
            return True
        elif isinstance(old, ATOMS):
            if old != new and (old == old or new == new):
                return True
        elif (id(old), id(new)) not in seen:
            seen[id(old), id(new)] = old, new
            before, after = entries_by_name(old), entries_by_name(new)
            left += [(before.get(name), after.get(name)) for name in dict.fromkeys((*before, *after))]
    return False


def are_different(old: Tensor, new: Tensor) -> bool:
    """Whether two tensors have another form or, if they are dense or nested, other values; NaN is as NaN."""
    about = [(each.device, each.dtype, each.layout, each.is_nested) for each in (old, new)]
    if about[0] != about[1]:
        return True
    if old.is_nested:  # such a tensor may have no shape
        parts = old.unbind(), new.unbind()
        return len(parts[0]) != len(parts[1]) or any(map(are_different, *parts))
    if old.shape != new.shape:
        return True
    if old.layout is not torch.strided or old.is_meta or torch.equal(old, new):
        return False
    if not old.is_floating_point() and not old.is_complex():
        return True
    return not bool(((old == new) | (old.isnan() & new.isnan())).all())


def entries_by_name(value: Any) -> dict[Any, Any]:
    """What a module, a container or an object holds, by names that are equal in a copy: in place of a key that is an
    object its position. Of a set, whose order no copy keeps, it is the size, of an array the bytes or the
    objects.
    """
    if isinstance(value, nn.Module):
        return {**value._parameters, **value._buffers, **value._modules, **held_by(value)}
    if isinstance(value, set | frozenset):
        return {"size": len(value)}
    if isinstance(value, array | bytearray):
        return {"bytes": bytes(value)}
    if (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return dict(enumerate(value.ravel().tolist())) if value.dtype.hasobject else {"bytes": value.tobytes()}
    parts = enumerate(enumerate(value) if isinstance(value, deque) else parts_of(value))
    return {name if isinstance(name, ATOMS) else (place,): part for place, (name, part) in parts}


def held_by(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module beside those of every module."""
    return {name: value for name, value in module.__dict__.items() if name not in STANDARD}
