"""What a module writes into when it runs: its arguments, objects among them such as caches, and its own attributes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from skipway.tracing.arguments import path_text
from skipway.tracing.containers import ATOMS
from skipway.tracing.module_state import version_of

__all__ = ["ObjectStates", "attributes_kept", "copy_state", "version_of"]

DEPTH = 6
"""Levels of attributes and containers that are compared."""
OWN = frozenset({"_parameters", "_buffers", "_modules", "training"})
"""Tables of a module that hold no state of a pass, or whose state is put back elsewhere."""


class ObjectStates:
    """The state of a module's arguments and attributes at one time, by their names.

    Args:
        module: that is called.
        args, kwargs: what it is called with.
        names: of its parameters, in order.
        without: an argument that does not count.

    >>> layer, cache = nn.Linear(1, 1), {"keys": [1]}
    >>> before = ObjectStates(layer, (), {"cache": cache}, ())
    >>> cache["keys"].append(2)
    >>> ObjectStates(layer, (), {"cache": cache}, ()).changes_since(before)
    ('cache (dict)',)
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        names: tuple[str, ...],
        without: Any = None,
    ) -> None:
        self.held: list[Any] = []  # so that no address is used twice
        arguments = {path_text((key,), names): value for key, value in (*enumerate(args), *kwargs.items())}
        self.states = {
            f"{name} ({type(value).__name__})": self.state(value)
            for name, value in arguments.items()
            if value is not without and not isinstance(value, nn.Module)
        }
        for path, part in module.named_modules():
            for name, value in vars(part).items():
                if name not in OWN and not isinstance(value, (*ATOMS, Tensor)):
                    self.states[f"its attribute {path}{path and '.'}{name}"] = self.state(value, 3)

    def state(self, value: Any, depth: int = DEPTH) -> Any:
        """A comparable picture of a value: identities and versions of tensors, and what containers and objects hold."""
        if isinstance(value, ATOMS):
            return value
        self.held.append(value)
        if isinstance(value, Tensor):
            return id(value), version_of(value)
        if depth == 0 or isinstance(value, nn.Module | type) or callable(value):
            return id(value)
        if isinstance(value, Mapping):
            return tuple((str(key), self.state(item, depth - 1)) for key, item in value.items())
        if isinstance(value, list | tuple):
            return tuple(self.state(item, depth - 1) for item in value)
        if isinstance(value, set | frozenset):
            return len(value)
        return id(value), self.state(vars(value), depth - 1) if hasattr(value, "__dict__") else None

    def changes_since(self, before: ObjectStates) -> tuple[str, ...]:
        """Names of what was written into."""
        return tuple(
            name for name, state in self.states.items() if name in before.states and state != before.states[name]
        )


def copy_state(value: Any, depth: int = DEPTH) -> Any:
    """A copy of containers and objects, caches for example, that holds the same tensors: what a block writes into it
    does not reach the original.

    >>> import torch
    >>> cache = {"keys": [torch.ones(1)]}
    >>> copied = copy_state(cache)
    >>> copied["keys"].append(torch.ones(1))
    >>> len(cache["keys"]), copied["keys"][0] is cache["keys"][0]
    (1, True)
    """
    if depth == 0 or isinstance(value, (*ATOMS, Tensor, nn.Module, type)) or callable(value):
        return value
    if isinstance(value, tuple):
        items = [copy_state(item, depth - 1) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    copied = value
    with suppress(Exception):  # what cannot be copied (a lock, a stream) is shared
        copied = copy.copy(value)
    if isinstance(copied, list):
        copied[:] = [copy_state(item, depth - 1) for item in copied]
    elif isinstance(copied, dict):
        for key in copied:
            copied[key] = copy_state(copied[key], depth - 1)
    if copied is not value and hasattr(copied, "__dict__"):
        for name, item in vars(copied).items():
            vars(copied)[name] = copy_state(item, depth - 1)
    return copied


@contextmanager
def attributes_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, modules may count and collect in their attributes; afterwards those are as before."""
    kept = [(module, dict(vars(module))) for module in modules]
    for module, attributes in kept:
        for name, value in attributes.items():
            if name not in OWN and not name.startswith("_") and isinstance(value, list | dict | set):
                vars(module)[name] = copy_state(value)
    try:
        yield
    finally:
        for module, attributes in kept:
            for name in [name for name in vars(module) if name not in attributes]:
                del vars(module)[name]
            for name, value in attributes.items():
                if vars(module).get(name) is not value:
                    vars(module)[name] = value
