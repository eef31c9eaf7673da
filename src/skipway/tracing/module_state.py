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
    *("attribute_restoration", "copy_module", "detach_attributes", "differing_state", "held_by", "kept_tensors"),
    "set_state",
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
        if old.layout is not torch.strided or old.is_nested or old.is_meta:
            return False
        about = [(each.device, each.dtype, each.shape) for each in (old, new)]
        return about[0] != about[1] or not torch.equal(old, new)
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
    """Give a copy of a network the network's state in all modules that hold one of these buffers and attributes, the
    names of `differing_state`; a buffer keeps its type.

    With what was found to differ go the other attributes of its module, flags and objects among them, which may say
    what it means; flags of hooks stay, since the hooks do. What modules share is shared again.
    """
    names = list(names)
    if not names:
        return
    owners = dict(target.named_modules())  # less what was multiplied into others
    pairs = [(module, owners[path]) for path, module in source.named_modules() if path in owners]
    memo: dict[int, Any] = {}
    for module, copied in pairs:
        memo[id(module)] = copied
        for table in ("_parameters", "_buffers"):
            held, others = getattr(module, table), getattr(copied, table)
            memo |= {id(held[name]): others[name] for name in held if others.get(name) is not None}
    places = {name.rpartition(".")[0] for name in names}
    stateful = [(module, owners[path]) for path, module in source.named_modules() if path in places & owners.keys()]
    memo |= {id(x): x.detach().clone() for x in kept_tensors(module for module, _ in stateful) if not x.is_leaf}
    for module, copied in stateful:
        for name, value in module._buffers.items():
            now = copied._buffers.get(name)
            if value is None or now is None:
                copied._buffers[name] = None if value is None else value.detach().clone()
            elif is_changed(value, now):
                same = now.shape == value.shape
                copied._buffers[name] = now.copy_(value) if same else value.detach().to(now, copy=True)
        for name in [name for name in held_by(copied) if not is_hook_flag(name)]:
            del copied.__dict__[name]
        copied.__dict__.update({n: copy.deepcopy(v, memo) for n, v in held_by(module).items() if not is_hook_flag(n)})


def is_hook_flag(name: str) -> bool:
    """Whether an attribute says by its name that hooks were installed, as in transformers."""
    return "hook" in name.lower()


def held_by(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module beside those of every module."""
    return {name: value for name, value in module.__dict__.items() if name not in STANDARD}
