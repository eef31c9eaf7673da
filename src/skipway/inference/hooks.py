"""Forward hooks of a network that somebody else put there: a copy keeps them, and some backends do not call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils.prune import BasePruningMethod

__all__ = ["foreign_hook", "share_hooks"]

M = TypeVar("M", bound=nn.Module)
TABLES = ("_forward_hooks", "_forward_pre_hooks")
OWN = ("torch.", "skipway.")
"""Where hooks come from that compute part of a network, such as weight norm, or belong to this library."""


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
    copies the object of a method, which then records for nobody. Methods of the network's modules stay the copy's.
    """
    own, copies = set(model.modules()), dict(copied.named_modules())
    for name, module in model.named_modules():
        for table in TABLES:
            for key, hook in getattr(module, table).items():
                if is_foreign(hook) and getattr(hook, "__self__", hook) not in own and name in copies:
                    getattr(copies[name], table)[key] = hook
    return copied
