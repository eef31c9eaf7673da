"""Tensors and numbers that modules keep as attributes: copied with the module, and put back after a pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import is_not
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from skipway.tracing.containers import map_tensors, tensors_in

__all__ = [
    *("attribute_restoration", "copy_module", "detach_attributes", "differing_state", "kept_tensors", "set_state"),
]

Model = TypeVar("Model", bound=nn.Module)
STANDARD = frozenset({*vars(nn.Module()), "training"})
"""The names in the `__dict__` of every module."""
HOLDERS = (Tensor, list, tuple, dict)
NUMBERS = (int, float)
"""Counters and lengths; flags among them are left, since one may say that hooks were installed, as in transformers."""
DEPTH = 6
"""Containers within one another that are compared."""
KINDS, MISSING = (*HOLDERS, *NUMBERS), object()


def copy_module(module: Model) -> Model:
    """A deep copy of any module, also of one that keeps tensors of a graph, which `copy.deepcopy` refuses: the weights
    that `torch.nn.utils.weight_norm` computes, activations of an earlier pass. They are detached in the copy.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    >>> layer.kept = layer(torch.zeros(1, 2))
    >>> copy_module(layer).kept.requires_grad
    False
    """
    memo: dict[int, Any] = {}
    for tensor in kept_tensors(module.modules()):
        if not tensor.is_leaf:
            memo[id(tensor)] = tensor.detach().clone()
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
    """The buffers and attributes of a copy of a network that differ from the network's, since a call wrote into them:
    tensors and numbers, in containers too, and what was None or has become it.

    >>> layer = nn.Linear(2, 2)
    >>> layer.calls = 0
    >>> copied = copy_module(layer)
    >>> copied.calls += 1
    >>> differing_state(layer, copied)
    ['calls']
    """
    copies, found = dict(after.named_modules()), []
    for path, module in before.named_modules():
        other = copies.get(path, module)
        for old, new in ((module._buffers, other._buffers), (held_by(module), held_by(other))):
            names = [name for name in dict.fromkeys((*old, *new)) if is_changed(old.get(name), new.get(name))]
            found += [f"{path}.{name}" if path else name for name in names]
    return found


def is_changed(old: Any, new: Any, depth: int = DEPTH) -> bool:
    """Whether a tensor, a number or a container of such is another than it was; flags are left."""
    if old is new or not depth or isinstance(old, bool) or isinstance(new, bool):
        return False
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.layout is torch.strided and not old.is_nested and not torch.equal(old, new)
    if type(old) is not type(new):
        return isinstance(old, KINDS) or isinstance(new, KINDS)
    if isinstance(old, NUMBERS):
        return bool(old != new)
    if not isinstance(old, (list, tuple, dict)):
        return False
    if len(old) != len(new) or (isinstance(old, dict) and old.keys() != new.keys()):
        return True
    pairs = ((old[key], new[key]) for key in old) if isinstance(old, dict) else zip(old, new, strict=True)
    return any(is_changed(*pair, depth - 1) for pair in pairs)


@torch.no_grad()
def set_state(names: Iterable[str], source: nn.Module, target: nn.Module) -> None:
    """Give buffers and attributes of a copy of a network, by the names of `differing_state`, the network's values; a
    buffer keeps its type.
    """
    owners = dict(target.named_modules())
    for place, _, name in (path.rpartition(".") for path in names):
        owner, copied = source.get_submodule(place), owners.get(place)
        if copied is None:  # it was multiplied into another
            continue
        own, other = (each._buffers if name in owner._buffers else each.__dict__ for each in (owner, copied))
        value, now = own.get(name), other.get(name)
        if name in owner._buffers and isinstance(value, Tensor) and isinstance(now, Tensor):
            other[name] = now.copy_(value) if now.shape == value.shape else value.detach().to(now, copy=True)
        elif name in own:
            other[name] = map_tensors(lambda tensor: tensor.detach().clone(), value)
        else:
            other.pop(name, None)


def held_by(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module beside those of every module."""
    return {name: value for name, value in module.__dict__.items() if name not in STANDARD}
