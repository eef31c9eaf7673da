"""Forward hooks of a network that somebody else put there: a copy keeps them, and some backends do not call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from skipway.tracing.containers import ATOMS
from skipway.tracing.module_state import held_by

__all__ = ["foreign_hook", "share_hooks"]

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


def share_hooks(copied: M, model: nn.Module) -> M:
    """The copy of a network, whose foreign hooks are the network's own again: `copy.deepcopy` shares functions, but
    copies the object of a method, which then records for nobody. Methods of what the network itself holds stay the
    copy's, which reads what they record.
    """
    copies, own = dict(copied.named_modules()), held_objects(model)
    for name, module in model.named_modules():
        for table in TABLES:
            for key, hook in getattr(module, table).items():
                if is_foreign(hook) and id(owner_of(hook)) not in own and name in copies:
                    getattr(copies[name], table)[key] = hook
    return copied


def owner_of(hook: Any) -> Any:
    """The object whose method a hook is, or the hook itself."""
    while isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__self__", hook)


def held_objects(model: nn.Module) -> set[int]:
    """The identities of the modules of a network and of all objects in their attributes."""
    found, left = set[int](), [*model.modules()]
    while left:
        each = left.pop()
        if id(each) in found or isinstance(each, (Tensor, type, *ATOMS)):
            continue
        found.add(id(each))
        if isinstance(each, (list, tuple, set, frozenset, Mapping)):
            left += each.values() if isinstance(each, Mapping) else each
        else:
            held = held_by(each) if isinstance(each, nn.Module) else getattr(each, "__dict__", {})
            left += held.values()
    return found
