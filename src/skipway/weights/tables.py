"""Which key maps there are, by module type and library."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from skipway.errors import CheckpointError, suggest
from skipway.weights.keymap import KeyMap, Rule

__all__ = ["find", "looks_like", "register"]

OWN = KeyMap("skipway", (Rule("{leaf}", "{leaf}"),))
TABLES: dict[type[nn.Module], dict[str, KeyMap]] = {}


def register(kind: type[nn.Module], keymap: KeyMap) -> None:
    """Enter what a library calls the parameters of a module type and its subclasses."""
    TABLES.setdefault(kind, {})[keymap.library] = keymap


def find(model: nn.Module, library: str) -> KeyMap:
    """The key map for a model and a library."""
    known = {OWN.library: OWN}
    for kind in reversed(type(model).__mro__):
        known |= TABLES.get(kind, {})
    if library not in known:
        raise CheckpointError(
            f"names={library!r} for a {type(model).__name__}: {suggest('set of names', library, known)}"
        )
    return known[library]


def looks_like(keys: Iterable[str]) -> str | None:
    """The architecture and the library whose table speaks of most of the keys; None below three quarters."""
    keys = list(keys)
    scores = {
        f"a {kind.__name__} of {library}": keymap.known(keys)
        for kind, libraries in TABLES.items()
        for library, keymap in libraries.items()
    }
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] >= 0.75 else None
