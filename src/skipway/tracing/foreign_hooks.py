"""Forward hooks that somebody else put on a network: they may keep or count what they are given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils.prune import BasePruningMethod

__all__ = ["TABLES", "calls_foreign_hook", "foreign_hook", "is_foreign", "remove_foreign_hooks"]

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
    while isinstance(hook, partial):
        hook = hook.func
    return not isinstance(hook, BasePruningMethod) and not (getattr(hook, "__module__", None) or "").startswith(OWN)


def foreign_hook(model: nn.Module) -> str:
    """The first module of a network with a foreign forward hook; empty where there is none."""
    for name, module in model.named_modules():
        if any(is_foreign(hook) for table in TABLES for hook in getattr(module, table).values()):
            return name or "the model"
    return ""


def calls_foreign_hook(model: nn.Module) -> bool:
    """Whether a call of a network calls foreign forward hooks, those on all modules among them."""
    everywhere = (torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks)
    return any(is_foreign(hook) for table in everywhere for hook in table.values()) or bool(foreign_hook(model))


def remove_foreign_hooks(copied: nn.Module) -> nn.Module:
    """The copy of a network, without its foreign forward hooks."""
    for module in copied.modules():
        for table in (getattr(module, name) for name in TABLES):
            for key in [key for key, hook in table.items() if is_foreign(hook)]:
                del table[key]
    return copied
