"""Forward hooks of a network that somebody else put there: a copy keeps them, and some backends do not call them."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

from skipway.tracing.containers import ATOMS, own_attributes
from skipway.tracing.foreign_hooks import TABLES, foreign_hook, is_foreign
from skipway.tracing.module_state import copy_module, entries_by_name

__all__ = ["copy_network", "share_hooks"]

M = TypeVar("M", bound=nn.Module)


def copy_network(model: M) -> M:
    """A copy of a network, with hooks as `share_hooks` has them."""
    return share_hooks(copy_module(model), model)


def share_hooks(copied: M, model: nn.Module) -> M:
    """The copy of a network, whose foreign hooks are the network's own again: `copy.deepcopy` shares functions, but
    copies the object of a method, which then records for nobody. What belongs to the network stays the copy's, see
    `in_copy`.
    """
    if not foreign_hook(model):
        return copied
    copies, own = dict(copied.named_modules()), held_objects(model.modules())
    places = {id(module): copies[name] for name, module in model.named_modules() if name in copies}
    replaced: dict[int, Any] = {}  # hooks on several modules share what they hold
    for name, module in model.named_modules():
        for table in TABLES if name in copies else ():
            made = getattr(copies[name], table)
            for key, hook in getattr(module, table).items():
                if is_foreign(hook) and (key in made or not holds_part(own, hook)):
                    made[key] = in_copy(hook, made.get(key), own, places, replaced)
    return copied


def holds_part(own: Mapping[int, Any], value: Any) -> bool:
    """Whether a value is an object of a network, or its method, or holds a module or tensor of it."""
    if isinstance(value, FunctionType):
        return False
    return owner_of(value) in own or any(isinstance(own.get(key), nn.Module | Tensor) for key in held_objects([value]))


def owner_of(value: Any) -> int:
    """The identity of the object of a method, of another value its own."""
    return id(value.__self__ if isinstance(value, MethodType) else value)


def in_copy(
    value: Any, copied: Any, own: Mapping[int, Any], places: Mapping[int, nn.Module], made: dict[int, Any]
) -> Any:
    """A hook of a network, or what it holds, for a copy of the network.

    Objects of the network, and their methods, are those of the copy. Functions have the copy's modules in their
    closures and defaults. Partials, lists and other objects that hold modules or tensors of the network are made anew
    with those of the copy; what else they hold, such as the list that a hook fills, is shared.

    Args:
        value: a hook, or what it holds.
        copied: the deep copy of it.
        own: what the network holds, by identity.
        places: the copy's modules by the identities of the network's.
        made: objects that were made, by the identities of those in whose place they are.
    """
    if isinstance(value, FunctionType):
        return with_places(value, places)
    if owner_of(value) in own:
        return copied
    if isinstance(value, MethodType) or not holds_part(own, value):
        return value
    if id(value) in made:
        return made[id(value)]

    def entry(part: Any, other: Any) -> Any:
        return in_copy(part, other, own, places, made)

    if isinstance(value, partial):
        named = {name: entry(part, copied.keywords[name]) for name, part in value.keywords.items()}
        return partial(entry(value.func, copied.func), *map(entry, value.args, copied.args), **named)
    if type(value) is tuple:
        return tuple(map(entry, value, copied))
    if type(value) is list:
        items: list[Any] = made.setdefault(id(value), [])
        items.extend(map(entry, value, copied))
        return items
    if type(value) is dict:
        entries: dict[Any, Any] = made.setdefault(id(value), {})
        entries.update(zip(value, map(entry, value.values(), copied.values()), strict=True))
        return entries
    if isinstance(value, (nn.Module, list, tuple, dict, set, frozenset, deque)):
        return copied
    new = made[id(value)] = copy.copy(value)
    others = dict(own_attributes(copied))
    for name, part in [*own_attributes(value)]:
        object.__setattr__(new, name, entry(part, others.get(name, part)))
    return new


def with_places(hook: FunctionType, places: Mapping[int, nn.Module]) -> FunctionType:
    """A function whose closure and defaults have a copy's modules in place of a network's."""
    closure, defaults = hook.__closure__ or (), hook.__defaults__ or ()
    held = [places.get(id(each)) for each in (*map(contents_of, closure), *defaults)]
    if all(each is None for each in held):
        return hook
    cells = tuple(cell if module is None else CellType(module) for cell, module in zip(closure, held, strict=False))
    values = tuple(places.get(id(each), each) for each in defaults)
    made = FunctionType(hook.__code__, hook.__globals__, hook.__name__, values, cells)
    made.__kwdefaults__ = hook.__kwdefaults__
    return made


def contents_of(cell: CellType) -> Any:
    """What a variable of a closure holds; None where it has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def held_objects(values: Iterable[Any]) -> dict[int, Any]:
    """Some values and all that they hold, in containers, objects, partials, methods and modules, by identity."""
    found, left = dict[int, Any](), [*values]
    while left:
        each = left.pop()
        if id(each) not in found and not isinstance(each, (type, *ATOMS)):
            found[id(each)] = each
            if isinstance(each, set | frozenset):
                left += each
            elif isinstance(each, partial):
                left += (each.func, *each.args, *each.keywords.values())
            elif isinstance(each, MethodType):
                left.append(each.__self__)
            elif not isinstance(each, Tensor):
                left += entries_by_name(each).values()
    return found
