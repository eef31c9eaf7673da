"""Forward hooks of a network that somebody else put there: a copy keeps them, and some backends do not call them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import CellType, FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from skipway.tracing.containers import ATOMS
from skipway.tracing.module_state import copy_module, entries_by_name

__all__ = ["copy_network", "foreign_hook", "share_hooks"]

M = TypeVar("M", bound=nn.Module)
TABLES = ("_forward_hooks", "_forward_pre_hooks")
OWN = ("torch.", "skipway.", "transformers.")
"""Where hooks come from that compute part of a network, such as weight norm, or collect what it returns, and this
library's.
"""


def is_foreign(hook: Callable[..., Any]) -> bool:
    """Whether a hook is neither torch's nor Skipway's.

    >>> layer = nn.utils.spectral_norm(nn.Linear(2, 2))
    >>> list(map(is_foreign, layer._forward_pre_hooks.values())), is_foreign(print)
    ([False], True)
    """
    return not isinstance(hook, BasePruningMethod) and not (getattr(hook, "__module__", None) or "").startswith(OWN)


def foreign_hook(model: nn.Module) -> str:
    """The first module of a network with a foreign forward hook; empty where there is none."""
    for name, module in model.named_modules():
        if any(is_foreign(hook) for table in TABLES for hook in getattr(module, table).values()):
            return name or "the model"
    return ""


def copy_network(model: M) -> M:
    """A copy of a network, with hooks as `share_hooks` has them."""
    return share_hooks(copy_module(model), model)


def share_hooks(copied: M, model: nn.Module) -> M:
    """The copy of a network, whose foreign hooks are the network's own again: `copy.deepcopy` shares functions, but
    copies the object of a method, which then records for nobody. What belongs to the network stays the copy's: methods
    of what it holds, which it reads, and partials and callable objects that hold a module or tensor of it. In the
    closure and the defaults of a function the copy's modules take the places of the network's.
    """
    if not foreign_hook(model):
        return copied
    copies, own = dict(copied.named_modules()), held_objects(model.modules())
    places = {id(module): copies[name] for name, module in model.named_modules() if name in copies}
    for name, module in model.named_modules():
        for table in TABLES if name in copies else ():
            for key, hook in getattr(module, table).items():
                if is_foreign(hook) and not belongs_to(own, hook):
                    getattr(copies[name], table)[key] = in_copy(hook, places)
    return copied


def belongs_to(own: Mapping[int, Any], hook: Any) -> bool:
    """Whether a hook, or what a partial holds, is a method of what a network holds, or has a module or tensor of it."""
    if isinstance(hook, partial):
        return any(belongs_to(own, each) for each in (hook.func, *hook.args, *hook.keywords.values()))
    if isinstance(hook, FunctionType):
        return False
    if (owner := getattr(hook, "__self__", None)) is not None:
        return id(owner) in own
    return id(hook) in own or any(isinstance(own.get(key), nn.Module | Tensor) for key in held_objects([hook]))


def in_copy(hook: Any, places: Mapping[int, nn.Module]) -> Any:
    """A function whose closure and defaults have a copy's modules in place of a network's; another hook as it is."""
    if not isinstance(hook, FunctionType):
        return hook
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
    """Some values and all that they hold, in containers, objects and modules, by identity."""
    found, left = dict[int, Any](), [*values]
    while left:
        each = left.pop()
        if id(each) not in found and not isinstance(each, (type, *ATOMS)):
            found[id(each)] = each
            if not isinstance(each, Tensor):
                left += each if isinstance(each, set | frozenset) else entries_by_name(each).values()
    return found
