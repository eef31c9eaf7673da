"""What a module writes into when it runs: its arguments, objects among them such as caches, and its own attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from skipway.tracing.arguments import path_text

__all__ = ["ATOMS", "ObjectStates", "version_of"]

DEPTH = 6
"""Levels of attributes and containers that are compared."""
ATOMS = (bool, int, float, complex, str, bytes, type(None))
OWN = frozenset({"_parameters", "_buffers", "_modules", "training"})
"""Tables of a module that hold no state of a pass, or whose state is put back elsewhere."""


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written into; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


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
